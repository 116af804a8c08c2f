"""What a fused norm needs to know of a layer norm and the two vectors after it."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Norm:
    """LN(x) * (offset + scale) + shift over the last dimension.

    `shift` and `scale` are fp32 [B or 1, S, D]. With S = 2 sets the first `split` tokens of each
    batch entry use set 0, the others set 1. `offset` is 1 for a modulation and 0 for an affine norm.
    """

    shift: Tensor
    scale: Tensor
    eps: float
    split: int = 0
    offset: float = 1.0

    @staticmethod
    def affine(weight_D: Tensor, bias_D: Tensor, eps: float, split: int = 0) -> "Norm":
        """A layer norm with a weight and a bias; `split` is for the gate of a branch that joins before it."""
        return Norm(bias_D[None, None], weight_D[None, None], eps, split, offset=0.0)
