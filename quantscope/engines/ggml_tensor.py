"""Reading ggml tensors through ctypes: the graph nodes that llama.cpp's evaluation callback is given."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

MAX_DIMS, OP_PARAMS, MAX_NAME, MAX_SRC = 4, 16, 64, 10
DTYPES = {0: np.dtype("<f4"), 26: np.dtype("<i4")}  # enum ggml_type of the nodes that hold plain numbers: F32, I32


class GgmlTensor(ctypes.Structure):
    """struct ggml_tensor of ggml.h, up to the name."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * MAX_DIMS),
        ("nb", ctypes.c_size_t * MAX_DIMS),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * OP_PARAMS),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * MAX_SRC),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * MAX_NAME),
    )


@cache
def ggml_base() -> ctypes.CDLL:
    """The ggml-base library that llama-cpp-python carries, with the functions used here declared."""
    lib = ctypes.CDLL(str(next((Path(llama_cpp.__file__).parent / "lib").glob("*ggml-base.*"))))
    lib.ggml_op_name.restype = ctypes.c_char_p
    lib.ggml_nbytes.argtypes, lib.ggml_nbytes.restype = (ctypes.c_void_p,), ctypes.c_size_t
    lib.ggml_backend_tensor_get.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)
    lib.ggml_backend_tensor_get.restype = None
    return lib


def name_and_op(address: int) -> tuple[str, str]:
    """Name and operation of the tensor at this address: ("Qcur-0", "ROPE")."""
    t = GgmlTensor.from_address(address)
    return t.name.decode("utf-8", "replace"), ggml_base().ggml_op_name(t.op).decode()


def sources(address: int) -> list[str]:
    """Names of the tensors that the one at this address is made of."""
    t = GgmlTensor.from_address(address)
    return [GgmlTensor.from_address(src).name.decode("utf-8", "replace") for src in t.src if src]


def read(address: int) -> NDArray[Any] | None:
    """A contiguous copy of a tensor's values, row-major, without leading axes of length 1; None unless it holds float32 or int32."""
    t = GgmlTensor.from_address(address)
    dtype = DTYPES.get(t.type)
    if dtype is None:
        return None
    raw = np.empty(ggml_base().ggml_nbytes(address), np.uint8)
    ggml_base().ggml_backend_tensor_get(address, raw.ctypes.data, 0, raw.size)
    shape, strides = tuple(t.ne)[::-1], tuple(t.nb)[::-1]
    values = np.lib.stride_tricks.as_strided(raw.view(dtype), shape, strides).copy()
    while values.ndim > 1 and values.shape[0] == 1:
        values = values[0]
    return values
