#!/usr/bin/env bash
# One video through every real part of the service; see infra/demo.py.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
"$root/scripts/setup.sh"
exec "$root/.venv/bin/python" -m infra.cli demo "$@"
