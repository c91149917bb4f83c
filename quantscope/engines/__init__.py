"""Who can produce a Trace: the table of engines, and what all of them are asked.

    run(Request("llama.cpp", model, tokens))  →  Trace

An engine is a function (request, collector) → Trace in a module of its own, imported when it is asked for.  ``isolated.py`` runs one in a
process of its own, so that an engine that dies takes nothing with it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

from quantscope.errors import MissingExtraError, UsageError
from quantscope.language import mark
from quantscope.qtypes import KVType

if TYPE_CHECKING:
    from quantscope.engines.collect import Collector
    from quantscope.trace import Trace

ArithmeticName: TypeAlias = Literal["exact", "ggml", "bf16"]
Dtype: TypeAlias = Literal["float32", "float64", "bfloat16"]


IN_STEPS = mark("Decoded token by token over the key/value cache.")


@dataclass(frozen=True)
class Request:
    """One run of one engine.  Options that an engine does not have are refused, not ignored."""

    engine: str  # a key of ENGINES
    model: str
    tokens: tuple[int, ...]
    arithmetic: ArithmeticName = "exact"  # of the reference
    dtype: Dtype = "float32"  # of the reference and of Transformers
    kv: KVType = "F16"  # type of llama.cpp's key/value cache, and of the emulated one
    threads: int | None = None  # of llama.cpp; None: all
    taps: str | None = None  # regular expression, searched in the names of the wanted taps; None: all taps
    fingerprint: bool = False  # keep 64 bytes a tap instead of its values
    predict: bool = False  # of the exact reference: also what ggml's arithmetic would change at each tap
    steps: bool = False  # token by token over the key/value cache, as in generating, instead of in one batch


@dataclass(frozen=True)
class Engine:
    """Where an engine's function is, the package it needs, and the options it has."""

    function: str  # "module:function"
    package: str | None = None  # imported by the function
    extra: str | None = None  # the extra of this project that installs it
    dtypes: tuple[str, ...] = ("float32",)
    arithmetics: tuple[str, ...] = ("exact",)


ENGINES: dict[str, Engine] = {
    "reference": Engine("reference:run", dtypes=("float32", "float64"), arithmetics=("exact", "ggml", "bf16")),
    "llama.cpp": Engine("llama_cpp:run", "llama_cpp", "llamacpp"),
    "transformers": Engine("transformers:run", "transformers", "transformers", dtypes=("float32", "bfloat16")),
}


class Function(Protocol):
    """What ``Engine.function`` names."""

    def __call__(self, request: Request, collect: Collector) -> Trace: ...


def run(request: Request) -> Trace:
    """The trace of one run, made in this process.

    Raises UsageError for options the engine does not have, MissingExtraError where its package is not installed, EngineError with the
    engine's own words when it refuses the model or fails, and what opening the model raises.
    """
    engine = check(request)
    made = _function(engine)(request, collector(request))
    return replace(made, origin=replace(made.origin, notes=(*made.origin.notes, IN_STEPS))) if request.steps else made


def check(request: Request) -> Engine:
    """The engine of a request; UsageError for one that does not exist or for an option it does not have."""
    engine = ENGINES.get(request.engine)
    if engine is None:
        raise UsageError(f"--engine {request.engine}: expected one of {', '.join(ENGINES)}.")
    for option, value, known in (("--dtype", request.dtype, engine.dtypes), ("--arithmetic", request.arithmetic, engine.arithmetics)):
        if value not in known:
            raise UsageError(f"{option} {value}: the engine {request.engine} has {', '.join(known)}. Leave the option out.")
    if request.taps is not None:
        try:
            re.compile(request.taps)
        except re.error as e:
            raise UsageError(f"--taps {request.taps!r} is no regular expression ({e}). Give one as in --taps 'l_out|result'.") from None
    return engine


def collector(request: Request) -> Collector:
    """What keeps the taps that the request wants, in the form it wants."""
    from quantscope.engines.collect import Collector, keep_fingerprint, keep_values

    pattern = re.compile(request.taps or "")
    return Collector(lambda name: pattern.search(name) is not None, keep_fingerprint if request.fingerprint else keep_values)


def _function(engine: Engine) -> Function:
    module, name = engine.function.split(":")
    try:
        function: Function = getattr(import_module(f"{__name__}.{module}"), name)
    except ImportError as e:
        if engine.package is None or (e.name or "").partition(".")[0] != engine.package:
            raise
        raise MissingExtraError(
            f"--engine needs the package {engine.package}, which is not installed. Install it with "
            f"`pip install 'quantscope[{engine.extra}]'`."
        ) from None
    return function


def model_name(model: str) -> str:
    """How a trace names a model: the last part of its path."""
    return Path(model).resolve().name
