"""Transformers as an engine: a Hugging Face folder, or a GGUF file through its own loader, with hooks on the sub-modules.

Eager attention, so that the probabilities are there to be seen.  The channels of q and k come in GGUF's (canonical) order, as from every
other engine: Transformers holds them half-split (docs/decisions/0001-canonical-layout.md).
"""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from typing import Any

import torch
import transformers
from torch import Tensor

from quantscope.arch.table import arch_of_hf_type
from quantscope.engines import Request, model_name
from quantscope.engines.collect import Collector, Steps
from quantscope.engines.transformers_hooks import Observer
from quantscope.errors import EngineError, QuantscopeError
from quantscope.language import english
from quantscope.model.bf16_arithmetic import limits
from quantscope.model.ops import exact_matmul
from quantscope.sources.base import Source, show
from quantscope.sources.resolve import open_source
from quantscope.tokenizers import check_ids
from quantscope.trace import Origin, Trace
from quantscope.weights import Weights
from quantscope.wording import listed


def run(request: Request, collect: Collector) -> Trace:
    """The trace of a request.  EngineError with Transformers' own words when it does not load or run the model."""
    source = open_source(request.model)
    model = _load(source, request.dtype)
    arch_of_hf_type(model.config.model_type, where=show(source.path))
    seen = _observer(model, Weights(source))
    check_ids(request.tokens, seen.config.n_vocab, seen.config.n_ctx)
    ids = torch.tensor([request.tokens], dtype=torch.int64)
    try:
        with torch.no_grad(), exact_matmul():
            if request.steps:
                _step_by_step(seen, ids, collect)
            else:
                with seen.showing(collect):
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
        arch=seen.config.arch,
        tokens=request.tokens,
        dtype=request.dtype,
        notes=(*_left_out(seen), *(limits(seen.config.arch) if request.dtype == "bfloat16" else ())),
    )
    return Trace(origin, collect.complete())


def _observer(model: Any, weights: Weights) -> Observer:
    try:
        return Observer(model, weights)
    except AttributeError as e:
        raise EngineError(
            f"{show(weights.source.path)}: Transformers loads this model as {type(model).__name__}, whose layers are not where those of a "
            f"{model.config.model_type} are ({_in_a_line(e)}). Another version of Transformers has other modules: try 5.23, or trace a "
            f"GGUF file of it with --engine llama.cpp."
        ) from e


def _left_out(seen: Observer) -> tuple[str, ...]:
    """Which taps are missing, and that is no difference."""
    if not seen.unseen:
        return ()
    return (english("Transformers has no module that shows {taps} of this model: these taps are left out.", taps=listed(seen.unseen)),)


def _step_by_step(seen: Observer, ids: Tensor, collect: Collector) -> None:
    """One token at a time over the cache that the model hands back."""
    steps, past = Steps(collect), None
    for t in range(ids.shape[1]):
        with seen.showing(steps.begin()):
            past = seen.model(ids[:, t : t + 1], past_key_values=past, use_cache=True).past_key_values
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
