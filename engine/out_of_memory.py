"""Which errors mean that memory is full. Only torch's allocator has a class for it; the others have words."""

import torch

# cuBLAS and cuDNN; the CUDA runtime, Triton and NCCL; torch's allocator of host memory, twice.
WORDS = ("STATUS_ALLOC_FAILED", "out of memory", "not enough memory", "can't allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had no memory left, by whatever library noticed."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in WORDS)
