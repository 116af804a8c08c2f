"""cuDNN's attention on e4m3 operands, one scale a tensor: `sdpa_fp8` of nvidia-cudnn-frontend.

k loses its mean over the tokens first, as in `kernels.attention_8bit.reference`. The output is e4m3 as well
(all that Hopper has): |o| can't exceed v's largest magnitude, so that sets its scale before anything is
computed. Graph and names as in the library's own tests (NVIDIA/cudnn-frontend, test/python, MIT).

Shapes: B batch, L query tokens, T key tokens, H heads, K head dimension.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kernels.fp8_gemm.rows import E4M3, LARGEST

OF_P = 256.0  # the scale of P, which is in [0, 1]: the largest power of two below e4m3's 448
HEADROOM = 0.9  # of the output's range: a P that was rounded up may add up to a little more than 1
ONE = (1, 1, 1, 1)
# The graph's tensors, in the order of `Operands`' fields; then the output and two maxima that nobody reads.
Q, KEYS, V, *SCALES = range(1, 10)
OUT, MAX_P, MAX_OUT = 10, 11, 12


@dataclass(frozen=True)
class Operands:
    """What the library takes; scales are [1, 1, 1, 1] fp32 on the device, so nothing waits for them."""

    q: Tensor  # [B, L, H, K] e4m3, contiguous
    k: Tensor  # [B, T, H, K]
    v: Tensor  # [B, T, H, K]
    of_q: Tensor  # values = data * scale
    of_k: Tensor
    of_v: Tensor
    of_p: Tensor
    to_p: Tensor  # data = values * scale
    to_out: Tensor


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """(x over its largest magnitude as e4m3, the scale that gives x back)."""
    x = x.float()
    largest = x.abs().amax()
    scale = torch.where(largest > 0, largest / LARGEST, torch.ones_like(largest))
    return (x / scale).clamp(-LARGEST, LARGEST).to(E4M3).contiguous(), scale.view(ONE)


def operands(q_BLHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor) -> Operands:
    """The three tensors in 8 bits, and all scales."""
    q, of_q = quantize(q_BLHK)
    k, of_k = quantize(k_BTHK.float() - k_BTHK.mean(1, keepdim=True, dtype=torch.float32))
    v, of_v = quantize(v_BTHK)
    to_p = torch.full_like(of_q, OF_P)
    return Operands(q, k, v, of_q, of_k, of_v, 1 / to_p, to_p, HEADROOM / of_v)


def attention(q_BLHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v in q's dtype, [B, L, H, K]. Raises what the library raises."""
    given = operands(q_BLHK, k_BTHK, v_BTHK)
    return (run(given).float() / given.to_out).to(q_BLHK.dtype)


def run(given: Operands) -> Tensor:
    """The attention itself: [B, L, H, K] e4m3, to be divided by `to_out`."""
    batch, queries, heads, width = given.q.shape
    device = given.q.device
    index = torch.cuda.current_device() if device.index is None else device.index
    graph, size, handle = _graph(batch, queries, given.k.shape[1], heads, width, index)
    out = torch.empty(given.q.shape, dtype=torch.uint8, device=device).view(E4M3)
    unread = torch.zeros(2, *ONE, dtype=torch.float32, device=device)
    tensors = dict(enumerate(vars(given).values(), start=1)) | {
        OUT: out,
        MAX_P: unread[0],
        MAX_OUT: unread[1],
    }
    workspace = torch.empty(max(size, 1), dtype=torch.uint8, device=device)
    _cudnn().set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)
    graph.execute(tensors, workspace, handle=handle)
    return out


def _cudnn() -> Any:
    import cudnn

    return cudnn


@lru_cache(maxsize=32)
def _graph(batch: int, queries: int, keys: int, heads: int, width: int, device: int) -> tuple[Any, int, Any]:
    """(the planned graph, bytes of its workspace, its handle) for tensors whose heads lie inside tokens."""
    cudnn = _cudnn()
    single, eight = cudnn.data_type.FLOAT, cudnn.data_type.FP8_E4M3
    with torch.cuda.device(device):
        handle = cudnn.create_handle()
    graph = cudnn.pygraph(
        io_data_type=eight, intermediate_data_type=single, compute_data_type=single, handle=handle
    )

    def layout(tokens: int) -> dict[str, Any]:
        return {
            "dim": (batch, heads, tokens, width),
            "stride": (tokens * heads * width, width, heads * width, 1),
        }

    q, k, v = (
        graph.tensor(uid=uid, data_type=eight, **layout(tokens))
        for uid, tokens in ((Q, queries), (KEYS, keys), (V, keys))
    )
    of_q, of_k, of_v, of_p, to_p, to_out = (
        graph.tensor(uid=uid, dim=ONE, stride=ONE, data_type=single) for uid in SCALES
    )
    out, _, *maxima = graph.sdpa_fp8(
        q=q, k=k, v=v, descale_q=of_q, descale_k=of_k, descale_v=of_v, descale_s=of_p, scale_s=to_p,
        scale_o=to_out, generate_stats=False, attn_scale=width**-0.5,
    )  # fmt: skip
    shape = layout(queries)
    out.set_uid(OUT).set_output(True).set_data_type(eight).set_dim(shape["dim"]).set_stride(shape["stride"])
    for uid, one in zip((MAX_P, MAX_OUT), maxima, strict=True):
        one.set_uid(uid).set_output(True).set_data_type(single).set_dim(ONE).set_stride(ONE)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A])
    graph.check_support()
    graph.build_plans()
    return graph, graph.get_workspace_size(), handle
