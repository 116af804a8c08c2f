"""Compiles the 8-bit kernels for a Hopper GPU, without one; run by test_compiles."""

import contextlib
import io
import re
import warnings
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from kernels.attention_8bit import hopper
from kernels.attention_8bit import triton as attention
from kernels.fp8_gemm import triton as fp8

TARGET = GPUTarget("cuda", 90, 32)
ROWS = {"x_ptr": "*bf16", "out_ptr": "*fp8e4nv"}
NORM = {"x_ptr": "*fp32", "y_ptr": "*bf16", "out_ptr": "*fp8e4nv"}
BLOCKS = {"x_ptr": "*bf16", "out_ptr": "*i8"}
ROWS_OF = {"q_desc": ("i8", 64), "k_desc": ("i8", 128), "v_desc": ("fp8e4nv", 128)}
TILES = {name: f"tensordesc<{kind}[{rows}, 128],{hopper.LAYOUT!r}>" for name, (kind, rows) in ROWS_OF.items()}
HOPPER = {"STAGES": 4, "PING": True, "MAGIC": False}
CHANNELS = {"v_ptr": "*bf16", "out_ptr": "*fp8e4nv"}
ATTENTION = {"q_ptr": "*i8", "k_ptr": "*i8", "v_ptr": "*fp8e4nv", "out_ptr": "*bf16"}
SETS = {"GATE_SHARED": True, "GATE_SETS": 1, "NORM_SHARED": True, "NORM_SETS": 1}
WIDE = {"D": 5120, "BLOCK": 8192, "OFFSET": 1.0, "ADD": True, "GATE": True} | SETS
TILE = attention.Tile()
CASES: list[tuple[Any, dict[str, str], dict[str, Any], int]] = [
    (fp8._rows_kernel, ROWS, {"N": 13824, "BLOCK": 16384, "GELU": True}, 16),
    (fp8._norm_kernel, NORM, WIDE, 8),
    (attention._blocks_kernel, BLOCKS, {"BLOCK": 128, "K": 128, "MEAN": True}, 4),
    (attention._channels_kernel, CHANNELS, {"BLOCK": attention.TOKENS, "K": 128, "SLOTS": True}, 4),
    (attention._attention_kernel, ATTENTION, {"BM": TILE.m, "BN": TILE.n, "K": 128}, TILE.warps),
    (hopper._attention_kernel, TILES | {"out_ptr": "*bf16"}, HOPPER, 4),
]


def build(kernel: Any, pointers: dict[str, str], constants: dict[str, Any], warps: int) -> str:
    """The PTX."""
    signature = {
        name: "constexpr" if name in constants
        else pointers.get(name, "*fp32") if name.endswith(("_ptr", "_desc"))
        else "fp32" if name in ("eps", "softmax_scale", "shift")
        else "i32"
        for name in kernel.arg_names
    }  # fmt: skip
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    options: dict[str, Any] = {"num_warps": warps}
    if kernel is hopper._attention_kernel:
        source, options["maxnreg"] = GluonASTSource(kernel, signature, values), hopper.REGISTERS
    else:
        source, options["num_stages"] = ASTSource(kernel, signature, values), TILE.stages
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        ptx = triton.compile(source, target=TARGET, options=options).asm["ptx"]
    if kernel is hopper._attention_kernel:
        # Without these two it computes the same, several times slower.
        assert "0 bytes spill stores" in log.getvalue(), log.getvalue()
        assert "serialized" not in log.getvalue(), log.getvalue()
    return ptx


def main() -> None:
    warnings.simplefilter("ignore")
    triton.knobs.nvidia.dump_ptxas_log = True
    for kernel, pointers, constants, warps in CASES:
        ptx = build(kernel, pointers, constants, warps)
        kinds = {".".join(found.split(".")[-3:]) for found in re.findall(r"wgmma\.mma_async\S*", ptx)}
        print(kernel.__name__, sorted(kinds))
        if kernel in (attention._attention_kernel, hopper._attention_kernel):
            assert kinds == {"s32.s8.s8", "f32.e4m3.e4m3"}


if __name__ == "__main__":
    main()
