"""What the fault benchmark runs on: model files, engines with faults planted, and the evidence that is left of a trace.

    files = make_files(folder)                        one for every model and type
    cases = sampled_cases(files, n, seed)             (engine, file, fault), causes that were planted least first
    trace = traced(case.run, case.planted)            what the faulty engine shows; without faults, the right one
    weak = KINDS["samples"](trace)                    what a log would hold of it

The engine "reference" is quantscope's own forward with ggml's arithmetic, and its faults are those of the catalogue itself: it shares their
definitions with the search, so its figures stand apart from those of the two engines that do not.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from benchmarks import numpy_engine, transformers_faults
from benchmarks.planted import Planted
from quantscope.compare import stats_of
from quantscope.diagnose.faults import FAULTS, Instance, instances
from quantscope.diagnose.setup import Edited, Setup, file_weights
from quantscope.diagnose.walk import Walker, walk
from quantscope.engines import Request
from quantscope.fingerprint import fingerprint_trace
from quantscope.model.ggml_arithmetic import GgmlArithmetic, StoredTensors
from quantscope.qtypes import QTYPES, KVType, QuantType
from quantscope.quants.integers import LAYOUTS
from quantscope.sources.resolve import open_source
from quantscope.trace import LAST, Evidence, Full, Origin, Sample, Stats, Trace, full_trace
from quantscope.weights import WeightProvider, Weights
from tests.hf_models import make_hf
from tests.models import STORIES, make_gguf
from tests.oracle.llama_quant import quantized_types

DEMO = Path(__file__).resolve().parents[1] / "quantscope" / "data" / "demo-f16.gguf"
TYPES = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q5_0", "Q4_1", "Q4_0")
NUMPY, TRANSFORMERS, REFERENCE = "numpy", "transformers", "reference"
ENGINES = (NUMPY, TRANSFORMERS, REFERENCE)
PLACES = 3  # of one catalogue row that the reference may have it at
SIZES = {"n_layer": 3, "n_embd": 256, "n_ff": 512, "dtype": "F16"}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Model:
    """make(path): writes the file or folder and returns its path.  engines: that can run it."""

    make: Callable[[Path], Path]
    types: tuple[str, ...] = TYPES  # the first is the one that is made, the others are quantized from it
    engines: tuple[str, ...] = ENGINES


def _huge_up(path: Path) -> Path:
    """A model whose feed-forward goes beyond float16."""
    up = np.random.default_rng(1).standard_normal((96, 64)).astype(np.float32) * 3e4
    return make_gguf(path, edit={"blk.1.ffn_up.weight": up})


def _hf_llama3(path: Path) -> Path:
    disable_progress_bar()
    make_hf(path, "llama", seed=3, rope_parameters=LLAMA3)
    return path


# Transformers takes a qwen3 GGUF with heads of 128 only, and no rope_freqs.weight
MODELS: dict[str, Model] = {
    "demo": Model(lambda to: DEMO),
    "stories260K": Model(lambda to: STORIES, ("F32", "Q8_0")),
    "llama-gqa": Model(lambda to: make_gguf(to, seed=11, **SIZES)),  # type: ignore[arg-type]
    "llama-mha-tied": Model(lambda to: make_gguf(to, n_head_kv=4, tied=True, seed=12, **SIZES)),  # type: ignore[arg-type]
    "llama-freqs": Model(lambda to: make_gguf(to, rope_freqs=range(1, 33), seed=13, **SIZES), engines=(NUMPY, REFERENCE)),  # type: ignore[arg-type]
    "qwen2": Model(lambda to: make_gguf(to, arch="qwen2", n_head=8, n_head_kv=2, seed=14, **SIZES)),  # type: ignore[arg-type]
    "qwen3": Model(lambda to: make_gguf(to, arch="qwen3", head_dim=128, tied=True, seed=15, **SIZES)),  # type: ignore[arg-type]
    "llama-huge": Model(_huge_up, ("F32",)),
    "hf-llama3": Model(_hf_llama3, ("F32",), (TRANSFORMERS, REFERENCE)),
}


@dataclass(frozen=True)
class File:
    """One model in one type."""

    model: str
    type: str
    path: Path

    @property
    def engines(self) -> tuple[str, ...]:
        return MODELS[self.model].engines


@dataclass(frozen=True)
class Run:
    """One engine on one file and these ids.  n_prompt: of a decoding, how many go through at once."""

    engine: str
    file: File
    ids: tuple[int, ...]
    n_prompt: int | None = None


@dataclass(frozen=True)
class Case:
    """A run with faults planted: one, or two at once."""

    run: Run
    planted: tuple[Planted, ...]

    @property
    def faults(self) -> str:
        return " + ".join(f"{p.cause} ({p.detail})" if p.detail else p.cause for p in self.planted)

    @property
    def title(self) -> str:
        return f"{self.run.engine}, {self.run.file.model}, {self.run.file.type}: {self.faults}"


def make_files(folder: Path, models: Sequence[str] = tuple(MODELS)) -> list[File]:
    """Every model in every type that llama.cpp quantizes it to."""
    files = []
    for name in models:
        model = MODELS[name]
        first = model.make(folder / f"{name}-{model.types[0]}.gguf")
        files.append(File(name, model.types[0], first))
        for preset in model.types[1:]:
            path = folder / f"{name}-{preset}.gguf"
            if quantized_types(first, path, preset) is None:
                raise RuntimeError(f"{first}: llama.cpp does not quantize it to {preset}")
            files.append(File(name, preset, path))
    return files


@lru_cache(maxsize=4)
def weights_of(path: Path) -> Weights:
    """The weights of a file, kept while its cases are run."""
    return Weights(open_source(path), keep=True)


def ids_of(file: File, n: int, rng: random.Random) -> tuple[int, ...]:
    """BOS and n − 1 ids of this vocabulary, all different where that is possible."""
    rest = range(3, weights_of(file.path).config.n_vocab)
    return (1, *rng.sample(rest, min(n - 1, len(rest))))


# ---- which cases -------------------------------------------------------------------------------------------------------------------


def sampled_cases(runs: Iterator[Run], n: int | None, seed: int, only: str = "", each: int = 3) -> list[Case]:
    """n cases, ``each`` faults of a run at most; None: all faults of all runs.  The causes planted least come first.

    only: part of the names of the faults that are wanted.
    """
    rng, seen, cases = random.Random(seed), Counter[tuple[str, str]](), list[Case]()
    for run in runs:
        possible = [p for p in plantable(run) if only in p.cause]
        rng.shuffle(possible)
        if n is not None:
            possible = sorted(possible, key=lambda p: seen[run.engine, p.cause])[: min(each, n - len(cases))]
        seen.update((run.engine, p.cause) for p in possible)
        cases += [Case(_decoding(run) if p.cause.startswith("cache-") else run, (p,)) for p in possible]
        if n is not None and len(cases) >= n:
            break
    return cases


def sampled_pairs(runs: Iterator[Run], n: int, seed: int) -> list[Case]:
    """n cases with two faults of different operations each; those of ids and of decoding are left to single cases."""
    rng, cases = random.Random(seed), list[Case]()
    for run in runs:
        if len(cases) >= n:
            break
        possible = [p for p in plantable(run) if p.cause != "bos-missing" and not p.cause.startswith("cache-")]
        a = rng.choice(possible)
        b = rng.choice([p for p in possible if p.cause != a.cause and not set(p.taps) & set(a.taps)])
        cases.append(Case(run, (a, b)))
    return cases


def shuffled_runs(files: Sequence[File], engines: Sequence[str], seed: int) -> Iterator[Run]:
    """Every engine on every file, engines in turn, files in random order; again with other prompts when all are done."""
    rng = random.Random(seed)
    orders = {engine: [f for f in files if engine in f.engines] for engine in engines}
    for order in orders.values():
        rng.shuffle(order)
    for k in range(max(map(len, orders.values()))):
        for engine, order in orders.items():
            if k < len(order):
                yield Run(engine, order[k], ids_of(order[k], rng.randint(6, 12), rng))


def _decoding(run: Run) -> Run:
    return replace(run, n_prompt=len(run.ids) // 2)


def plantable(run: Run) -> list[Planted]:
    """The faults that this engine can have on this file."""
    if run.engine == NUMPY:
        return numpy_engine.plantable(run.file.path)
    if run.engine == TRANSFORMERS:
        return transformers_faults.plantable(run.file.path)
    return _of_catalogue(run)


# ---- engines -----------------------------------------------------------------------------------------------------------------------


def traced(run: Run, planted: Sequence[Planted] = ()) -> Trace:
    """Every tap in whole tensors; of ids without BOS, the trace does not say which they were, as a log would not."""
    if run.engine == NUMPY:
        trace = numpy_engine.run(run.file.path, run.ids, planted, n_prompt=run.n_prompt)
    elif run.engine == TRANSFORMERS:
        trace = transformers_faults.run(run.file.path, run.ids, planted)
    else:
        trace = _reference(run, planted)
    if any(p.cause == "bos-missing" for p in planted):
        return Trace(replace(trace.origin, tokens=None), trace.taps)
    return trace


@lru_cache(maxsize=4)
def clean(run: Run) -> Trace:
    """What the engine shows without a fault."""
    return traced(run)


def taps_of(setup: Setup) -> dict[str, Tensor]:
    """All taps of a setup, [T,channels] or [H,T,S]."""
    taps: dict[str, Tensor] = {}
    base = replace(setup, times={})
    for step in walk(base, [Walker(setup)], lambda name: True):
        taps |= step[0]
    return {name: x[0] for name, x in taps.items()}


def setup_of(run: Run, **more: Any) -> Setup:
    return Setup(weights_of(run.file.path), torch.tensor([run.ids]), n_prompt=run.n_prompt, **more)


def _reference(run: Run, planted: Sequence[Planted]) -> Trace:
    setup = setup_of(run, arithmetic=_AsRead("F16"))
    for p in planted:
        changed = _instance(p).apply(setup)
        if changed is None:
            raise ValueError(f"{run.file.path}: {p.cause} ({p.detail}) changes nothing in this model")
        setup = changed
    origin = Origin("reference", arithmetic="ggml, F16 cache", model=run.file.path.name, tokens=run.ids)
    return full_trace(origin, taps_of(setup))


def _of_catalogue(run: Run) -> list[Planted]:
    setup = setup_of(run)
    limit = max(float(x.abs().max()) for name, x in taps_of(setup).items() if name.startswith("l_out-")) / 2
    by_row: dict[int, list[Instance]] = {}
    for instance in instances(_decoded_setup(setup), [limit]):
        if not instance.fault.name.startswith("layer-") or instance.place == "1":
            by_row.setdefault(id(instance.fault), []).append(instance)
    rng = random.Random(run.file.path.name)
    chosen = [i for row in by_row.values() for i in rng.sample(row, min(PLACES, len(row)))]
    return [Planted(i.fault.name, i.ops, (1,) if i.fault.name.startswith("layer-") else None, i.place) for i in chosen]


def _decoded_setup(setup: Setup) -> Setup:
    """The same as a decoding: faults of the cache are possible too."""
    return replace(setup, n_prompt=setup.ids.shape[1] // 2)


def _instance(planted: Planted) -> Instance:
    rows = [f for f in FAULTS if f.name == planted.cause]
    return Instance(next((f for f in rows if planted.detail in f.places), rows[0]), planted.detail)


class _AsRead(GgmlArithmetic):
    """ggml's arithmetic where weights may have been read wrongly: a matrix that is not the file's is multiplied in float32."""

    def layer(self, weights: WeightProvider, i: int, dtype: torch.dtype) -> StoredTensors:
        return _Read(weights.layer_names(i), weights.layer(i), weights)

    def top(self, weights: WeightProvider, dtype: torch.dtype) -> StoredTensors:
        return _Read(weights.top_names(), weights.top(), weights)


class _Read(StoredTensors):
    def __init__(self, names: Mapping[str, str], tensors: Mapping[str, Tensor], weights: WeightProvider) -> None:
        file = file_weights(weights)
        assert isinstance(file, Weights)
        super().__init__(names, tensors, file)
        self._file = file
        self._edited = isinstance(weights, Edited)

    def type_of(self, local: str) -> QuantType:
        kind = super().type_of(local)
        if self._edited and kind.name in LAYOUTS and not torch.equal(self[local], self._file.get(self._canonical[local])):
            return QTYPES["F32"]
        return kind


# ---- evidence ----------------------------------------------------------------------------------------------------------------------


def _each(trace: Trace, make: Callable[[str, Tensor], Evidence | None]) -> Trace:
    made = {tap: make(tap, piece.values) for tap, pieces in trace.taps.items() for piece in pieces if isinstance(piece, Full)}
    return Trace(trace.origin, {tap: (piece,) for tap, piece in made.items() if piece is not None})


def _ends(n: int) -> Tensor:
    """First three and last three of n."""
    return torch.tensor(sorted({*range(min(3, n)), *range(max(n - 3, 0), n)}))


def _printed(tap: str, x: Tensor) -> Evidence:
    """As llama-eval-callback prints it: the ends of every axis, four decimals."""
    index = torch.zeros(1, dtype=torch.int64)
    for n in x.shape:
        index = (index[:, None] * n + _ends(n)).flatten()
    return Sample(_rounded(x.flatten()[index], 4), index, tuple(x.shape), digits=4)


def _first_ten(tap: str, x: Tensor) -> Evidence | None:
    """As RusTorch prints it: the first ten channels of the last token, nine decimals."""
    if x.ndim != 2:
        return None
    values = x[-1, :10]
    return Sample(_rounded(values, 9), torch.arange(len(values)), (1, x.shape[1]), (LAST,), digits=9)


def _statistics(tap: str, x: Tensor) -> Evidence:
    """RMS, mean, min and max, six decimals."""
    values = {name: round(value, 6) if np.isfinite(value) else value for name, value in stats_of(x).items() if name != "sum"}
    return Stats(values, digits=dict.fromkeys(values, 6))


def _rounded(x: Tensor, digits: int) -> Tensor:
    rounded: Tensor = (x.double() * 10**digits).round() / 10**digits
    return rounded.float()


KINDS: dict[str, Callable[[Trace], Trace]] = {
    "full": lambda trace: trace,
    "fingerprints": fingerprint_trace,
    "samples": lambda trace: _each(trace, _printed),
    "first-ten": lambda trace: _each(trace, _first_ten),
    "statistics": lambda trace: _each(trace, _statistics),
}


# ---- clean comparisons -------------------------------------------------------------------------------------------------------------

LENGTHS = (1, 2, 3, 5, 8, 13, 21, 34, 64)


def clean_requests(files: Sequence[File], n: int, seed: int) -> list[tuple[File, Request]]:
    """n runs of the real engines: llama.cpp on every type with both caches and one or two threads, Transformers in both dtypes."""
    rng = random.Random(seed)
    made: list[tuple[File, Request]] = []
    ways: list[tuple[str, KVType, int | None, str]] = [("llama.cpp", kv, threads, "float32") for kv in ("F16", "F32") for threads in (1, 2)]
    ways += [("transformers", "F16", None, "float32"), ("transformers", "F16", None, "bfloat16")]
    order: list[tuple[File, tuple[str, KVType, int | None, str]]] = []
    while len(made) < n:
        if not order:
            order = [(f, way) for f in files for way in ways if (TRANSFORMERS if way[0] == TRANSFORMERS else NUMPY) in f.engines]
            rng.shuffle(order)
        file, (engine, kv, threads, dtype) = order.pop()
        ids = ids_of(file, rng.choice(LENGTHS), rng)
        made.append((file, Request(engine, str(file.path), ids, kv=kv, threads=threads, dtype=dtype)))  # type: ignore[arg-type]
    return made
