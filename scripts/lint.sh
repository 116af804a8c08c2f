#!/usr/bin/env bash
# The linters and the type checker, all of them even if the first one complains.
set -uo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
"$root/scripts/setup.sh" || exit 1
cd "$root" || exit 1
status=0
.venv/bin/ruff check . || status=1
.venv/bin/mypy || status=1
exit "$status"
