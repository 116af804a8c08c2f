#!/usr/bin/env bash
# SkyPilot in a virtual environment of its own, .skypilot/: for `reel scaler` (program = ".skypilot/bin/sky") and for
# the test that loads infra/skypilot/node.yaml with it. A second run with the same versions does nothing.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.skypilot" wanted="$root/infra/skypilot/requirements.txt"
cmp -s "$wanted" "$venv/installed.txt" && exit 0
"${PYTHON:-python3}" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' ||
    { echo "skypilot: needs Python 3.11 to 3.13; name one: PYTHON=python3.12 scripts/skypilot.sh" >&2; exit 1; }
"${PYTHON:-python3}" -m venv --clear "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check --no-input --no-deps -r "$wanted"
cp "$wanted" "$venv/installed.txt"
echo "skypilot: $("$venv/bin/pip" freeze | grep -i '^skypilot=') in .skypilot/" >&2
