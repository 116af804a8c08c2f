"""Calls of the CUDA driver that torch doesn't offer: strided copies, streams that set and await words.

They need no SM: copies run on copy engines, and a stream's front end writes or polls the word. So neither
waits behind a kernel that fills the GPU, which a signalling kernel would.

Facts: CUDA Driver API, "Memory Management" and "Stream Memory Operations".
"""

import ctypes
from functools import lru_cache

from torch import Tensor

UNIFIED = 4  # CU_MEMORYTYPE_UNIFIED: the address tells where it is
WAIT_GEQ = 0  # CU_STREAM_WAIT_VALUE_GEQ, a cyclic comparison


class _Copy2D(ctypes.Structure):
    """CUDA_MEMCPY2D."""

    _fields_ = (
        ("src_x", ctypes.c_size_t),
        ("src_y", ctypes.c_size_t),
        ("src_type", ctypes.c_int),
        ("src_host", ctypes.c_void_p),
        ("src_device", ctypes.c_uint64),
        ("src_array", ctypes.c_void_p),
        ("src_pitch", ctypes.c_size_t),
        ("dst_x", ctypes.c_size_t),
        ("dst_y", ctypes.c_size_t),
        ("dst_type", ctypes.c_int),
        ("dst_host", ctypes.c_void_p),
        ("dst_device", ctypes.c_uint64),
        ("dst_array", ctypes.c_void_p),
        ("dst_pitch", ctypes.c_size_t),
        ("width", ctypes.c_size_t),
        ("height", ctypes.c_size_t),
    )


@lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _call(name: str, *arguments: object) -> None:
    status = getattr(_driver(), name)(*arguments)
    if status:
        words = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(words))
        raise RuntimeError(f"{name} failed: {(words.value or b'unknown error').decode()} ({status})")


def rows_of(x_NM: Tensor) -> tuple[int, int, int]:
    """(bytes of a row, rows, bytes from row to row) of a matrix with contiguous rows."""
    if x_NM.ndim != 2 or (x_NM.shape[1] > 1 and x_NM.stride(1) != 1):
        raise ValueError(f"a copy of rows needs contiguous rows, got shape {tuple(x_NM.shape)}, "
                         f"strides {x_NM.stride()}")  # fmt: skip
    width, size = x_NM.shape[1] * x_NM.element_size(), x_NM.element_size()
    pitch = x_NM.stride(0) * size if x_NM.shape[0] > 1 else width
    return width, x_NM.shape[0], pitch


def copy_rows(into_NM: Tensor, source_NM: Tensor, stream: int) -> None:
    """Copy a matrix on a copy engine; both may have any distance between rows."""
    width, rows, source_pitch = rows_of(source_NM)
    into_width, into_rows, into_pitch = rows_of(into_NM)
    if (into_width, into_rows) != (width, rows):
        raise ValueError(f"{rows} rows of {width} bytes don't fit {into_rows} of {into_width}")
    if width == 0 or rows == 0:
        return
    if source_pitch == into_pitch == width:
        size = ctypes.c_size_t(width * rows)
        target, source = ctypes.c_uint64(into_NM.data_ptr()), ctypes.c_uint64(source_NM.data_ptr())
        _call("cuMemcpyAsync", target, source, size, ctypes.c_void_p(stream))
        return
    copy = _Copy2D(
        src_type=UNIFIED,
        src_device=source_NM.data_ptr(),
        src_pitch=source_pitch,
        dst_type=UNIFIED,
        dst_device=into_NM.data_ptr(),
        dst_pitch=into_pitch,
        width=width,
        height=rows,
    )
    _call("cuMemcpy2DAsync_v2", ctypes.byref(copy), ctypes.c_void_p(stream))


def write_word(address: int, value: int, stream: int) -> None:
    """Set a 32-bit word when the stream gets there, after all it wrote before is visible."""
    word = ctypes.c_uint32(value & 0xFFFFFFFF)
    where = ctypes.c_void_p(stream), ctypes.c_uint64(address)
    _call("cuStreamWriteValue32_v2", *where, word, ctypes.c_uint(0))


def wait_word(address: int, value: int, stream: int) -> None:
    """Hold the stream until a 32-bit word is `value` or more."""
    word = ctypes.c_uint32(value & 0xFFFFFFFF)
    where = ctypes.c_void_p(stream), ctypes.c_uint64(address)
    _call("cuStreamWaitValue32_v2", *where, word, ctypes.c_uint(WAIT_GEQ))
