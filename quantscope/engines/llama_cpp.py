"""llama.cpp as an engine: every tap for every position, on the CPU, without flash attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import llama_cpp
import numpy as np

from quantscope.engines import Request, model_name
from quantscope.engines.collect import Collector, Steps
from quantscope.engines.llama_session import LlamaSession, TapObserver, Values, has_amx
from quantscope.errors import EngineError
from quantscope.language import english, mark
from quantscope.quants.threads import available_cpus
from quantscope.sources.base import show
from quantscope.sources.resolve import open_source
from quantscope.tokenizers import check_ids
from quantscope.trace import Origin, Trace
from quantscope.wording import sci

NO_AMX = mark("This CPU has AMX tiles: llama.cpp ran without them and without interleaved weights, in its plain CPU code.")


def run(request: Request, collect: Collector) -> Trace:
    """The trace of a request.  EngineError for a Hugging Face folder, and with llama.cpp's words when it refuses the file."""
    source = open_source(request.model)
    if source.format != "gguf":
        raise EngineError(
            f"{show(source.path)}: llama.cpp reads GGUF files, found a Hugging Face folder. Convert it with llama.cpp's "
            f"convert_hf_to_gguf.py, or trace it with --engine transformers."
        )
    n = len(request.tokens)
    with LlamaSession(source.path, n_ctx=max(n, 1), kv=request.kv, n_threads=request.threads or available_cpus()) as llama:
        check_ids(request.tokens, llama.n_vocab, llama.n_ctx_train)
        if request.steps:
            steps = Steps(collect)
            plain = _step_by_step(llama, request.tokens)
            observed = _step_by_step(llama, request.tokens, lambda: TapObserver(steps.begin(), 1))
            steps.hand_on()
        else:
            plain = llama.decode(request.tokens)
            observed = llama.decode(request.tokens, TapObserver(collect, n))
    origin = Origin(
        engine="llama.cpp",
        engine_version=f"llama-cpp-python {llama_cpp.__version__}",
        arithmetic=f"ggml, {request.kv} cache",
        model=model_name(request.model),
        model_sha256=source.sha256(),
        arch=str(source.metadata.get("general.architecture")),
        tokens=request.tokens,
        notes=(_observation(plain, observed), *([NO_AMX] if has_amx() else [])),
    )
    return Trace(origin, collect.complete())


def _step_by_step(llama: LlamaSession, tokens: Sequence[int], observer: Callable[[], TapObserver | None] = lambda: None) -> Values:
    """Logits [T,V] of one token at a time over the cache; each step has an observer of its own."""
    return np.concatenate([llama.decode([token], observer(), n_past=t) for t, token in enumerate(tokens)])


def _observation(plain: Values, observed: Values) -> str:
    """What being observed changed in the logits: asking for every node computes them one by one, without fusing operations."""
    if np.array_equal(plain, observed):
        return mark("Observing every operation changed no bit of the logits.")
    error = np.square(plain.astype(np.float64) - observed).sum() / np.square(plain.astype(np.float64)).sum()
    return english(
        "Observing the operations changed the logits by an NMSE of {error}: llama.cpp fuses some of them otherwise.",
        error=sci(float(error)),
    )
