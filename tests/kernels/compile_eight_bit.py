"""Compiles the 8-bit kernels for a Hopper GPU, without one; run by test_compiles."""

import re
import warnings
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.attention_8bit import triton as attention
from kernels.fp8_gemm import triton as fp8

TARGET = GPUTarget("cuda", 90, 32)
ROWS = {"x_ptr": "*bf16", "out_ptr": "*fp8e4nv"}
NORM = {"x_ptr": "*fp32", "y_ptr": "*bf16", "out_ptr": "*fp8e4nv"}
BLOCKS = {"x_ptr": "*bf16", "out_ptr": "*i8"}
CHANNELS = {"v_ptr": "*bf16", "out_ptr": "*fp8e4nv"}
ATTENTION = {"q_ptr": "*i8", "k_ptr": "*i8", "v_ptr": "*fp8e4nv", "out_ptr": "*bf16"}
SETS = {"GATE_SHARED": True, "GATE_SETS": 1, "NORM_SHARED": True, "NORM_SETS": 1}
WIDE = {"D": 5120, "BLOCK": 8192, "OFFSET": 1.0, "ADD": True, "GATE": True} | SETS
TILE = attention.Tile()
CASES: list[tuple[Any, dict[str, str], dict[str, Any], int]] = [
    (fp8._rows_kernel, ROWS, {"N": 13824, "BLOCK": 16384, "GELU": True}, 16),
    (fp8._norm_kernel, NORM, WIDE, 8),
    (attention._blocks_kernel, BLOCKS, {"BLOCK": 128, "K": 128, "MEAN": True}, 4),
    (attention._channels_kernel, CHANNELS, {"BLOCK": attention.TOKENS, "K": 128}, 4),
    (attention._attention_kernel, ATTENTION, {"BM": TILE.m, "BN": TILE.n, "K": 128}, TILE.warps),
]


def build(kernel: Any, pointers: dict[str, str], constants: dict[str, Any], warps: int) -> str:
    """The PTX."""
    signature = {
        name: "constexpr" if name in constants
        else pointers.get(name, "*fp32") if name.endswith("_ptr")
        else "fp32" if name in ("eps", "softmax_scale", "shift")
        else "i32"
        for name in kernel.arg_names
    }  # fmt: skip
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    options = {"num_warps": warps, "num_stages": TILE.stages}
    return triton.compile(ASTSource(kernel, signature, values), target=TARGET, options=options).asm["ptx"]


def main() -> None:
    warnings.simplefilter("ignore")
    for kernel, pointers, constants, warps in CASES:
        ptx = build(kernel, pointers, constants, warps)
        kinds = {".".join(found.split(".")[-3:]) for found in re.findall(r"wgmma\.mma_async\S*", ptx)}
        print(kernel.__name__, sorted(kinds))
        if kernel is attention._attention_kernel:
            assert kinds == {"s32.s8.s8", "f32.e4m3.e4m3"}


if __name__ == "__main__":
    main()
