#!/usr/bin/env bash
# Keeps the code of a release for the rolling upgrade's test: scripts/previous.sh REF, after each release.
# An archive, since a clone may be shallow and know no older commit.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
ref="$(git rev-parse --verify "${1:?which release: a tag or commit}^{commit}")"
git archive --format=tar "$ref" jobs api worker engine kernels infra ':!kernels/tuned' ':!infra/grafana' ':!infra/kuberay' |
    xz -9e >tests/ops/data/previous.tar.xz
echo "tests/ops/data/previous.tar.xz holds $(git log -1 --format='%h of %cs: %s' "$ref")"
