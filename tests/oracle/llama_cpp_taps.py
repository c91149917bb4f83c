"""The real llama.cpp as an oracle: every node of its graph, by name, through llama-cpp-python's low-level API.

    with LlamaCpp(path) as llama:
        taps, logits = llama.taps(ids)         # {"l_out-0": float32 [T,E], ...}, [T,V]

Clean arithmetic: CPU, F32 KV cache, flash attention off, all tokens in one batch, logits for every token.  On a file with F32
weights nothing is rounded below float32 then.  Asking the evaluation callback for every node computes the nodes one by one,
without fusion.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import llama_cpp
import numpy as np

from quantscope.model.taps import EMBD, HEAD_TAPS, LAYER_TAPS

MAX_DIMS, OP_PARAMS, MAX_NAME, MAX_SRC = 4, 16, 64, 10
F32, I32 = 0, 26  # enum ggml_type
DTYPES = {F32: np.dtype("<f4"), I32: np.dtype("<i4")}
# (name, op) or (name, any op) of a node → name of the tap
RENAMED = {(name, op): f"{name}_pre" for name in ("Qcur", "Kcur") for op in ("MUL_MAT", "MUL", "ADD")} | {
    (f"{name}_{part}", ""): name for name in ("ffn_gate", "ffn_up") for part in ("b", "s")
}
VIEWS = ("RESHAPE", "VIEW", "PERMUTE", "TRANSPOSE", "NONE")


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


@dataclass(frozen=True)
class Node:
    """One evaluated graph node; values row-major, without leading axes of length 1."""

    name: str
    op: str
    values: np.ndarray


class LlamaCpp:
    """A loaded model.  kv: type of the key and value cache, "F32" or "F16"."""

    def __init__(self, path: Path, *, n_ctx: int = 512, kv: str = "F32", flash_attention: bool = False, n_threads: int = 1) -> None:
        self._ggml = _ggml_base()
        llama_cpp.llama_log_set(_SILENT, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_params)
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        self._nodes: list[Node] = []
        self._wanted: Callable[[str, str], bool] | None = None
        self._failure: BaseException | None = None
        self._context = self._new_context(n_ctx, kv, flash_attention, n_threads)

    def _new_context(self, n_ctx: int, kv: str, flash_attention: bool, n_threads: int) -> Any:
        p = llama_cpp.llama_context_default_params()
        p.n_ctx = p.n_batch = p.n_ubatch = n_ctx
        p.n_threads = p.n_threads_batch = n_threads
        p.type_k = p.type_v = {"F32": 0, "F16": 1}[kv]
        p.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash_attention else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        p.no_perf = True
        p.cb_eval = self._callback = llama_cpp.ggml_backend_sched_eval_callback(self._on_node)  # kept: ctypes does not
        context = llama_cpp.llama_init_from_model(self._model, p)
        if not context:
            raise RuntimeError("llama.cpp does not make a context")
        return context

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """[T,V] float32, with no node asked for, so that fusion is on."""
        return self._run(ids, None)

    def nodes(self, ids: Sequence[int], wanted: Callable[[str, str], bool] = lambda name, op: True) -> tuple[list[Node], np.ndarray]:
        """The graph's nodes in order of evaluation, those with wanted(name, op), and the logits [T,V]."""
        logits = self._run(ids, wanted)
        return self._nodes, logits

    def taps(self, ids: Sequence[int]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Taps under the names of quantscope.model.taps, [T,channels] or [H,T,T], and the logits [T,V]."""
        nodes, logits = self.nodes(ids)
        return taps_of(nodes, len(ids)), logits

    def _run(self, ids: Sequence[int], wanted: Callable[[str, str], bool] | None) -> np.ndarray:
        self._nodes, self._wanted, self._failure = [], wanted, None
        n, n_vocab = len(ids), llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        batch = llama_cpp.llama_batch_init(n, 0, 1)
        try:
            batch.n_tokens = n
            for t, token in enumerate(ids):
                batch.token[t], batch.pos[t], batch.n_seq_id[t], batch.seq_id[t][0], batch.logits[t] = token, t, 1, 0, True
            status = llama_cpp.llama_decode(self._context, batch)
        finally:
            llama_cpp.llama_batch_free(batch)
        if self._failure is not None:
            raise self._failure
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(self._context), (n, n_vocab)).copy()

    def _on_node(self, address: int, ask: bool, user_data: int) -> bool:
        """ggml_backend_sched_eval_callback: asked whether a node is wanted, then called when it is computed."""
        try:
            t = GgmlTensor.from_address(address)
            name, op = t.name.decode(), self._ggml.ggml_op_name(t.op).decode()
            if ask:
                return self._wanted is not None and self._wanted(name, op)
            if op not in VIEWS and t.type in DTYPES:
                self._nodes.append(Node(name, op, self._read(address, t)))
        except BaseException as error:  # an exception cannot pass through C: it is raised again after llama_decode
            self._failure = error
        return self._failure is None

    def _read(self, address: int, t: GgmlTensor) -> np.ndarray:
        """A contiguous copy of a node's values."""
        dtype = DTYPES[t.type]
        raw = np.empty(self._ggml.ggml_nbytes(address), np.uint8)
        self._ggml.ggml_backend_tensor_get(address, raw.ctypes.data, 0, raw.size)
        shape, strides = tuple(t.ne)[::-1], tuple(t.nb)[::-1]
        values = np.lib.stride_tricks.as_strided(raw.view(dtype), shape, strides).copy()
        while values.ndim > 1 and values.shape[0] == 1:
            values = values[0]
        return values


def taps_of(nodes: Iterable[Node], n_tokens: int) -> dict[str, np.ndarray]:
    """Graph nodes → taps, [T,channels] or [H,T,T].

    A name occurs several times (product, scale, bias, RoPE), and the last one counts, except that q and k before RoPE are taps of
    their own.  Not every architecture names the output projection: it is the last product, scale or sum after kqv_out.
    """
    taps: dict[str, np.ndarray] = {}
    projecting = ""  # the layer whose kqv_out was seen and whose ffn_inp was not
    for node in nodes:
        stem, _, layer = node.name.partition("-")
        stem = RENAMED.get((stem, node.op), RENAMED.get((stem, ""), stem))
        if stem in ("kqv_out", "ffn_inp"):
            projecting = layer if stem == "kqv_out" else ""
        elif projecting and node.op in ("MUL_MAT", "MUL", "ADD"):
            stem, layer = "attn_out", projecting
        if stem == "kq_soft_max":  # padded to a multiple of 256 keys
            taps[f"{stem}-{layer}"] = node.values.reshape(-1, n_tokens, node.values.shape[-1])[..., :n_tokens]
        elif layer and stem in LAYER_TAPS:
            taps[f"{stem}-{layer}"] = node.values.reshape(n_tokens, -1)
        elif stem == EMBD or stem in HEAD_TAPS:
            taps[stem] = node.values.reshape(n_tokens, -1)
    return taps


def _ggml_base() -> ctypes.CDLL:
    lib = ctypes.CDLL(str(next((Path(llama_cpp.__file__).parent / "lib").glob("*ggml-base.*"))))
    lib.ggml_op_name.restype = ctypes.c_char_p
    lib.ggml_nbytes.argtypes, lib.ggml_nbytes.restype = (ctypes.c_void_p,), ctypes.c_size_t
    lib.ggml_backend_tensor_get.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)
    lib.ggml_backend_tensor_get.restype = None
    return lib


@llama_cpp.llama_log_callback
def _SILENT(level: int, text: bytes, user_data: int) -> None:  # noqa: N802
    pass
