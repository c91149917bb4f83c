"""Which variants a study compares: files as they are, or one file in several quantizations; and how large each of them is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from quantscope.errors import ShapeError, UsageError, VocabularyError
from quantscope.images import Images, Requantized
from quantscope.language import english
from quantscope.lockstep import Member
from quantscope.model.cache import CachedArithmetic, CacheTypes, check_cache, held_by, parse_cache
from quantscope.plan import Types, plan_of
from quantscope.qtypes import QuantType
from quantscope.recipes import ModelFacts, TensorShape, assign_types, facts_from_gguf, preset_name
from quantscope.results import PlanInfo, StudyOptions
from quantscope.sources.base import Source
from quantscope.sources.resolve import open_source
from quantscope.weights import Weights

UNQUANTIZED = {"F64", "F32", "F16", "BF16"}
TOKENS = "tokenizer.ggml.tokens"


@dataclass(frozen=True)
class Candidate:
    """A member of the walk with the types and the size of its tensors."""

    member: Member
    types: dict[str, QuantType]  # canonical name → type
    file_bytes: int  # measured, or computed for a variant quantized in memory
    bpw: float
    path: str | None  # None: quantized in memory
    source: Source
    kv: CacheTypes | None = None  # of the key/value cache; None: there is none, keys and values are exact


@dataclass(frozen=True)
class Lineup:
    """All candidates in the order of the tables; the first is the original if ``has_original``."""

    candidates: tuple[Candidate, ...]
    has_original: bool
    first: Weights  # config and vocabulary come from here
    notes: tuple[str, ...]

    @property
    def members(self) -> list[Member]:
        return [c.member for c in self.candidates]


def lineup_plan(
    lineup: Lineup, ids: Tensor, n_scored: int, options: StudyOptions, types: Sequence[Types] | None = None, **sizes: int
) -> PlanInfo:
    """The plan for ids [C,T] in a line-up's first file.  types: how each variant holds the tensors; None: the file alone, as it is."""
    stored = lineup.candidates[0].types
    if options.dtype == "float64":
        sizes["bytes_per_value"] = 8
    return plan_of(lineup.first, ids, n_scored, stored, [stored] if types is None else types, options.memory_bytes, **sizes)


def line_up(options: StudyOptions) -> Lineup:
    """Open the files and decide who is compared with whom.

    Raises UsageError for contradicting options, ShapeError when the files are not of one model, and what opening them raises.
    """
    if not options.models:
        raise UsageError("no model given, expected at least one GGUF file or Hugging Face folder: `quantscope study MODEL.gguf`.")
    if options.types and len(options.models) > 1:
        raise UsageError(
            f"`--types` quantizes one model in memory, but {len(options.models)} models were given. Give one model with `--types`, or "
            f"several models without it: each file is then a variant as it is."
        )
    if options.base and options.ref:
        raise UsageError(
            "`--kl-divergence-base` and `--ref` both say what the models are compared with, expected one of them. Give the --ref model as "
            "one more MODEL to see it beside the base."
        )
    files = {path: Weights(open_source(path), device=options.device) for path in _paths(options)}
    _same_model(files)
    names = _names(list(files))
    original = None if options.base else _original(options, files)
    notes = _notes(files, original is None and not options.base, bool(options.types))
    order = sorted(files, key=lambda p: p != original)  # stable: the original first
    dtype = getattr(torch, options.dtype)
    candidates = [_file_candidate(files[p], names[p], p, dtype) for p in order]
    if options.types:
        images = Images(files[order[0]])
        whole = candidates[0]
        candidates = [
            _shared(whole, images),
            *(_quantized(images, whole, preset) for preset in dict.fromkeys(map(str.upper, options.types))),
        ]
    caches = _caches(options, files[order[0]])
    candidates = [c for weights in candidates for c in (weights, *(_cached(weights, cache) for cache in caches))]
    return Lineup(tuple(candidates), original is not None, files[order[0]], tuple(notes))


def _caches(options: StudyOptions, weights: Weights) -> list[CacheTypes]:
    caches = list(dict.fromkeys(map(parse_cache, options.kv)))
    for types in caches:
        check_cache(types, held_by(weights))
    return caches


def _cached(c: Candidate, types: CacheTypes) -> Candidate:
    """The same weights with keys and values from a cache of these types."""
    member = replace(
        c.member, name=f"{c.member.name} kv={types.name}", arithmetic=CachedArithmetic(types, turns=not held_by(c.member.weights).shared)
    )
    return replace(c, member=member, kv=types)


def _paths(options: StudyOptions) -> list[str]:
    return list(dict.fromkeys([*([options.ref] if options.ref else []), *options.models]))


def _original(options: StudyOptions, files: dict[str, Weights]) -> str | None:
    """``--ref``, or the only model, or the only unquantized one; None when none stands out."""
    if options.ref:
        return options.ref
    if len(files) == 1:
        return next(iter(files))
    plain = [path for path, w in files.items() if _unquantized(w)]
    return plain[0] if len(plain) == 1 else None


def _unquantized(weights: Weights) -> bool:
    if weights.source.packing is not None:
        return False
    return all(weights.stored(name).qtype.name in UNQUANTIZED for name in weights.stored_names())


def _notes(files: dict[str, Weights], uncompared: bool, quantizing: bool) -> list[str]:
    notes = []
    if uncompared:
        notes.append(
            english("No original: no file is the only unquantized one, so errors and KL divergence are missing. Name it with `--ref`.")
        )
    for path, w in files.items():
        if w.source.packing is not None:
            notes.append(
                english(
                    "{path} is a checkpoint quantized with {method}: its weights are read as the values they stand for, and shown as F32. "
                    "What that quantization cost shows in a study of it beside the original F16 or BF16 weights (`--ref`).",
                    path=path,
                    method=w.source.packing,
                )
            )
        if quantizing and not _unquantized(w):
            notes.append(
                english(
                    "{path} is already quantized: the variants are quantized from its values, so that both errors add up. Use an F16, BF16 "
                    "or F32 file for figures that hold for published quantizations.",
                    path=path,
                )
            )
        if w.unused:
            named = ", ".join(w.unused[:5]) + (" …" if len(w.unused) > 5 else "")
            notes.append(
                english("{path}: {n} tensors are not used by the reference forward: {names}.", path=path, n=len(w.unused), names=named)
            )
        if w.config.ignored_keys:
            ignored = ", ".join(w.config.ignored_keys)
            notes.append(english("{path}: metadata keys not known to the reference forward: {names}.", path=path, names=ignored))
    return notes


def _names(paths: Sequence[str]) -> dict[str, str]:
    """The stem of each path, the whole path where stems collide."""
    stems = {p: (Path(p).stem if Path(p).suffix == ".gguf" else Path(p).name or p) for p in paths}
    return {p: stem if list(stems.values()).count(stem) == 1 else p for p, stem in stems.items()}


def _same_model(files: dict[str, Weights]) -> None:
    """ShapeError unless all files have the sizes of the first."""
    (first, w0), *others = files.items()
    for path, w in others:
        for what in ("arch", "n_layer", "n_embd", "n_head", "n_head_kv", "n_ff", "n_vocab"):
            a, b = getattr(w0.config, what), getattr(w.config, what)
            if a != b:
                raise ShapeError(
                    f"{path}: {what} is {b}, expected {a} as in {first}. The files are of different models, which cannot be compared "
                    f"layer by layer: see `quantscope inspect` of both."
                )
        _same_vocabulary(first, w0.source, path, w.source)


def _same_vocabulary(first: str, a: Source, path: str, b: Source) -> None:
    """VocabularyError when two GGUF files give the same id to different tokens: the same text would mean something else to each."""
    ours, theirs = a.metadata.get(TOKENS), b.metadata.get(TOKENS)
    if ours is None or theirs is None:  # a Hugging Face folder keeps them elsewhere, and ids alone need none
        return
    for i, (x, y) in enumerate(zip(ours, theirs, strict=False)):
        if x != y:
            raise VocabularyError(
                f"{path}: token {i} is {y!r}, expected {x!r} as in {first}. The files have different vocabularies (a fine-tune with added "
                f"tokens, or another conversion), so the same text has other ids: compare files made from one original."
            )


def _file_candidate(weights: Weights, name: str, path: str, dtype: torch.dtype) -> Candidate:
    types, source = weights.stored_types(), weights.source
    bpw = _bpw(weights, types) if source.packing is None else 8 * source.file_bytes / _elements(weights, types)
    return Candidate(Member(name, weights, dtype), types, source.file_bytes, bpw, path, source)


def _shared(whole: Candidate, images: Images) -> Candidate:
    """The original as a member that shares its decoded tensors with the variants made from it."""
    return replace(whole, member=replace(whole.member, weights=Requantized(images, {})))


def _quantized(images: Images, whole: Candidate, preset: str) -> Candidate:
    """A preset of the original, in memory; tensors that keep their type are shared, not re-encoded."""
    weights = images.weights
    tensors = [TensorShape(n, weights.shape(n), t) for n, t in whole.types.items()]
    types = assign_types(preset, tensors, facts_of(weights))
    changed = {n: t for n, t in types.items() if t != whole.types[n]}
    header = whole.file_bytes - _padded_bytes(weights, whole.types) if weights.source.packing is None else 0
    size = header + _padded_bytes(weights, types)
    return Candidate(
        replace(whole.member, name=preset_name(preset), weights=Requantized(images, changed)),
        types,
        size,
        _bpw(weights, types),
        None,
        weights.source,
    )


def facts_of(weights: Weights) -> ModelFacts:
    """What the presets ask about a model: of a GGUF file by its own header, as llama-quantize does."""
    c = weights.config
    if weights.source.format == "gguf":
        return facts_from_gguf(weights.source.metadata)
    return ModelFacts(c.arch, c.n_layer, c.n_head, c.n_head_kv, c.experts.n_expert if c.experts else 0)


def _tensor_bytes(weights: Weights, name: str, qtype: QuantType) -> int:
    shape = weights.shape(name)
    return math.prod(shape[:-1]) * qtype.row_bytes(shape[-1])


def _padded_bytes(weights: Weights, types: dict[str, QuantType], alignment: int = 32) -> int:
    """Bytes of the tensors as GGUF lays them out, each padded to the alignment."""
    return sum(-(-_tensor_bytes(weights, n, t) // alignment) * alignment for n, t in types.items())


def _bpw(weights: Weights, types: dict[str, QuantType]) -> float:
    """8 · Σ bytes / Σ elements over all tensors."""
    return 8 * sum(_tensor_bytes(weights, n, t) for n, t in types.items()) / _elements(weights, types)


def _elements(weights: Weights, names: Iterable[str]) -> int:
    return sum(math.prod(weights.shape(n)) for n in names)
