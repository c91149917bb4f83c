"""Transformers with faults: its modules and functions are replaced in the loaded model, and are as before after the run.

    run(model, tokens, [Planted(...)])   →  Trace      through quantscope.engines.transformers, in float32
    with planted(fault): ...                           every model that the engine loads inside the block has the fault
    plantable(model)                     →  [Planted(...), ...]

A GGUF file goes through Transformers' own loader.  A fault edits the loaded model, which is thrown away, or a function of its modelling
module, which is restored: ``transformers_edits``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import gguf
import torch
from gguf.quants import dequantize

from benchmarks.numpy_blocks import MISTAKES, WRONG, decode_rows
from benchmarks.planted import MADE_WITH, ROLES, Planted, Shape, faults_of
from benchmarks.transformers_edits import FAULTS, FUNCTIONS, LINEARS, RENUMBERED, only
from quantscope import engines
from quantscope.engines import Request
from quantscope.engines import transformers as engine
from quantscope.trace import Trace

ARCHS = ("llama", "qwen2", "qwen3")


def run(model: Path, tokens: Sequence[int], faults: Sequence[Planted] = ()) -> Trace:
    """The trace of one run; raises what the engine raises."""
    ids = tuple(tokens[1:] if any(fault.cause == "bos-missing" for fault in faults) else tokens)
    with planted(*faults):
        trace = engines.run(Request("transformers", str(model), ids))
    for fault in faults:
        if fault.cause in RENUMBERED and fault.where != "dropped":
            trace = Trace(trace.origin, RENUMBERED[fault.cause](dict(trace.taps), only(fault)))
    return trace


@contextmanager
def planted(*faults: Planted) -> Iterator[None]:
    """Every model that the engine loads inside the block has the faults."""
    load = engine._load

    def loaded(*args: Any) -> Any:
        model = load(*args)
        if model.config.model_type not in ARCHS:
            raise ValueError(f"faults are planted in {', '.join(ARCHS)}, found {model.config.model_type}")
        for fault in faults:
            FAULTS[fault.cause](model, fault)
        return model

    with ExitStack() as stack:
        for arch in ARCHS:
            module = import_module(f"transformers.models.{arch}.modeling_{arch}")
            for name in FUNCTIONS:
                stack.enter_context(mock.patch.object(module, name, getattr(module, name)))
        stack.enter_context(mock.patch.object(gguf, "dequantize", _dequantizer(faults)))
        stack.enter_context(mock.patch.object(engine, "_load", loaded))
        yield


def plantable(model: Path) -> list[Planted]:
    """The faults that show in this model, clipping and eps set by what a short run of random ids reaches."""
    kept: list[Any] = []
    load = engine._load

    def loaded(*args: Any) -> Any:
        kept.append(load(*args))
        return kept[0]

    ids = torch.randint(3, 256, (12,), generator=torch.Generator().manual_seed(0)).tolist()
    with mock.patch.object(engine, "_load", loaded):
        clean = run(model, [1, *ids])
    shape = shape_of(kept[0], model)
    return [fault for fault in faults_of(shape, clean) if fault.cause in FAULTS and _possible(fault, kept[0])]


def shape_of(loaded: Any, model: Path) -> Shape:
    """What decides which faults a loaded model can show."""
    config, block = loaded.config, loaded.model.layers[0]
    matrices = {role: block.get_submodule(path) for role, path in LINEARS.items()}
    return Shape(
        n_layer=config.num_hidden_layers,
        n_embd=config.hidden_size,
        n_head=config.num_attention_heads,
        n_head_kv=config.num_key_value_heads,
        head_dim=block.self_attn.head_dim,
        theta=config.rope_parameters["rope_theta"],
        eps=config.rms_norm_eps,
        square=frozenset(role for role in ROLES if matrices[role].in_features == matrices[role].out_features),
        biases=tuple(role for role in MADE_WITH if role in matrices and matrices[role].bias is not None),
        head_norms=hasattr(block.self_attn, "q_norm"),
        rope_factors=config.rope_parameters["rope_type"] == "llama3",
        types={} if model.is_dir() else {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(model).tensors},
    )


def _possible(fault: Planted, loaded: Any) -> bool:
    """Heads are halved where the layout of the file is Transformers' own and no norm has the width of a head."""
    return fault.cause != "head-dim-half" or loaded.config.model_type == "qwen2"


def _dequantizer(faults: Sequence[Planted]) -> Callable[..., Any]:
    """What the loader decodes tensors with."""
    wrong = {fault.where: WRONG[fault.cause, fault.where] for fault in faults if fault.cause in MISTAKES}

    def decoded(data: Any, tensor_type: Any) -> Any:
        name = tensor_type.name
        return decode_rows(data, name, wrong[name]) if name in wrong else dequantize(data, tensor_type)

    return decoded
