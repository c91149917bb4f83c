"""The functions of ``import quantscope``: what the command line does, as Python calls that return results.

Options have the names and defaults of the commands; what a command refuses raises the same QuantscopeError.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Literal, TypeAlias

from quantscope.api.model import Model
from quantscope.api.results import Comparison, Diagnosis, Study, WeightComparison, shown
from quantscope.compare import compare as compare_traces
from quantscope.diagnose.convictions import replayed
from quantscope.diagnose.run import diagnose as run_diagnosis
from quantscope.engines import ArithmeticName, Dtype, Request
from quantscope.engines.isolated import run_to_file
from quantscope.errors import UsageError
from quantscope.explain import rotation
from quantscope.inputs import prompt_ids
from quantscope.monitor import SILENT, Monitor
from quantscope.qtypes import KVType
from quantscope.report.study_json import load
from quantscope.results import DEFAULT_MEMORY, DEFAULT_TYPES, StudyOptions
from quantscope.sources.resolve import open_source
from quantscope.study import run_study
from quantscope.three_way import asked_split
from quantscope.trace import Trace
from quantscope.trace_file import load as load_trace
from quantscope.weight_compare import compare_weights
from quantscope.weights import Weights

__all__ = [
    "Comparison",
    "Diagnosis",
    "Model",
    "Study",
    "WeightComparison",
    "compare",
    "diagnose",
    "load_study",
    "open",
    "study",
    "trace",
    "weights",
]

PathLike: TypeAlias = str | os.PathLike[str]


def open(path: PathLike) -> Model:
    """A model file to look at: ``quantscope inspect``.

    path: a GGUF file or a Hugging Face folder; nothing but the header is read.  Close it, or use it in a ``with`` statement.
    Raises a ModelFileError for what is no model.
    """
    return Model(open_source(os.fspath(path), allow_truncated=True))


def study(
    *models: PathLike,
    types: Sequence[str] | None = None,
    kv: Sequence[str] = (),
    ref: PathLike | None = None,
    prompt: str | None = None,
    tokens: Sequence[int] | None = None,
    text: PathLike | None = None,
    ctx: int = 512,
    chunks: int | None = None,
    scoring: Literal["llama.cpp", "all"] = "llama.cpp",
    until_ci: float | None = None,
    positions: Literal["all", "last"] = "all",
    memory: int = DEFAULT_MEMORY,
    device: Literal["cpu", "cuda"] = "cpu",
    dtype: Literal["float32", "float64"] = "float32",
    engines: Sequence[str] = (),
    ray: str | None = None,
    base: PathLike | None = None,
    out: PathLike | None = None,
    monitor: Monitor | None = None,
) -> Study:
    """Variants of a model side by side: ``quantscope study``.

    models, types: one model and ``types`` (presets or tensor types; Q4_0, Q4_K_M, Q5_K_M, Q6_K and Q8_0 unless said otherwise) are
    quantized in memory; several models, or one and ``ref``, are compared as they are.  kv: types of a key/value cache ("q8_0", "q4_0", or
    "q8_0/q4_0" for keys and values); each variant also with keys and values rounded to them, and no ``types`` unless given.
    prompt or tokens: what the layer tables and the next token are computed on.  text: a UTF-8 file for KL divergence [nats] and
    perplexity, in ``chunks`` chunks of ``ctx`` tokens; until_ci=0.05 stops when every mean KL is known to 5 % of itself.
    memory: bound in bytes.  engines: "llama.cpp", "transformers", run on each file.  base: a file of ``quantscope kld-base``.
    out: a folder that keeps finished batches of a text, so that the same call goes on after an interruption.  monitor: told each step.
    Raises UsageError for options that contradict each other, and a QuantscopeError for models, texts and prompts that cannot be used.
    """
    paths = tuple(os.fspath(m) for m in models)
    alone = len(paths) == 1 and ref is None and not engines and base is None and not kv
    options = StudyOptions(
        models=paths,
        types=tuple(types) if types is not None else DEFAULT_TYPES if alone else (),
        kv=tuple(kv),
        ref=None if ref is None else os.fspath(ref),
        prompt=prompt,
        tokens=None if tokens is None else tuple(tokens),
        text=None if text is None else Path(text),
        n_ctx=ctx,
        n_chunks=chunks,
        positions=positions,
        scoring=scoring,
        until_ci=until_ci,
        memory_bytes=memory,
        base=None if base is None else Path(base),
        device=device,
        dtype=dtype,
        engines=tuple(engines),
        ray=ray,
    )
    return shown(Study, run_study(options, monitor or SILENT, None if out is None or text is None else Path(out)))


def load_study(path: PathLike) -> Study:
    """A finished study: its folder, or its study.json.  Raises MissingFileError, CorruptFileError, UnsupportedVersionError."""
    return shown(Study, load(Path(path)))


def trace(
    model: PathLike,
    engine: Literal["reference", "llama.cpp", "transformers"] = "reference",
    *,
    prompt: str | None = None,
    tokens: Sequence[int] | None = None,
    arithmetic: ArithmeticName = "exact",
    dtype: Dtype = "float32",
    kv: KVType = "F16",
    taps: str | None = None,
    steps: bool = False,
    out: PathLike | None = None,
) -> Trace:
    """What an engine shows at every tap: ``quantscope trace``.

    prompt or tokens: what it runs ("Once upon a time" unless said otherwise).  taps: a regular expression, searched in their names.
    out: where the trace file stays.  ``trace.find("l_out-3", Full).values`` is a float32 tensor [T, n_embd].
    Raises EngineError with the engine's own words when it fails, MissingExtraError where it is not installed.
    """
    ids = _ids(os.fspath(model), prompt, tokens)
    request = Request(engine, os.fspath(model), ids, arithmetic, dtype, kv, taps=taps, predict=True, steps=steps)
    if out is not None:
        return run_to_file(request, Path(out))
    with tempfile.TemporaryDirectory() as folder:
        return run_to_file(request, Path(folder) / "trace.safetensors")


def compare(
    ref: Trace | PathLike,
    test: Trace | PathLike,
    *,
    predicted: Trace | PathLike | None = None,
    original: Trace | PathLike | None = None,
    model: PathLike | None = None,
    floor: float | None = None,
    same_file: bool = True,
) -> Comparison:
    """Two traces of the same tokens tap by tap, and where they part first: ``quantscope compare``.

    predicted: a trace of the emulated arithmetic, whose error times 4 is the floor of each tap; floor: one NMSE for all taps instead.
    original: a trace of the unquantized model, adds the three-way split.  model: the file both ran, adds the local replay of ``test``.
    Raises TraceMismatchError for other tokens or files (same_file=False: for other tokens only), TraceContentError.
    """
    if floor is not None and predicted is not None:
        raise UsageError("floor and predicted both give the floor, expected one of them. Leave one out.")
    a, b = _trace(ref), _trace(test)
    emulated, before = (None if t is None else _trace(t) for t in (predicted, original))
    c = compare_traces(a, b, predicted=emulated, floor=floor, same_file=same_file)
    again = None if model is None else replayed(b, os.fspath(model))
    return shown(Comparison, c, rotation=rotation(a, b, c), split=asked_split(a, b, before, emulated), replay=again)


def diagnose(
    model: PathLike,
    against: Trace | PathLike,
    *,
    original: PathLike | None = None,
    prompt: str | None = None,
    tokens: Sequence[int] | None = None,
    first_batch: int | None = None,
    kv: KVType = "F16",
    dtype: Dtype = "float32",
    threads: int | None = None,
    probes: bool = True,
) -> Diagnosis:
    """Is it the quantization, the engine, the file or the prompt? ``quantscope diagnose``.

    against: "llama.cpp" or "transformers", which is run on the prompt (or tokens) and on probes; or a trace, or its file, of any engine.
    original: the unquantized model, adds the effect of the quantization.
    Raises UsageError for options that contradict each other, and what running the engine, opening the files and comparing raise.
    """
    found = run_diagnosis(
        os.fspath(model),
        against if isinstance(against, Trace) else os.fspath(against),
        original=None if original is None else os.fspath(original),
        prompt=prompt,
        tokens=tokens,
        first_batch=first_batch,
        kv=kv,
        dtype=dtype,
        threads=threads,
        probes=probes,
    )
    return shown(Diagnosis, found)


def weights(a: PathLike, b: PathLike) -> WeightComparison:
    """The same tensors in two files, and what differs beyond their types: ``quantscope weights``.  a: the one to believe."""
    with closing(open_source(os.fspath(a))) as left, closing(open_source(os.fspath(b))) as right:
        return shown(WeightComparison, compare_weights(Weights(left), Weights(right)))


def _ids(model: str, prompt: str | None, tokens: Sequence[int] | None) -> tuple[int, ...]:
    if prompt is not None and tokens is not None:
        raise UsageError("prompt and tokens both say what to run, expected one of them. Leave one out.")
    return tuple(prompt_ids(model, prompt) if tokens is None else tokens)


def _trace(given: Trace | PathLike) -> Trace:
    return given if isinstance(given, Trace) else load_trace(Path(given))
