#!/usr/bin/env bash
# Removes what can be made again. Videos in out/ stay.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
rm -rf .venv .skypilot .reel .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist ./*.egg-info
find . -name __pycache__ -type d -prune -exec rm -rf {} +
