#!/usr/bin/env bash
# Kills everything for an hour and checks that every promise held; see tests/chaos. Arguments go to the run:
#   make chaos ARGS="--minutes 10 --seed 7"
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
"$root/scripts/setup.sh"
cd "$root"
exec .venv/bin/python -m tests.chaos "$@"
