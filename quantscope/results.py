"""What a study asks for and what it found: plain frozen data, and its JSON form (docs/study-json.md).

Nothing is computed here.  ``Study.to_json`` gives the content of study.json, ``Study.from_json`` reads it back, losslessly:
JSON has no NaN and no infinity, so such a number becomes ``null`` and its JSON Pointer and value are listed under ``non_finite``.
"""

from __future__ import annotations

import dataclasses
import math
import types
from dataclasses import dataclass, field, replace
from itertools import pairwise, repeat
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from quantscope.errors import CorruptFileError, UnsupportedVersionError
from quantscope.language import say
from quantscope.phrases import count, size

STUDY_VERSION = 1
DEFAULT_TYPES = ("Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
DEFAULT_PROMPT = "Once upon a time"
DEFAULT_MEMORY = 4 * 10**9  # [bytes]


@dataclass(frozen=True)
class StudyOptions:
    """What to study.  One model and ``types``: quantized in memory.  Several models: each file is a variant as it is."""

    models: tuple[str, ...]
    types: tuple[str, ...] = ()  # presets or tensor types; empty: the files as they are
    kv: tuple[str, ...] = ()  # types of a key/value cache: each variant also with keys and values rounded to each of them
    ref: str | None = None  # the original, when it is not models[0]
    prompt: str | None = None
    tokens: tuple[int, ...] | None = None
    text: Path | None = None  # UTF-8 file for KL divergence and perplexity
    n_ctx: int = 512  # [tokens] per chunk of the text
    n_chunks: int | None = None  # None: all of the text
    positions: Literal["all", "last"] = "all"
    scoring: Literal["llama.cpp", "all"] = "llama.cpp"  # the second half of each chunk, as llama-perplexity does, or all of it
    until_ci: float | None = None  # stop when every mean KL is known to this relative half-width of its 95 % interval
    memory_bytes: int = DEFAULT_MEMORY  # what the process may use, all in all
    base: Path | None = None  # llama-perplexity's file of log-probabilities of the text, in place of an original
    device: str = "cpu"
    dtype: Literal["float32", "float64"] = "float32"
    engines: tuple[str, ...] = ()  # other engines to run on each file, and to compare with the reference
    ray: str | None = None  # address of a Ray cluster that computes the batches; None: this process does


@dataclass(frozen=True)
class Generated:
    """One greedily generated token; ``rank`` 1 is the largest logit."""

    text: str
    id: int
    logit: float | None
    rank: int | None  # among this variant's own logits
    rank_in_original: int | None = None  # among the original's logits for the same context; None without an original
    prob: float | None = None


@dataclass(frozen=True)
class Flag:
    """A cell that stands out: its |mean|/RMS is ``times`` the median of the same cell in the other variants."""

    cell: str  # name of the LayerRow field, "swiglu_mean"
    mean_to_rms: float  # |mean| / RMS of this cell
    median_of_others: float
    times: float  # mean_to_rms / median_of_others; inf where the median is 0
    n_others: int


@dataclass(frozen=True)
class LayerRow:
    """One layer of one variant.  RMS and mean over all positions and channels of the tap, as in DESIGN's table quantities."""

    layer: int
    input_rms: float
    output_rms: float
    mean: float  # of the layer's output
    rms_growth: float | None = None  # output_rms / output_rms of the first layer
    swiglu_rms: float | None = None
    swiglu_mean: float | None = None
    nmse: float | None = None  # of the layer's output against the original's; None without an original, and for the original
    sqnr_db: float | None = None  # inf where identical
    cos_sim: float | None = None
    flags: tuple[Flag, ...] = ()


@dataclass(frozen=True)
class OpRow:
    """One tap of one variant over the whole text: all chunks, positions and channels (definitions: ``tap_stats``)."""

    tap: str  # without its layer: "ffn_swiglu"
    layer: int | None  # None: a tap outside the layers
    n: int  # values
    mean: float
    rms: float
    std: float
    min: float
    max: float
    abs_max: float  # largest |x|
    abs_max_chunk: int | None  # where: number of the chunk in the text, ...
    abs_max_position: int | None  # ... of the token in the chunk, ...
    abs_max_channel: int | None
    nmse: float | None = None  # against the original's; None without an original, and for the original
    sqnr_db: float | None = None  # inf where identical
    cos_sim: float | None = None
    outlier_share: float | None = None  # of the channels, mean over the chunks
    n_massive: int = 0  # massive activations
    massive_max: float | None = None  # |x| of the largest, None where there is none
    massive_chunk: int | None = None
    massive_position: int | None = None
    massive_channel: int | None = None
    n_non_finite: int = 0
    n_chunks: int = 0
    rms_spread: float | None = None  # standard deviation over the chunks; None for fewer than two
    mean_spread: float | None = None
    nmse_spread: float | None = None
    outlier_share_spread: float | None = None


@dataclass(frozen=True)
class Histogram:
    """How many values are in each bin of their decimal logarithm.

    Bin i holds 10^(low + i/per_decade) ≤ value < 10^(low + (i + 1)/per_decade).  Every value is counted once, somewhere.
    """

    low: float
    per_decade: int
    counts: tuple[int, ...]
    below: int  # smaller values, 0 and negative ones among them
    above: int  # larger values, infinite ones among them
    nan: int = 0


@dataclass(frozen=True)
class LogitStats:
    """Logits of a variant against the original's, over ``n_positions`` positions: what llama-perplexity prints, and an interval.

    _se: standard error of the mean, taking positions as independent (as llama-perplexity does).  Percentiles p999 … p001: of the values
    over the positions, 99.9 % … 0.1 %.  Δp: change of the probability of the token that follows, variant − original.
    """

    n_positions: int
    kl_nats: float | None = None  # mean KL(original ‖ variant); None for the original and without one
    kl_nats_se: float | None = None
    kl_nats_low: float | None = None  # 95 % interval of the mean from the chunks' means; None with fewer than 2 chunks
    kl_nats_high: float | None = None
    kl_nats_max: float | None = None
    kl_nats_p999: float | None = None
    kl_nats_p99: float | None = None
    kl_nats_p95: float | None = None
    kl_nats_p90: float | None = None
    kl_nats_median: float | None = None
    kl_nats_p10: float | None = None
    kl_nats_p05: float | None = None
    kl_nats_p01: float | None = None
    kl_nats_p001: float | None = None
    kl_nats_min: float | None = None
    top1_agree: float | None = None  # fraction of positions with the same top token
    top1_agree_se: float | None = None
    rms_dp: float | None = None  # RMS Δp
    rms_dp_se: float | None = None
    dp_mean: float | None = None
    dp_mean_se: float | None = None
    dp_max: float | None = None
    dp_p999: float | None = None
    dp_p99: float | None = None
    dp_p95: float | None = None
    dp_p90: float | None = None
    dp_p75: float | None = None
    dp_median: float | None = None
    dp_p25: float | None = None
    dp_p10: float | None = None
    dp_p05: float | None = None
    dp_p01: float | None = None
    dp_p001: float | None = None
    dp_min: float | None = None
    ppl: float | None = None  # perplexity; None without a text
    ppl_se: float | None = None
    ln_ppl_ratio: float | None = None  # ln(ppl / ppl of the original), paired by position
    ln_ppl_ratio_se: float | None = None
    ppl_ratio: float | None = None  # ppl / ppl of the original
    ppl_ratio_se: float | None = None
    ppl_diff: float | None = None  # ppl − ppl of the original
    ppl_diff_se: float | None = None
    ln_ppl_cor: float | None = None  # correlation of −ln p(next token) with the original's
    kl_histogram: Histogram | None = None  # of the KL divergence [nats] of each position


@dataclass(frozen=True)
class Paired:
    """Two variants on the same positions: the mean difference of their KL divergences, a − b, with a 95 % interval."""

    a: str
    b: str
    mean_nats: float
    low_nats: float
    high_nats: float
    unit: Literal["chunk", "position"]  # what was taken as independent
    n_units: int
    better: str | None  # the variant with the smaller KL; None where the interval holds 0: they are not told apart

    def beginning_with(self, name: str) -> Paired:
        """The same comparison with ``name`` as a."""
        if name == self.a:
            return self
        return replace(self, a=self.b, b=self.a, mean_nats=-self.mean_nats, low_nats=-self.high_nats, high_nats=-self.low_nats)


@dataclass(frozen=True)
class RoutingRow:
    """Where one layer of a mixture of experts sends the tokens of the whole input."""

    layer: int
    n_expert: int
    n_idle: int  # experts that no token reaches: nothing is known of them
    rerouted: float | None = None  # share of the tokens that go through other experts than in the original


@dataclass(frozen=True)
class Variant:
    """One set of weights that went through the model; the original is a variant too."""

    name: str
    types: dict[str, str]  # tensor name → type; empty when unknown
    file_bytes: int | None  # measured, or computed for a variant that was quantized in memory
    bpw: float | None  # bits per weight, over all tensors
    generated: tuple[Generated, ...] = ()
    layers: tuple[LayerRow, ...] = ()
    logits: LogitStats | None = None
    path: str | None = None  # None: quantized in memory
    ops: tuple[OpRow, ...] = ()  # every tap over the whole text, in graph order
    kv: str | None = None  # types of the key/value cache that keys and values were rounded to; None: they are exact
    kv_bytes: int | None = None  # of that cache, for one token
    routing: tuple[RoutingRow, ...] = ()  # of every layer with experts, over the whole text

    @property
    def footprint(self) -> tuple[int, float]:
        """What variants are ordered by in size: the file, of equal ones the key/value cache; without one it is the largest."""
        return self.file_bytes or 0, math.inf if self.kv_bytes is None else self.kv_bytes

    def type_counts(self) -> dict[str, int]:
        """Tensors per type, most frequent first."""
        names = list(self.types.values())
        return {t: names.count(t) for t in sorted(set(names), key=lambda t: (-names.count(t), t))}


@dataclass(frozen=True)
class PromptInfo:
    """What the layer tables and the generated tokens were computed on."""

    text: str | None  # None when token ids were given
    ids: tuple[int, ...]
    positions: Literal["all", "last"] = "all"
    pieces: tuple[str, ...] = ()  # the text of each id


@dataclass(frozen=True)
class TextInfo:
    """What KL divergence and perplexity were computed on."""

    path: str
    n_tokens: int
    n_ctx: int
    n_chunks: int
    n_scored: int
    scoring: Literal["llama.cpp", "all"] = "llama.cpp"  # the positions that count: n_ctx/2 … n_ctx − 2 of each chunk, or all but the last
    n_chunks_given: int | None = None  # more than n_chunks when the study stopped early, its means being known well enough


@dataclass(frozen=True)
class ModelInfo:
    """What the studied model is."""

    name: str
    arch: str
    n_layer: int
    n_embd: int
    n_vocab: int
    n_params: int
    activation: str = "SwiGLU"  # of the feed-forward
    activation_formula: str = "silu(gate)·up"


@dataclass(frozen=True)
class PlanInfo:
    """How much of an input went through the model at a time, and the memory that was planned for it."""

    n_batches: int
    chunks_per_batch: int  # whose hidden states are in memory together; the weights are read once per batch
    chunks_per_slice: int  # through a layer at a time
    positions_per_slice: int  # through the head at a time
    ids_per_slice: int  # of the vocabulary at a time
    planned_bytes: int  # the most that should be in use
    memory_bytes: int  # the bound

    def sentence(self, n_ctx: int) -> str:
        return say(
            "{batches} of {chunks} of {n_ctx} tokens, {slice} at a time through a layer, logits of {positions} × {ids} ids at a time; "
            "about {planned} of memory planned (bound: {bound})",
            batches=count(self.n_batches, "batch", "batches"),
            chunks=count(self.chunks_per_batch, "chunk"),
            n_ctx=f"{n_ctx:,}",
            slice=count(self.chunks_per_slice, "chunk"),
            positions=count(self.positions_per_slice, "position"),
            ids=f"{self.ids_per_slice:,}",
            planned=size(self.planned_bytes),
            bound=size(self.memory_bytes),
        )


@dataclass(frozen=True)
class NumericalFloor:
    """What rounding alone does: KL(float64 arithmetic ‖ float32 arithmetic) of the original, on a few tokens of the same input."""

    kl_nats: float  # mean
    kl_nats_max: float
    n_positions: int
    layer_nmse: tuple[float, ...] = ()  # of each layer's output, float32 against float64


@dataclass(frozen=True)
class Interrupted:
    """How far a study had come that was not finished."""

    stage: str  # "prompt" or "text"
    n_done: int  # batches of it
    n_batches: int


@dataclass(frozen=True)
class BaseInfo:
    """The file that the original's distributions come from, and what its 16 bits leave of them."""

    path: str
    sha256: str
    n_chunks: int  # in the file; the text's that were run may be fewer
    step_nats: float  # the largest between neighbouring log-probabilities: one is off by half of it at most
    missing: float  # mean probability of the tokens too improbable for it, more than 16 nats below: they are in no KL divergence


@dataclass(frozen=True)
class Finding:
    """One sentence (or a few) with the numbers it rests on."""

    id: str
    text: str
    evidence: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EngineRow:
    """NMSE at one tap of an engine's run."""

    tap: str  # "l_out-3", "result_output"
    quantization: float | None  # the original, exact → this file, exact; None without an original
    engine: float  # this file, exact → the engine on it
    predicted: float | None  # this file, exact → the engine's arithmetic, emulated; None where nothing but the order of sums is expected


@dataclass(frozen=True)
class EngineRun:
    """One engine on one file and the study's prompt."""

    variant: str
    engine: str
    engine_version: str | None = None
    agrees: bool | None = None  # every tap within the floor that its arithmetic predicts; None when it failed
    answer: str | None = None  # where it parts from the reference, or that it does not
    failure: str | None = None  # in the engine's own words
    rows: tuple[EngineRow, ...] = ()  # layer outputs and logits
    ops: tuple[EngineRow, ...] = ()  # every tap, in the order of the graph


@dataclass(frozen=True)
class TopTokens:
    """The tokens that matter where the generated token was chosen, in falling order of the original's logit (the first variant's without).

    Its 20 most probable tokens and every variant's own 5, at most 40.  Variant name → one number per token.
    """

    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    logits: dict[str, tuple[float, ...]]
    probs: dict[str, tuple[float, ...]]  # softmax over the whole vocabulary
    ranks: dict[str, tuple[int, ...]]  # 1 is the largest logit, equal ones are ordered by id


@dataclass(frozen=True)
class Passage:
    """The first scored positions of the text (of the prompt where there is no text), token by token.

    ``ids`` are the tokens *at* the positions: what is compared there is the distribution of the token that comes after, ``next``.
    """

    n_positions: int  # scored in the whole text; the lists may hold fewer
    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    chunk: tuple[int, ...]  # of the text, from 0
    position: tuple[int, ...]  # in the chunk, from 0
    next: tuple[str | None, ...]  # piece of the token that really follows; None after the last token of a prompt
    kl_nats: dict[str, tuple[float, ...]]  # KL(original ‖ variant); empty without an original
    top: dict[str, tuple[tuple[tuple[str, float], ...], ...]]  # most probable tokens: piece, probability; of the original, too


@dataclass(frozen=True)
class Study:
    """Everything one study found; ``original`` names the variant the others are compared with, None when there is none."""

    version: int
    original: str | None
    variants: tuple[Variant, ...]
    findings: tuple[Finding, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)
    model: ModelInfo | None = None
    prompt: PromptInfo | None = None
    text: TextInfo | None = None
    notes: tuple[str, ...] = ()  # what was left out or approximated, one line each: nothing is silent
    plan: PlanInfo | None = None  # of the text, or of the prompt where there is no text
    floor: NumericalFloor | None = None  # None without an original, and for float64 arithmetic
    paired: tuple[Paired, ...] = ()  # every two variants
    engines: tuple[EngineRun, ...] = ()  # of other engines on the files, where asked for
    base: BaseInfo | None = None  # where the original is a file of log-probabilities; then nothing else is known of it
    interrupted: Interrupted | None = None  # None: all of the study is here
    top: TopTokens | None = None
    passage: Passage | None = None

    def neighbours(self) -> tuple[Paired, ...]:
        """The comparisons of neighbours in the order of their KL divergence, from the original on: b is the one farther away."""
        known = {v.name: v.logits.kl_nats for v in self.quantized if v.logits and v.logits.kl_nats is not None}
        order = sorted(known, key=lambda name: math.inf if math.isnan(known[name]) else known[name])
        found = {frozenset((p.a, p.b)): p for p in self.paired}
        two = ((b, found.get(frozenset((a, b)))) for a, b in pairwise(order))
        return tuple(p.beginning_with(b) for b, p in two if p is not None)

    @property
    def activation(self) -> str:
        """The name of what ``swiglu_rms`` and ``swiglu_mean`` are of."""
        return self.model.activation if self.model else "SwiGLU"

    def variant(self, name: str) -> Variant:
        return next(v for v in self.variants if v.name == name)

    @property
    def reference(self) -> Variant | None:
        """The original's own results."""
        return None if self.original is None else self.variant(self.original)

    @property
    def quantized(self) -> tuple[Variant, ...]:
        """Every variant but the original."""
        return tuple(v for v in self.variants if v.name != self.original)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready content of study.json; NaN and ±inf become null and are listed under ``non_finite``."""
        found: dict[str, str] = {}
        data = _finite(dataclasses.asdict(self), "", found)
        assert isinstance(data, dict)
        return data | {"non_finite": found}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Study:
        """The study a study.json holds; unknown fields are ignored, as fields may be added within a version.

        Raises UnsupportedVersionError for another version, CorruptFileError for content that is not a study.
        """
        version = data.get("version") if isinstance(data, dict) else None
        if version != STUDY_VERSION:
            raise UnsupportedVersionError(
                f"study.json: expected version {STUDY_VERSION}, found {version!r}. It was probably written by another version "
                f"of quantscope: run `quantscope study` again, or install the version that wrote it."
            )
        try:
            study = _build(cls, _restored(data))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as e:
            raise CorruptFileError(
                f"study.json: expected the fields described in docs/study-json.md, but {type(e).__name__}: {e}. "
                f"The file was probably edited or cut short: run `quantscope study` again."
            ) from e
        assert isinstance(study, cls)
        return study


def _finite(value: Any, path: str, found: dict[str, str]) -> Any:
    """A copy of plain data without NaN and ±inf; those are noted in ``found`` as path → "nan", "inf" or "-inf"."""
    if isinstance(value, float) and not math.isfinite(value):
        found[path] = str(value)
        return None
    if isinstance(value, dict):
        return {k: _finite(v, _below(path, k), found) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v, f"{path}/{i}", found) for i, v in enumerate(value)]
    return value


def _below(path: str, key: object) -> str:
    """The JSON Pointer (RFC 6901) of a member."""
    return f"{path}/{str(key).replace('~', '~0').replace('/', '~1')}"


def _restored(data: dict[str, Any]) -> dict[str, Any]:
    """The inverse of ``_finite``: a copy with the listed numbers put back."""

    def copied(value: Any, path: str) -> Any:
        if value is None and path in found:
            return float(found[path])
        if isinstance(value, dict):
            return {k: copied(v, _below(path, k)) for k, v in value.items()}
        if isinstance(value, list):
            return [copied(v, f"{path}/{i}") for i, v in enumerate(value)]
        return value

    found: dict[str, str] = data.get("non_finite", {})
    out = copied(data, "")
    assert isinstance(out, dict)
    return out


def _build(kind: Any, value: Any) -> Any:
    """An instance of a type hint made of the dataclasses above from plain JSON data."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = get_type_hints(kind)
        known = {f.name: _build(hints[f.name], value[f.name]) for f in dataclasses.fields(kind) if f.name in value}
        return kind(**known)
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return None if value is None else _build(next(a for a in args if a is not type(None)), value)
    if origin is tuple:
        kinds = repeat(args[0], len(value)) if args[-1] is Ellipsis else args
        return tuple(_build(k, v) for k, v in zip(kinds, value, strict=True))
    if origin is dict and args[1] is not Any:
        return {k: _build(args[1], v) for k, v in value.items()}
    if kind is float:
        return float(value)
    return value
