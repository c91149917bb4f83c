"""Single operations of ggml's CPU backend, computed by the shared libraries that llama-cpp-python carries.

    mul_mat(raw, QTYPES["Q4_K"], x)                  x · Wᵀ with the code that llama.cpp uses for this type and these shapes
    mul_mat(raw, QTYPES["Q4_0"], x, repack=True)     with the weights interleaved in the "CPU_REPACK" buffer, as llama.cpp loads them

llama.cpp puts a matrix into that buffer wherever it can: Q4_0, Q4_K, IQ4_NL and MXFP4 with a multiple of 8 rows on a CPU with AVX2.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from functools import cache
from pathlib import Path

import llama_cpp
import llvmlite.binding as llvm
import numpy as np
from numpy.typing import NDArray

from quantscope.engines.ggml_tensor import GgmlTensor
from quantscope.qtypes import QuantType

CPU = llvm.get_host_cpu_features()
SAME_ORDER = bool(CPU.get("avx2") and CPU.get("fma") and not CPU.get("avx512f"))  # the code that we follow (decision 0008)
F32 = 0  # enum ggml_type
Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


class _InitParams(ctypes.Structure):
    """struct ggml_init_params."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


_FUNCTIONS = {
    "ggml_init": ((_InitParams,), c_void_p),
    "ggml_free": ((c_void_p,), None),
    "ggml_tensor_overhead": ((), c_size_t),
    "ggml_graph_overhead": ((), c_size_t),
    "ggml_new_tensor_2d": ((c_void_p, c_int, c_int64, c_int64), c_void_p),
    "ggml_mul_mat": ((c_void_p, c_void_p, c_void_p), c_void_p),
    "ggml_new_graph": ((c_void_p,), c_void_p),
    "ggml_build_forward_expand": ((c_void_p, c_void_p), None),
    "ggml_backend_alloc_ctx_tensors_from_buft": ((c_void_p, c_void_p), c_void_p),
    "ggml_backend_buffer_free": ((c_void_p,), None),
    "ggml_backend_tensor_set": ((c_void_p, c_void_p, c_size_t, c_size_t), None),
    "ggml_backend_tensor_get": ((c_void_p, c_void_p, c_size_t, c_size_t), None),
    "ggml_backend_graph_compute": ((c_void_p, c_void_p), c_int),
    "ggml_backend_free": ((c_void_p,), None),
    "ggml_backend_dev_backend_reg": ((c_void_p,), c_void_p),
    "ggml_backend_reg_get_proc_address": ((c_void_p, c_char_p), c_void_p),
    "ggml_backend_get_device": ((c_void_p,), c_void_p),
    "ggml_backend_cpu_init": ((), c_void_p),
    "ggml_backend_cpu_set_n_threads": ((c_void_p, c_int), None),
    "ggml_backend_cpu_buffer_type": ((), c_void_p),
}


class _Ggml:
    """The functions of ggml-base and ggml-cpu with their argument types."""

    def __init__(self) -> None:
        folder = Path(llama_cpp.__file__).parent / "lib"
        libraries = [ctypes.CDLL(str(next(folder.glob(f"*ggml-{part}.*")))) for part in ("base", "cpu")]
        for name, (arguments, result) in _FUNCTIONS.items():
            function = next(getattr(lib, name) for lib in libraries if hasattr(lib, name))
            function.argtypes, function.restype = arguments, result
            setattr(self, name.removeprefix("ggml_"), function)


@cache
def _ggml() -> _Ggml:
    return _Ggml()


def _repack_buffer_type(backend: int) -> int:
    """The buffer type that interleaves rows; AssertionError where this build has none."""
    g = _ggml()
    device = g.backend_get_device(backend)
    address = g.backend_reg_get_proc_address(g.backend_dev_backend_reg(device), b"ggml_backend_dev_get_extra_bufts")
    types = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(device)
    assert types[0], "this build of ggml has no buffer type of its own for the CPU"
    return types[0]


def mul_mat(raw: Bytes, qtype: QuantType, x: Floats, *, repack: bool = False, n_threads: int = 1) -> Floats:
    """x float32 [T,K], raw uint8 [O · bytes of K weights] → float32 [T,O]."""
    g = _ggml()
    T, K = x.shape
    n_out = raw.size // qtype.row_bytes(K)
    size = 16 * g.tensor_overhead() + g.graph_overhead()
    backend, weights, rest = g.backend_cpu_init(), g.init(_InitParams(size, None, True)), g.init(_InitParams(size, None, True))
    g.backend_cpu_set_n_threads(backend, n_threads)
    w = g.new_tensor_2d(weights, qtype.id, K, n_out)
    a = g.new_tensor_2d(rest, F32, K, T)
    y = g.mul_mat(rest, w, a)
    graph = g.new_graph(rest)
    g.build_forward_expand(graph, y)
    plain = g.backend_cpu_buffer_type()
    buffers = [
        g.backend_alloc_ctx_tensors_from_buft(c, t)
        for c, t in ((weights, _repack_buffer_type(backend) if repack else plain), (rest, plain))
    ]
    if repack:
        extra = c_void_p.from_address(w + (ctypes.sizeof(GgmlTensor) + 7) // 8 * 8).value
        assert extra, f"ggml does not interleave {qtype} with {n_out} rows"
    x, out = np.ascontiguousarray(x), np.empty((T, n_out), np.float32)
    g.backend_tensor_set(w, raw.ctypes.data, 0, raw.nbytes)
    g.backend_tensor_set(a, x.ctypes.data, 0, x.nbytes)
    assert g.backend_graph_compute(backend, graph) == 0
    g.backend_tensor_get(y, out.ctypes.data, 0, out.nbytes)
    for buffer in buffers:
        g.backend_buffer_free(buffer)
    g.free(weights)
    g.free(rest)
    g.backend_free(backend)
    return out
