"""ggml's own conversions, called in the shared library that llama-cpp-python carries.

    to_float(raw, QTYPES["Q4_K"])                 what llama.cpp sees in these bytes
    quantize(x, QTYPES["Q4_K"], n_per_row=256)    what llama-quantize writes; with ``importance``, what it writes with --imatrix

Both run on the calling thread and release the GIL.  Only libggml-base is loaded: no model, no backend, nothing on stderr.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantscope.qtypes import QuantType

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


class TypeTraits(ctypes.Structure):
    """``struct ggml_type_traits`` of ggml.h; test_decode.py checks names and sizes of every type through it."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float_ref", ctypes.c_void_p),
    )


ROW_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)  # (from, to, number of elements)


@cache
def library() -> ctypes.CDLL:
    spec = find_spec("llama_cpp")
    assert spec is not None, "this test needs ggml: pip install llama-cpp-python"
    assert spec.origin is not None
    found = sorted((Path(spec.origin).parent / "lib").glob("*ggml-base*"))
    assert found, f"no ggml-base library beside {spec.origin}"
    ggml = ctypes.CDLL(str(found[0]))
    ggml.ggml_get_type_traits.argtypes = [ctypes.c_int]
    ggml.ggml_get_type_traits.restype = ctypes.POINTER(TypeTraits)
    ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
    ggml.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    return ggml


def traits(qtype: QuantType) -> TypeTraits:
    found: TypeTraits = library().ggml_get_type_traits(qtype.id).contents
    return found


def row_decoder(qtype: QuantType) -> Callable[[int, int, int], None]:
    """(address of the bytes, address of the floats, number of floats); Q8_K's is exported but not in the table of types."""
    if qtype.name == "Q8_K":
        return ctypes.cast(library().dequantize_row_q8_K, ROW_FUNCTION)
    pointer = traits(qtype).to_float
    assert pointer, f"ggml has no to_float for {qtype}"
    return ROW_FUNCTION(pointer)


def to_float(raw: Bytes, qtype: QuantType, out: Floats | None = None) -> Floats:
    """uint8[n_bytes] → float32[n]."""
    n = raw.size // qtype.type_size * qtype.block_size
    out = np.empty(n, np.float32) if out is None else out
    if qtype.name == "F32":  # ggml has no function for it: the bytes are the floats
        out[:] = raw.view(np.float32)
        return out
    row_decoder(qtype)(raw.ctypes.data, out.ctypes.data, n)
    return out


def quantize(x: Floats, qtype: QuantType, n_per_row: int, out: Bytes | None = None, importance: Floats | None = None) -> Bytes:
    """float32[n_rows · n_per_row] → uint8[n_bytes]; importance: float32[n_per_row]."""
    assert x.flags.c_contiguous
    assert x.dtype == np.float32
    if importance is not None:
        assert importance.flags.c_contiguous
        assert (importance.dtype, importance.shape) == (np.float32, (n_per_row,))
    n_rows = x.size // n_per_row
    n_bytes = n_rows * qtype.row_bytes(n_per_row)
    out = np.empty(n_bytes, np.uint8) if out is None else out
    weights = None if importance is None else importance.ctypes.data
    assert library().ggml_quantize_chunk(qtype.id, x.ctypes.data, out.ctypes.data, 0, n_rows, n_per_row, weights) == n_bytes
    return out


def quantize_ref(x: Floats, qtype: QuantType) -> Bytes:
    """The reference quantization of the intermediate types Q8_1 and Q8_K, which ggml_quantize_chunk refuses."""
    out = np.empty(qtype.row_bytes(x.size), np.uint8)
    function = library().quantize_row_q8_K_ref if qtype.name == "Q8_K" else traits(qtype).from_float_ref
    ctypes.cast(function, ROW_FUNCTION)(x.ctypes.data, out.ctypes.data, x.size)
    return out


def can_quantize(qtype: QuantType) -> bool:
    """ggml encodes the type, and without an importance matrix."""
    return bool(traits(qtype).from_float_ref) and not library().ggml_quantize_requires_imatrix(qtype.id)


def assert_same_floats(ours: Floats, theirs: Floats, what: object = "") -> None:
    """Equal bit for bit, −0 and +0 apart; a NaN equals any NaN: which of two NaNs an addition passes on is the compiler's choice."""
    assert ours.shape == theirs.shape
    assert ours.size > 0, "nothing was compared"
    differ = (ours.view(np.uint32) != theirs.view(np.uint32)) & ~(np.isnan(ours) & np.isnan(theirs))
    _assert_none(differ, ours, theirs, what)


def assert_same_bytes(ours: Bytes, theirs: Bytes, what: object = "") -> None:
    assert ours.shape == theirs.shape
    assert ours.size > 0, "nothing was compared"
    _assert_none(ours != theirs, ours, theirs, what)


def _assert_none(differ: NDArray[np.bool_], ours: NDArray[Any], theirs: NDArray[Any], what: object) -> None:
    if differ.any():
        first = int(np.argmax(differ))
        raise AssertionError(
            f"{what}: {differ.sum()} of {differ.size} differ, first [{first}]: {ours[first]!r}, ggml has {theirs[first]!r}"
        )
