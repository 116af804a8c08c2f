"""Makes Triton's CPU interpreter do bf16 and fp8 arithmetic as a GPU does.

The interpreter (3.6 to 3.9) keeps bf16 as raw uint16: it truncates fp32 to bf16 where hardware rounds to
nearest, and multiplies bf16 matrices as integers; its fp32 to e4m3 loses the carry of a mantissa that
rounds up. All are replaced here, for tests alone.
"""

from typing import Any

import numpy as np
import pytest
import torch


def _bits_to_float(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _float_to_bits(values: np.ndarray) -> np.ndarray:
    rounded = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16).reshape(values.shape)


def _float_to_e4m3(values: np.ndarray) -> np.ndarray:
    rounded = torch.from_numpy(np.ascontiguousarray(values)).clamp(-448, 448).to(torch.float8_e4m3fn)
    return rounded.view(torch.uint8).numpy().reshape(values.shape)


def _e4m3_to_float(bits: np.ndarray) -> np.ndarray:
    exact = torch.from_numpy(np.ascontiguousarray(bits)).view(torch.float8_e4m3fn).float()
    return exact.numpy().reshape(bits.shape)


def round_like_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the interpreter's casts and dot for the duration of a test."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, convert = InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp

    def cast_impl(self: Any, source: Any, kind: Any) -> Any:
        if source.dtype.scalar == tl.float32 and kind.scalar == tl.bfloat16:
            return TensorHandle(_float_to_bits(source.data), kind.scalar)
        if source.dtype.scalar == tl.bfloat16 and kind.scalar == tl.float32:
            return TensorHandle(_bits_to_float(source.data), kind.scalar)
        return cast(self, source, kind)

    def fp_to_fp(self: Any, source: Any, kind: Any, *options: Any) -> Any:
        if source.dtype.scalar == tl.float32 and kind.scalar == tl.float8e4nv:
            return TensorHandle(_float_to_e4m3(source.data), kind.scalar)
        return convert(self, source, kind, *options)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        def wide(x: Any) -> np.ndarray:
            if x.dtype.scalar == tl.float8e4nv:
                return _e4m3_to_float(x.data)
            return _bits_to_float(x.data) if x.dtype.scalar == tl.bfloat16 else x.data.astype(np.float32)

        if d.dtype.scalar == tl.int32:
            exact = np.matmul(a.data.astype(np.int32), b.data.astype(np.int32))
            return TensorHandle(exact + d.data, d.dtype.scalar)
        return TensorHandle(np.matmul(wide(a), wide(b)) + d.data, d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast_impl)
    monkeypatch.setattr(InterpreterBuilder, "create_fp_to_fp", fp_to_fp)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
