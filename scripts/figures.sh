#!/usr/bin/env bash
# Every figure that needs a GPU, each after its tests; see benchmarks/figures.py. Arguments go to it:
#   make figures ARGS="--only kernels --budget 900"
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
"$root/scripts/setup.sh"
cd "$root"
exec .venv/bin/python -m benchmarks.figures "$@"
