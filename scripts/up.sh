#!/usr/bin/env bash
# The whole stack in the foreground: `reel up`.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
"$root/scripts/setup.sh"
exec "$root/.venv/bin/python" -m infra.cli up "$@"
