"""The fused block against the plain one at the models' real widths."""

import pytest

from benchmarks._verify import check_block


@pytest.mark.parametrize("model", ["A14B", "5B"])
def test_fused_block_is_as_exact_as_the_plain_one(model: str):
    check_block(model)
