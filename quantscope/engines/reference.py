"""The reference forward as an engine: exact arithmetic, or the emulated arithmetic of ggml's CPU path or of Transformers in bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from quantscope import __version__
from quantscope.arch.config import ModelConfig, as_data
from quantscope.engines import ArithmeticName, Dtype, Request, model_name
from quantscope.engines.collect import Collector, Steps, everything
from quantscope.errors import UsageError
from quantscope.fingerprint import estimate_nmse, fingerprint
from quantscope.language import english
from quantscope.metrics import nmse
from quantscope.model.arithmetic import EXACT, Arithmetic
from quantscope.model.bf16_arithmetic import Bf16Arithmetic, limits
from quantscope.model.forward import KVCache, forward
from quantscope.model.ggml_arithmetic import ggml_arithmetic
from quantscope.model.taps import CHOSEN, stem_of
from quantscope.qtypes import KVType
from quantscope.sources.resolve import open_source
from quantscope.trace import Fingerprint, Full, Origin, Trace
from quantscope.weights import Weights
from quantscope.wording import idle_experts


def trace(
    model: str,
    tokens: Sequence[int],
    *,
    arithmetic: ArithmeticName = "exact",
    dtype: Dtype = "float32",
    kv: KVType = "F16",
    wanted: Callable[[str], bool] = everything,
    predict: bool = False,
    weights: Weights | None = None,
) -> Trace:
    """Every wanted tap of a GGUF file or Hugging Face folder on these ids, [T,channels] or [H,T,T] float32.

    kv: type of the emulated cache with ``arithmetic="ggml"``; the exact one rounds nothing.  predict: also what that arithmetic changes.
    weights: the model's, where it is open already.  Raises what opening the model and ``forward`` raise.
    """
    return run(Request("reference", model, tuple(tokens), arithmetic, dtype, kv, predict=predict), Collector(wanted), weights)


def run(request: Request, collect: Collector, weights: Weights | None = None) -> Trace:
    """The trace of a request.  weights: the model's, where it is open already."""
    weights = Weights(open_source(request.model)) if weights is None else weights
    ids, dtype = torch.tensor([request.tokens], dtype=torch.int64), getattr(torch, request.dtype)
    routed = Routed()
    if request.steps:
        _step_by_step(ids, weights, collect, dtype, _arithmetic(request), routed)
    else:
        forward(ids, weights, FirstOfBatch(collect, routed), dtype=dtype, arithmetic=_arithmetic(request))
    origin = Origin(
        engine="reference",
        engine_version=__version__,
        arithmetic=_described(request),
        model=model_name(request.model),
        model_sha256=weights.source.sha256(),
        arch=weights.config.arch,
        tokens=request.tokens,
        dtype="bfloat16" if request.arithmetic == "bf16" else request.dtype,
        config=_config(weights, len(request.tokens)),
        predicted=_predicted(ids, weights, collect, request.kv) if request.predict and request.arithmetic == "exact" else None,
        notes=(*routed.notes(weights.config), *(limits(weights.config.arch) if request.arithmetic == "bf16" else ())),
    )
    return Trace(origin, collect.complete())


def _step_by_step(ids: Tensor, weights: Weights, collect: Collector, dtype: torch.dtype, arithmetic: Arithmetic, routed: Routed) -> None:
    """One token at a time over a cache."""
    steps, cache = Steps(collect), KVCache()
    for t in range(ids.shape[1]):
        forward(ids[:, t : t + 1], weights, FirstOfBatch(steps.begin(), routed), dtype=dtype, cache=cache, arithmetic=arithmetic)
    steps.hand_on()


def _arithmetic(request: Request) -> Arithmetic:
    """The operations: exact, or an engine's.  UsageError for an engine's in another dtype, of which it has only its own."""
    if request.arithmetic == "exact":
        return EXACT
    if request.dtype != "float32":
        raise UsageError(
            f"--dtype {request.dtype}: --arithmetic {request.arithmetic} says itself what is rounded, expected no --dtype beside it. "
            f"Leave it out."
        )
    return Bf16Arithmetic() if request.arithmetic == "bf16" else ggml_arithmetic(request.kv)


def _described(request: Request) -> str:
    """The arithmetic as a trace names it; that of bf16 as Transformers does."""
    return {"exact": f"exact {request.dtype}", "ggml": f"ggml, {request.kv} cache", "bf16": "bfloat16"}[request.arithmetic]


def _predicted(ids: Tensor, weights: Weights, exact: Collector, kv: KVType) -> dict[str, float]:
    """NMSE of ggml's arithmetic against the exact taps that were kept; estimated where only fingerprints were."""
    found: dict[str, float] = {}

    def compared(name: str, x: Tensor) -> None:
        for piece in exact.taps.get(name, ()):
            if isinstance(piece, Full):
                found[name] = float(nmse(piece.values.flatten(), x[0].float().flatten()))
            elif isinstance(piece, Fingerprint):
                found[name] = estimate_nmse(piece, fingerprint(x[0]))

    forward(ids, weights, compared, arithmetic=ggml_arithmetic(kv))
    return found


def _config(weights: Weights, n: int) -> dict[str, Any]:
    """The model's config and the divisors of its RoPE frequencies, as plain data."""
    factors = weights.rope_factors(n)
    return as_data(weights.config) | {"rope_factors": None if factors is None else factors.tolist()}


class Routed:
    """The experts that the tokens went to, layer by layer."""

    def __init__(self) -> None:
        self.reached: dict[str, set[int]] = {}

    def __call__(self, name: str, chosen: Tensor) -> None:
        self.reached.setdefault(name, set()).update(chosen.flatten().tolist())

    def notes(self, config: ModelConfig) -> tuple[str, ...]:
        """That some experts were not reached: of those nothing was computed, so nothing is known."""
        n = config.experts.n_expert if config.experts else 0
        some = idle_experts((name, n - len(found), n) for name, found in self.reached.items())
        if not some:
            return ()
        return (
            english(
                "No token reaches some of the experts ({some}): their matrices were not read, so nothing is said of them. Trace a longer "
                "text.",
                some=some,
            ),
        )


class FirstOfBatch:
    """Hands on the only row of a batch of one: [1,T,channels] → [T,channels].  routed: sees the chosen experts, wanted or not."""

    def __init__(self, collect: Collector | Steps, routed: Routed) -> None:
        self.collect, self.routed = collect, routed

    def wants(self, name: str) -> bool:
        return self.collect.wants(name) or stem_of(name) == CHOSEN

    def __call__(self, name: str, x: Tensor, /) -> None:
        if stem_of(name) == CHOSEN:
            self.routed(name, x[0])
        if self.collect.wants(name):
            self.collect(name, x[0])
