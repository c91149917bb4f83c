"""Transformers as an engine: a Hugging Face folder, or a GGUF file through its own loader, with hooks on the sub-modules.

Eager attention, so that the probabilities are there to be seen.  The channels of q and k come in GGUF's (canonical) order, as from every
other engine: Transformers holds them half-split (docs/decisions/0001-canonical-layout.md).
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from operator import attrgetter
from typing import Any

import torch
import transformers
from torch import Tensor

from quantscope.arch.names import names_of
from quantscope.arch.table import ArchSpec, arch_of_hf_type
from quantscope.engines import Request, model_name
from quantscope.engines.collect import Collector, Steps
from quantscope.errors import EngineError, QuantscopeError
from quantscope.model.ops import exact_matmul
from quantscope.sources.base import Source, show
from quantscope.sources.resolve import open_source
from quantscope.tokenizers import check_ids
from quantscope.trace import Origin, Trace
from quantscope.weights import interleave_rows

# (sub-module, which of its sides, tap): of the whole model, and of each decoder layer
MODEL_HOOKS = (("model.embed_tokens", "output", "embd"), ("model.norm", "output", "result_norm"), ("lm_head", "output", "result_output"))
LAYER_HOOKS = (
    ("input_layernorm", "output", "attn_norm"),
    ("self_attn.q_proj", "output", "Qcur_pre"),
    ("self_attn.k_proj", "output", "Kcur_pre"),
    ("self_attn.v_proj", "output", "Vcur"),
    ("self_attn.q_norm", "output", "Qcur_normed"),
    ("self_attn.k_norm", "output", "Kcur_normed"),
    ("self_attn", "probabilities", "kq_soft_max"),
    ("self_attn.o_proj", "input", "kqv_out"),
    ("self_attn.o_proj", "output", "attn_out"),
    ("post_attention_layernorm", "input", "ffn_inp"),
    ("post_attention_layernorm", "output", "ffn_norm"),
    ("mlp.gate_proj", "output", "ffn_gate"),
    ("mlp.up_proj", "output", "ffn_up"),
    ("mlp.down_proj", "input", "ffn_swiglu"),
    ("mlp", "output", "ffn_out"),
    ("", "output", "l_out"),
)
OBSERVED = ("llama", "qwen2", "qwen3")
OPTIONAL = ("self_attn.q_norm", "self_attn.k_norm")


def run(request: Request, collect: Collector) -> Trace:
    """The trace of a request.  EngineError with Transformers' own words when it does not load or run the model."""
    source = open_source(request.model)
    model = _load(source, request.dtype)
    spec = arch_of_hf_type(model.config.model_type, where=show(source.path))
    if spec.name not in OBSERVED:
        raise EngineError(
            f"{show(source.path)}: --engine transformers observes {', '.join(OBSERVED)}, found {spec.name}, with other modules. "
            f"Trace a GGUF file of it with --engine llama.cpp."
        )
    check_ids(request.tokens, model.config.vocab_size, model.config.max_position_embeddings)
    ids = torch.tensor([request.tokens], dtype=torch.int64)
    try:
        with torch.no_grad(), exact_matmul():
            if request.steps:
                _step_by_step(model, ids, spec, collect)
            else:
                with _observed(model, _Canonical(collect, spec, model)):
                    model(ids, use_cache=False)
    except QuantscopeError:
        raise
    except Exception as e:
        raise EngineError(f"{show(source.path)}: Transformers loads this model but fails to run it: {_in_a_line(e)}") from e
    origin = Origin(
        engine="transformers",
        engine_version=f"transformers {transformers.__version__}, torch {torch.__version__}",
        arithmetic=f"exact {request.dtype}" if request.dtype == "float32" else request.dtype,
        model=model_name(request.model),
        model_sha256=source.sha256(),
        arch=spec.name,
        tokens=request.tokens,
        dtype=request.dtype,
    )
    return Trace(origin, collect.complete())


def _step_by_step(model: Any, ids: Tensor, spec: ArchSpec, collect: Collector) -> None:
    """One token at a time over the cache that the model hands back."""
    steps, past = Steps(collect), None
    for t in range(ids.shape[1]):
        with _observed(model, _Canonical(steps.begin(), spec, model)):
            past = model(ids[:, t : t + 1], past_key_values=past, use_cache=True).past_key_values
    steps.hand_on()


def _load(source: Source, dtype: str) -> Any:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder, file = (source.path.parent, source.path.name) if source.format == "gguf" else (source.path, None)
    more = {} if file is None else {"gguf_file": file}
    try:
        with redirect_stderr(io.StringIO()):  # the GGUF loader draws a progress bar that cannot be switched off
            return transformers.AutoModelForCausalLM.from_pretrained(
                str(folder), dtype=getattr(torch, dtype), attn_implementation="eager", local_files_only=True, **more
            ).eval()
    except Exception as e:
        raise EngineError(
            f"{show(source.path)}: Transformers does not load this model: {_in_a_line(e)} Its own loader decides which architectures and "
            f"tensor types it takes: try --engine llama.cpp, or a newer transformers."
        ) from e


def _in_a_line(error: Exception) -> str:
    words = " ".join(str(error).split()) or type(error).__name__
    return words[:400] if words.endswith(".") else f"{words[:400]}."


@contextmanager
def _observed(model: Any, tap: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Every tap of ``model`` is shown to ``tap`` inside the block: [1,T,channels], the probabilities [1,H,T,S]."""
    handles = [_hook(attrgetter(path)(model), side, name, tap) for path, side, name in MODEL_HOOKS]
    for i, block in enumerate(model.model.layers):
        for path, side, name in LAYER_HOOKS:
            if path in OPTIONAL and not hasattr(block.self_attn, path.partition(".")[2]):
                continue
            handles.append(_hook(attrgetter(path)(block) if path else block, side, f"{name}-{i}", tap))
    try:
        with _observed_rotation(model, tap):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(module: Any, side: str, name: str, tap: Callable[[str, Tensor], None]) -> Any:
    if side == "input":
        return module.register_forward_pre_hook(lambda _module, args: tap(name, args[0]))
    if side == "probabilities":
        return module.register_forward_hook(lambda _module, _args, out: tap(name, out[1]))
    return module.register_forward_hook(lambda _module, _args, out: tap(name, out[0] if isinstance(out, tuple) else out))


@contextmanager
def _observed_rotation(model: Any, tap: Callable[[str, Tensor], None]) -> Iterator[None]:
    """q and k after RoPE, which is a function of the modelling module and no sub-module."""
    modeling: Any = importlib.import_module(type(model).__module__)
    rotate, layers = modeling.apply_rotary_pos_emb, iter(range(len(model.model.layers)))

    def observed(q: Tensor, k: Tensor, *args: Any, **more: Any) -> tuple[Tensor, Tensor]:
        q, k = rotate(q, k, *args, **more)  # [1,H,T,D], [1,K,T,D]
        i = next(layers)
        tap(f"Qcur-{i}", q.transpose(1, 2))
        tap(f"Kcur-{i}", k.transpose(1, 2))
        return q, k

    modeling.apply_rotary_pos_emb = observed
    try:
        yield
    finally:
        modeling.apply_rotary_pos_emb = rotate


class _Canonical:
    """Hands taps on as [T,channels] and [H,T,S], q and k in canonical channel order."""

    def __init__(self, collect: Collector | Steps, spec: ArchSpec, model: Any) -> None:
        self._collect = collect
        self._half_split = "halves" in names_of(model.config.model_type).changes.values()
        config = model.config
        self._head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def __call__(self, name: str, x: Tensor) -> None:
        if not self._collect.wants(name):
            return
        x = x[0] if name.startswith("kq_soft_max") else x[0].reshape(x.shape[1], -1)
        if self._half_split and name.startswith(("Qcur", "Kcur")):
            x = interleave_rows(x.T, x.shape[-1] // self._head_dim).T
        self._collect(name, x)
