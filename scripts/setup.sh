#!/usr/bin/env bash
# Makes .venv with everything that the demo and the tests need, from a machine with only Python >= 3.11.
# A second run with the same pyproject.toml and constraints.txt does nothing. PYTHON=... picks the Python.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"
stamp="$venv/.reelserve-setup"

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# What the environment was made from; the folder is part of it, because the install is editable.
fingerprint() { printf '%s ' "$root"; cat "$root/pyproject.toml" "$root/constraints.txt" | cksum; }

fresh() { [ -x "$venv/bin/python" ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(fingerprint)" ]; }

find_python() {
    local candidate candidates=(python3 python3.13 python3.12 python3.11 python)
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    local found
    found="$("${PYTHON:-python3}" --version 2>&1 || true)"
    die "needs Python 3.11 or newer; '${PYTHON:-python3}' is: ${found:-not there}. Install one, or name it: PYTHON=/path/to/python3.12 make demo"
}

quietly() { # runs a command, showing its output only if it fails
    local log="$venv/setup.log"
    if ! "$@" >"$log" 2>&1; then
        tail -n 30 "$log" >&2
        die "failed: $* (the whole output is in $log)"
    fi
}

fresh && exit 0
if command -v flock >/dev/null; then # `make demo` and `make test` may be started together
    mkdir -p "$root/.reel"
    exec 9>"$root/.reel/setup.lock"
    flock 9
    fresh && exit 0
fi

python="$(find_python)"
if [ ! -x "$venv/bin/python" ] || ! "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    say "1/3 making .venv with $("$python" --version)"
    rm -rf "$venv"
    "$python" -m venv "$venv" || die "'$python -m venv' failed: on Debian and Ubuntu install the python3-venv package"
fi
rm -f "$stamp"
pip=("$venv/bin/python" -m pip install --disable-pip-version-check --no-input)
say "2/3 installing torch (the largest download)"
quietly "${pip[@]}" torch==2.13.0
say "3/3 installing reelserve and its pinned dependencies (a few minutes)"
(cd "$root" && quietly "${pip[@]}" -c constraints.txt -e '.[dev]')
fingerprint >"$stamp"
say "done in ${SECONDS} s"
