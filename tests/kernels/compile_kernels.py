"""Compiles every kernel for a Hopper GPU, without one; run by test_compiles in a process of its own.

The interpreter accepts code that the compiler refuses, and a machine without a GPU runs nothing else.
"""

import re
import warnings
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.gemm import triton as gemm
from kernels.norm_modulate import triton as norm
from kernels.qk_norm_rope import triton as qk
from kernels.vae_norm_silu import triton as vae
from kernels.vae_upsample import triton as upsample
from kernels.wide_attention import triton as wide

TARGET = GPUTarget("cuda", 90, 32)
# What isn't a constant: pointers of these dtypes by name, else fp32 for eps and scale, else i32.
POINTERS = {
    "vae": "*fp16", "upsample": "*fp16", "norm": "*fp32", "qk": "*bf16", "gemm": "*bf16", "wide": "*fp32",
}  # fmt: skip
JOIN = {"C": 96, "BLOCK_C": 128, "ROWS": 16, "SILU": True}
FLAGS = ("BIAS", "SHORTCUT", "KEEP", "NORM", "PAST", "SPREAD")
NORM = {"D": 5120, "BLOCK": 8192, "ROWS": 1, "OFFSET": 1.0, "ADD": True, "GATE": True}
SETS = {"GATE_SHARED": True, "GATE_SETS": 1, "NORM_SHARED": True, "NORM_SETS": 1}
PAIR = {"GATE_SHARED": False, "GATE_SETS": 2, "NORM_SHARED": False, "NORM_SETS": 2}
QK = {"D": 5120, "K": 128, "RANKS": 8, "WIDTH": 384, "WIDTH_2": 256, "BLOCK": 8192, "ROWS": 1, "ROPE": True}
CASES: list[tuple[str, Any, dict[str, Any], int]] = [
    ("vae", vae._join_kernel, JOIN | dict.fromkeys(FLAGS, True), 4),
    ("vae", vae._join_kernel, JOIN | dict.fromkeys(FLAGS, True) | {"SPREAD": False}, 4),
    ("vae", vae._join_kernel, JOIN | dict.fromkeys(FLAGS, False), 4),
    ("upsample", upsample._interleave_kernel, {"C": 96, "BLOCK_C": 128, "ROWS": 32, "BIAS": True}, 4),
    ("wide", wide._exp_rows_kernel, {"BLOCK": 16384}, 16),
    ("norm", norm._norm_kernel, NORM | SETS, 8),
    ("norm", norm._norm_kernel, NORM | PAIR, 8),
    ("qk", qk._qk_kernel, QK, 8),
]


def build(kind: str, kernel: Any, constants: dict[str, Any], warps: int) -> str:
    """The PTX, with all sizes and pointers multiples of 16."""
    names = kernel.arg_names
    assert {param.name for param in kernel.params if param.is_constexpr} == set(constants)
    signature = {
        name: "constexpr" if name in constants
        else POINTERS[kind] if name.endswith("_ptr")
        else "fp32" if name in ("eps", "scale")
        else "i32"
        for name in names
    }  # fmt: skip
    wide_ones = [name for name in names if signature[name] in ("i32", POINTERS[kind])]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in wide_ones}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, values, attributes)
    return triton.compile(source, target=TARGET, options={"num_warps": warps}).asm["ptx"]


def build_product(epilogue: int) -> str:
    """The same for the matrix product, whose operands are TMA descriptors."""
    tile = gemm.Tile()
    constants = {
        "BM": tile.m, "BN": tile.n, "BK": tile.k, "GROUP": tile.group, "PROGRAMS": 132, "EPILOGUE": epilogue,
        "HAS_BIAS": True, "GATE_SETS": 2 if epilogue == gemm.GATED else 0, "HALVES": tile.halves,
        "PRECISION": "tf32",
    }  # fmt: skip
    if epilogue != gemm.GATED:
        constants["gate_ptr"] = None
    piece = [tile.m, tile.n // 2]
    boxes = {"a_desc": [tile.m, tile.k], "b_desc": [tile.n, tile.k], "c_desc": piece, "r_desc": piece}
    names = gemm._gemm_kernel.arg_names
    signature = {name: "constexpr" if name in constants else "i32" for name in names}
    signature |= {name: f"tensordesc<bf16{box}>" for name, box in boxes.items()}
    signature |= {n: "*bf16" for n in ("bias_ptr", "gate_ptr") if n not in constants}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(gemm._gemm_kernel, signature, values, {})
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return triton.compile(source, target=TARGET, options=options).asm["ptx"]


def main() -> None:
    warnings.simplefilter("ignore")
    for kind, kernel, constants, warps in CASES:
        ptx = build(kind, kernel, constants, warps)
        loads = [len(re.findall(rf"ld\.global\S*{width}", ptx)) for width in (r"\.v4", "")]
        print(kernel.__name__, "loads of 16 bytes:", loads[0], "of", loads[1])
        assert loads[0] > 0, f"{kernel.__name__} loads nothing 16 bytes at a time"
    for epilogue in (gemm.GELU, gemm.GATED):
        assert "wgmma" in build_product(epilogue)
        print("product", epilogue, "uses the tensor cores' warp-group instructions")


if __name__ == "__main__":
    main()
