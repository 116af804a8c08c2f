"""The text encoder over ranks: each prompt is encoded once, not once a rank.

Shapes: T text tokens, E embedding width.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from engine.parallel.mesh import Mesh
    from engine.text_encoder import TextEncoder


def encode_once(prompts: Sequence[str], encoder: "TextEncoder", mesh: "Mesh") -> list[Tensor]:
    """[T, E] of each prompt, on every rank: the prompts are encoded side by side on ranks far apart."""
    if mesh.control is None:
        return [encoder.encode(prompt) for prompt in prompts]
    owners = [mesh.size * i // len(prompts) for i in range(len(prompts))]
    weight = encoder.umt5.shared.weight
    shape = (encoder.text_len, weight.shape[1])
    texts = [
        encoder.encode(prompt)
        if owner == mesh.rank
        else torch.empty(shape, dtype=weight.dtype, device=weight.device)
        for owner, prompt in zip(owners, prompts, strict=True)
    ]
    works = [
        dist.broadcast(text, src=owner, async_op=True) for owner, text in zip(owners, texts, strict=True)
    ]
    for work in works:
        if work is not None:
            work.wait()
    return texts
