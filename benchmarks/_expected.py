"""How long a part of the node benchmark will take: a run on a lent machine begins only what can end."""

import math

from engine.config import DiTConfig
from engine.pipeline import Pipeline
from engine.warmup import served_sizes

RATE = 650e12  # FLOP/s of a whole step; an H200 measured 690e12 in 1280x720x81 of A14B, 700e12 in 832x480x81
OFFICIAL = {"FlashAttention-2": 2.2, "cuDNN": 1.7}  # times our step, and some more
PROFILED_ONCE = 1.0  # seconds from which a step is profiled once, not five times


def step_seconds(config: DiTConfig, tokens: int, gpus: int) -> float:
    """A guided step: two passes, each 2 FLOP a weight and token, and 4 L^2 D of attention."""
    dim, ffn = config.dim, config.ffn_dim
    products = 2 * tokens * (6 * dim * dim + 2 * dim * ffn)
    return 2 * config.num_layers * (products + 4 * tokens**2 * dim) / RATE / gpus


def repetitions(once: float) -> int:
    """Of a profile: a long step has enough kernels."""
    return 1 if once > PROFILED_ONCE else 5


def sustained_seconds(once: float, seconds: float, warm: float = 3.0, profiled: bool = True) -> float:
    """What `benchmarks._together.together` takes for a step of `once` seconds."""
    count = 2 + math.ceil(min(warm, seconds) / once) + max(1, math.ceil(seconds / once)) + 1
    return once * (count + (repetitions(once) if profiled else 0))


def warm_up_seconds(pipeline: Pipeline, config: DiTConfig, gpus: int) -> float:
    """A step of each expert at each number of tokens, and some time for compilers and the decoder."""
    spec = pipeline.spec
    frames = (spec.frame_num - 1) // spec.vae.stride[0] + 1
    patch = math.prod(config.patch_size) * math.prod(spec.vae.stride[1:])
    tokens = {frames * width * height // patch for width, height in served_sizes(pipeline)}
    experts = 1 if pipeline.low is None else 2
    return 20 + experts * sum(step_seconds(config, one, gpus) for one in tokens)
