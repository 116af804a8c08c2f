#!/usr/bin/env bash
# Every test that this machine can run: without an NVIDIA GPU the tests marked gpu are left out.
# Arguments go to pytest. REEL_TEST_MARKS replaces the choice of marks.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
"$root/scripts/setup.sh"
cd "$root"
marks="not slow"
nvidia-smi -L >/dev/null 2>&1 || marks="not slow and not gpu"
exec .venv/bin/python -m pytest -m "${REEL_TEST_MARKS:-$marks}" "$@"
