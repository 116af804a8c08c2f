"""A model of g x u GPUs from what was measured on one or two, with its error where it can be checked.

A step on g x u GPUs takes one GPU's arithmetic divided by their number, plus what of its traffic nothing
hides, plus the gathers that end it. Two things come from measurement: the parts of one GPU's step, and the
rate of a push to a peer. The prediction for 1x2 is compared with the measured 1x2, and the arithmetic of
an 8-GPU share (its step with the transfers off) with an eighth of one GPU's.
"""

from dataclasses import asdict, dataclass
from typing import Any

from engine.config import DiTConfig


@dataclass(frozen=True)
class Measured:
    """What the model starts from."""

    one_gpu_ms: float  # a guided step, both passes
    push_gb_s: float  # to one peer
    blocks: int
    tokens: int  # of the video
    config: DiTConfig
    bytes_per_feature: int = 2


def traffic_bytes(measured: Measured, guidance: int, parts: int) -> float:
    """What a rank sends in a block for each of q, k, v and o, both its passes together."""
    passes = 2 // guidance
    rows = measured.tokens / parts
    return passes * rows * measured.config.dim * measured.bytes_per_feature * (parts - 1) / parts


def predict(measured: Measured, guidance: int, parts: int) -> dict[str, float]:
    """Milliseconds of a step and of its parts.

    One pass can hide v and q under the next projections, one of two head groups of k under attention of the
    other, and likewise of o: so half of k and half of o remain. Two interleaved passes hide everything but
    the first block's, which is done once for both.
    """
    each_ms = traffic_bytes(measured, guidance, parts) / (measured.push_gb_s * 1e6)
    if parts == 1:
        exposed = 0.0
    elif guidance == 1:
        exposed = 4 * each_ms / 2  # the first block, one pass
    else:
        exposed = measured.blocks * each_ms
    arithmetic = measured.one_gpu_ms / (guidance * parts)
    patches = measured.tokens * measured.config.out_channels * 4 * 4  # fp32, 1 x 2 x 2 patches
    gathered = (2 // guidance) * patches * (parts - 1) / parts + (patches if guidance == 2 else 0)
    gather_ms = gathered / (measured.push_gb_s * 1e6)
    return {"ms": arithmetic + exposed + gather_ms, "exposed_ms": exposed, "gather_ms": gather_ms}


def report(measured: Measured, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Predictions for 2 and 8 GPUs beside what was measured of them (rows by contestant's name)."""

    def best(start: str, *, off: bool) -> float | None:
        times = [
            row["ms"] for name, row in results.items() if name.startswith(start) and (", off" in name) == off
        ]
        return min(times, default=None)

    rows = []
    for guidance, parts in ((1, 2), (2, 1), (1, 8), (2, 4)):
        layout = f"{guidance}x{parts}"
        row: dict[str, Any] = {"layout": layout, **predict(measured, guidance, parts)}
        real, share = best(layout, off=False), best(f"share of {layout}", off=False)
        share_off = best(f"share of {layout}", off=True)
        if real is not None:
            row |= {"measured_ms": real, "error": row["ms"] / real - 1}
        if share is not None:
            row |= {"share_ms": share, "error_to_share": (row["ms"] - row["gather_ms"]) / share - 1}
        if share_off is not None:
            row["arithmetic_error"] = measured.one_gpu_ms / (guidance * parts) / share_off - 1
            # The better figure for 8 GPUs where a share was measured: only the gathers are added to it.
            row["from_share_ms"] = (share or share_off) + row["gather_ms"]
        rows.append(row)
    return {"from": {k: v for k, v in asdict(measured).items() if k != "config"}, "rows": rows}
