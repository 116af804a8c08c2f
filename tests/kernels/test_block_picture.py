"""The picture of a block: each bar as long as its sustained time, in the profile's proportions."""

import re

import pytest

from benchmarks.picture import WIDTH, draw


def test_bars_are_as_long_as_the_sustained_times() -> None:
    parts = {"attention": 3.0, "products": 1.0}
    results = {
        "ours": {"ms": 5.0, "parts": parts, "clock_mhz": 1500.0, "power_w": 690.0},
        "official": {"ms": 10.0, "parts": parts, "clock_mhz": 1500.0, "power_w": 690.0},
    }
    share = {"model": "A14B", "size": "720p", "share": 8}
    svg = draw({"share": share, "results": results}, "a GPU & more")
    widths = [float(width) for width in re.findall(r'width="([\d.]+)" height="22"', svg)]
    assert widths == pytest.approx([WIDTH * 0.375, WIDTH * 0.125, WIDTH * 0.75, WIDTH * 0.25])
    assert "ours: attention 3.75 ms" in svg
    assert "a GPU &amp; more" in svg
