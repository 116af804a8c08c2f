"""Where compilers keep what they make, so that a restarted process finds it. Imports no compiler itself."""

import os
from collections.abc import MutableMapping
from pathlib import Path


def keep_compiled(folder: Path, environment: MutableMapping[str, str] = os.environ) -> None:
    """Have compilers keep what they make in `folder`, so that a restart finds it.

    Before torch, Triton or flash-attn are imported. A variable that is set already stays as it is.
    """
    for name, place in (
        ("TRITON_CACHE_DIR", "triton"),
        ("TORCHINDUCTOR_CACHE_DIR", "inductor"),
        ("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", "flash-attn"),
        ("CUDA_CACHE_PATH", "cuda"),
    ):
        if name not in environment:
            path = folder / place
            path.mkdir(parents=True, exist_ok=True)
            environment[name] = str(path)
    environment.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
