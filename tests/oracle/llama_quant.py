"""What llama.cpp itself decides: its type selection on tensor shapes alone, and its quantizer on files.

``selected_types`` calls the functions behind ``llama_quant_compute_types`` that llama.cpp's own snapshot test uses: no file, no weights,
any architecture.  They are C++ functions that libllama exports, so their names here are the mangled ones.
``quantized_types`` runs ``llama_model_quantize`` on a file.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from quantscope.qtypes import BY_ID, QuantType
from quantscope.recipes import PRESETS, ModelFacts, Options, TensorShape
from quantscope.sources.gguf import open_gguf

NO_TYPE = llama_cpp.llama_model_quantize_default_params().output_tensor_type
_LLAMA: Any = llama_cpp.llama_cpp._lib
_GGML = ctypes.CDLL(str(next((Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.*"))))
POINTER = ctypes.c_void_p
DEFAULTS = Options()


class _Desc(ctypes.Structure):
    """struct llama_quant_model_desc"""

    _fields_ = (
        ("architecture", ctypes.c_char_p),
        *((name, ctypes.c_uint32) for name in ("n_embd", "n_ff", "n_layer", "n_head", "n_head_kv", "n_expert", "head_k", "head_v")),
    )


class _InitParams(ctypes.Structure):
    """struct ggml_init_params"""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", POINTER), ("no_alloc", ctypes.c_bool))


def _function(lib: Any, name: str, result: Any, *arguments: Any) -> Any:
    f = getattr(lib, name)
    f.restype, f.argtypes = result, arguments
    return f


_ggml_init = _function(_GGML, "ggml_init", POINTER, _InitParams)
_ggml_free = _function(_GGML, "ggml_free", None, POINTER)
_overhead = _function(_GGML, "ggml_tensor_overhead", ctypes.c_size_t)
_new_tensor = _function(_GGML, "ggml_new_tensor_4d", POINTER, POINTER, ctypes.c_int, *[ctypes.c_int64] * 4)
_set_name = _function(_GGML, "ggml_set_name", POINTER, POINTER, ctypes.c_char_p)
_mock_model = _function(_LLAMA, "_Z31llama_quant_model_from_metadataPK22llama_quant_model_desc", POINTER, POINTER)
_free_model = _function(_LLAMA, "llama_model_free", None, POINTER)
_state = _function(_LLAMA, "_Z16llama_quant_initPK11llama_modelPK27llama_model_quantize_params", POINTER, POINTER, POINTER)
_free_state = _function(_LLAMA, "_Z16llama_quant_freeP19quantize_state_impl", None, POINTER)
_allows = _function(
    _LLAMA, "_Z38llama_quant_tensor_allows_quantizationPK19quantize_state_implPK11ggml_tensor", ctypes.c_bool, POINTER, POINTER
)
_compute = _function(
    _LLAMA,
    "_Z25llama_quant_compute_typesP19quantize_state_impl11llama_ftypePP11ggml_tensorP9ggml_typem",
    None,
    POINTER,
    ctypes.c_int,
    POINTER,
    POINTER,
    ctypes.c_size_t,
)


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    """llama.cpp reports every tensor."""


def _params(preset: str, options: Options) -> tuple[Any, Any]:
    """(llama_model_quantize_params, the memory it points to)."""
    llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = PRESETS[preset].file_type
    params.nthread, params.allow_requantize = 1, True
    params.pure, params.quantize_output_tensor = options.pure, not options.leave_output
    params.output_tensor_type = options.output_type.id if options.output_type else NO_TYPE
    params.token_embedding_type = options.embedding_type.id if options.embedding_type else NO_TYPE
    rows = [(o.pattern.encode(), o.qtype.id) for o in options.overrides]
    table = (llama_cpp.llama_model_tensor_override * (len(rows) + 1))(*rows)
    if rows:
        params.tt_overrides = table
    return params, table


def selected_types(
    presets: Sequence[str], tensors: Sequence[TensorShape], model: ModelFacts, options: Options = DEFAULTS
) -> dict[str, dict[str, QuantType]]:
    """preset → name → type, from llama.cpp's selection; tensors it does not quantize keep theirs.

    tensors: in llama.cpp's own order (layer, name), which the functions take for granted.
    """
    desc = _Desc(model.arch.encode(), 256, 256, model.n_layer, model.n_head, model.n_head_kv, model.n_expert, 32, 32)
    mock = _mock_model(ctypes.byref(desc))
    context = _ggml_init(_InitParams((len(tensors) + 1) * _overhead(), None, True))
    handles = [_ggml_tensor(context, t) for t in tensors]
    out: dict[str, dict[str, QuantType]] = {}
    for preset in presets:
        params, memory = _params(preset, options)
        state = _state(mock, ctypes.byref(params))
        allowed = [i for i, handle in enumerate(handles) if _allows(state, handle)]
        results = (ctypes.c_int * len(allowed))()
        _compute(state, params.ftype, (POINTER * len(allowed))(*(handles[i] for i in allowed)), results, len(allowed))
        _free_state(state)
        out[preset] = {t.name: t.qtype for t in tensors} | {tensors[i].name: BY_ID[r] for i, r in zip(allowed, results, strict=True)}
        del memory
    _ggml_free(context)
    _free_model(mock)
    return out


def _ggml_tensor(context: int, tensor: TensorShape) -> int:
    ne = (*reversed(tensor.shape), 1, 1, 1, 1)[:4]
    handle: int = _new_tensor(context, tensor.qtype.id, *ne)
    _set_name(handle, tensor.name.encode())
    return handle


def quantized_types(
    source: Path, out: Path, preset: str, options: Options = DEFAULTS, imatrix: Mapping[str, np.ndarray] | None = None
) -> dict[str, QuantType] | None:
    """name → type in the file that llama_model_quantize writes; None when it refuses, e.g. for want of an importance matrix.

    imatrix: tensor name → weights of its columns, float32; without it ``options.imatrix`` means ones for every tensor.
    """
    params, memory = _params(preset, options)
    matrix = _imatrix_data(imatrix) if imatrix else _flat_imatrix(source) if options.imatrix else None
    if matrix:
        params.imatrix = matrix[0]
    if llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params)):
        return None
    del memory, matrix
    return {name: t.qtype for name, t in open_gguf(out).tensors.items()}


def _flat_imatrix(source: Path) -> tuple[Any, list[np.ndarray]]:
    """An importance matrix of ones for every tensor of the file."""
    tensors = open_gguf(source).tensors.values()
    return _imatrix_data({t.name: np.ones(t.n_per_row * (t.shape[-3] if len(t.shape) > 2 else 1), np.float32) for t in tensors})


def _imatrix_data(weights: Mapping[str, np.ndarray]) -> tuple[Any, list[np.ndarray]]:
    """(array of llama_model_imatrix_data, the memory it points to)."""
    kept = [np.ascontiguousarray(w, np.float32) for w in weights.values()]
    pointers = [w.ctypes.data_as(ctypes.POINTER(ctypes.c_float)) for w in kept]
    rows = [(name.encode(), p, w.size) for name, p, w in zip(weights, pointers, kept, strict=True)]
    return (llama_cpp.llama_model_imatrix_data * (len(rows) + 1))(*rows), kept
