"""Which type each tensor gets for a size or a KL divergence: searched on predictions, decided by measurement.

    predict     kl[tensor][type] of every matrix and type                                        sensitivity.py
    search      min Σ kl  with  Σ bytes ≤ target                                                 search.py
    measure     the search's answer, the best two presets that fit, the rules of thumb           measured_kl.py
    decide      the lowest measured KL on the text that nothing was fitted to

So the answer is never worse there than the presets that were measured.  For a KL divergence the search is repeated with the predictions
scaled by measured / predicted, and the smallest candidate that stays below it is taken.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from torch import Tensor

from quantscope.errors import UsageError
from quantscope.imatrix import Imatrix
from quantscope.importance import compute_imatrix
from quantscope.language import mark, say
from quantscope.lockstep import Member
from quantscope.logit_stats import half_width
from quantscope.plan import plan_of
from quantscope.qtypes import QTYPES, QuantType
from quantscope.quants import Floats
from quantscope.recipes import PRESETS, is_quantizable
from quantscope.remedy.candidates import PRESET, SEARCHED, Candidate, Catalog, unscored
from quantscope.remedy.measured_kl import measured
from quantscope.remedy.original import Original
from quantscope.remedy.recipe_file import Recipe
from quantscope.remedy.search import Assignment, for_kl, for_size, smallest
from quantscope.results import StudyOptions
from quantscope.weights import Weights
from quantscope.wording import count, fixed, sig, size

PRESETS_MEASURED = 2
POINTS = 12  # of the assignment, on the Pareto front
ROUNDS = 6  # of scaling predictions to what was measured, for a KL divergence
SAFETY = 0.98  # of the KL divergence that is searched for again
NEAR = 0.95  # of the KL divergence that was asked for: close enough
BEST = mark("lowest predicted KL")

Importance = Callable[[str], Floats | None]
Step = Callable[[str, int, int], None]  # (what is measured, stages done, of how many)
TEXTS = "calibration text", "other text"


@dataclass(frozen=True)
class Target:
    """One of the three is given: bytes of the file, bits per weight, or the KL divergence on the text that nothing was fitted to [nats]."""

    n_bytes: int | None = None
    bpw: float | None = None
    kl: float | None = None

    def __str__(self) -> str:
        if self.n_bytes is not None:
            return size(self.n_bytes)
        if self.bpw is not None:
            return say("{n} bits per weight", n=sig(self.bpw))
        return say("a KL divergence of {kl} nats", kl=sig(self.kl))


@dataclass(frozen=True)
class Point:
    """A size with the predicted KL of a preset, or of the best assignment (name None).  best: the assignment's at this size."""

    name: str | None
    n_bytes: int
    bpw: float
    kl: float
    best: float | None


@dataclass(frozen=True)
class Found:
    """candidates: best measured first, then those that were not measured.  front: by size.

    absent: presets that are not written here, or are the same as another one; barred: those that fit but have types that are not allowed.
    """

    target: Target
    chosen: Candidate
    candidates: tuple[Candidate, ...]
    front: tuple[Point, ...]
    absent: tuple[str, ...] = ()
    barred: tuple[str, ...] = ()
    n_chunks: tuple[int, int] = (0, 0)  # measured, of the calibration text and of the other one
    n_ctx: int = 0

    @property
    def best_preset(self) -> Candidate | None:
        """The measured preset with the lowest KL on the other text."""
        return next((c for c in self.candidates if c.kind == PRESET and c.kl is not None), None)


def importance_of(weights: Weights, ids: Tensor, text: str, step: Step = lambda what, done, of: None) -> Imatrix:
    """The importance matrix of the layers' matrices on ids [C,T], as llama-imatrix makes it.  text: its name, for the metadata."""
    stored = weights.stored_types()
    plan = plan_of(weights, ids, 0, stored, [stored], StudyOptions.memory_bytes)
    n_steps = plan.n_batches * (weights.config.n_layer + 2)
    show = partial(step, "importance")
    return compute_imatrix(Member("original", weights), ids, plan, datasets=(text,), step=lambda n: show(n, n_steps))


def find(
    catalog: Catalog,
    weights: Weights,
    target: Target,
    texts: tuple[Tensor, Tensor],
    importance: Importance = lambda name: None,
    step: Step = lambda what, done, of: None,
) -> Found:
    """The recipe for a target.

    texts: ids [C,T] of the calibration text and of another.  importance: of the columns, for the encoders.  step: called after each
    stage of a measurement.  Raises UsageError for a target that no allowed types reach.
    """
    job = _Job(catalog, weights, texts, importance, step)
    if target.kl is None:
        most, room = _room(catalog, target)
        best = job.searched(for_size(catalog.choices(), room - catalog.fixed_bytes()))
    else:
        best = job.for_kl(target.kl)
        most = room = best.n_bytes
    every = catalog.presets()
    presets = [c for c in every if c.n_bytes <= most and catalog.allows(c)]
    few = sorted(presets, key=lambda c: c.predicted)[:PRESETS_MEASURED]
    rules = list(catalog.rules(room))
    job.measure([best, *few, *rules], on=(0, 1))
    ranked = sorted(map(job.known, (best, *rules, *presets)), key=lambda c: (c.kl[1] if c.kl else math.inf, c.predicted))
    return Found(
        target,
        decided(ranked, target),
        tuple(ranked),
        front(catalog),
        absent=tuple(name for name in PRESETS if name not in {c.name for c in every}),
        barred=tuple(c.name for c in every if c.n_bytes <= most and not catalog.allows(c)),
        n_chunks=(len(texts[0]), len(texts[1])),
        n_ctx=texts[0].shape[1],
    )


def check_possible(model: Original, weights: Weights, target: Target, allowed: Sequence[QuantType]) -> None:
    """UsageError for a size that is impossible, which shows without predictions."""
    if target.kl is None:
        _room(Catalog(model, unscored(model, weights, allowed), [t.name for t in allowed]), target)


def decided(candidates: Sequence[Candidate], target: Target) -> Candidate:
    """Of those that were measured: the lowest KL on the other text, or the smallest one that stays below the target's."""
    known = [(c.kl[1], c) for c in candidates if c.kl is not None]
    if target.kl is None:
        return min(known, key=lambda pair: pair[0])[1]
    return min((c for kl, c in known if kl <= target.kl), key=lambda c: c.n_bytes)


def _room(catalog: Catalog, target: Target) -> tuple[int, int]:
    """Bytes of llama-quantize's file for presets, and for what is searched, which leaves room for quantscope's keys in a given size.

    UsageError for a size that the original has, or that no allowed types have.
    """
    most = catalog.bytes_of_bpw(target.bpw) if target.bpw is not None else target.n_bytes
    assert most is not None
    keys = catalog.key_bytes() if target.bpw is None else 0
    stored, least = catalog.original_bytes(), catalog.smallest()
    if most >= stored:
        raise UsageError(f"a target of {target}: expected less than the original has, {size(stored)}. It fits as it is: use the original.")
    if most - keys < least.n_bytes:
        raise UsageError(
            f"a target of {target}: expected at least {size(least.n_bytes + keys)}, {fixed(least.bpw, 2)} bits per weight, what the "
            f"smallest types that are allowed have. Give a larger target, or smaller types with --types."
        )
    return most, most - keys


@dataclass
class _Job:
    """What was measured so far."""

    catalog: Catalog
    weights: Weights
    texts: tuple[Tensor, Tensor]
    importance: Importance
    step: Step
    results: dict[tuple[int, tuple[tuple[str, str], ...]], np.ndarray] = field(default_factory=dict)

    def searched(self, found: Assignment, name: str = BEST) -> Candidate:
        return self.catalog.candidate(name, SEARCHED, {n: QTYPES[t] for n, t in found.types.items()})

    def measure(self, candidates: Sequence[Candidate], on: tuple[int, ...]) -> None:
        """The KL of each on these texts (0: calibration, 1: other); types that are known already are not run again."""
        for text in on:
            new = {_key(c): c for c in candidates if (text, _key(c)) not in self.results}
            if new:
                what = f"{TEXTS[text]}, {count(len(new), 'candidate')}"
                kls = measured(self.weights, [c.types for c in new.values()], self.texts[text], self.importance, partial(self.step, what))
                self.results |= {(text, key): kl for key, kl in zip(new, kls, strict=True)}

    def known(self, c: Candidate) -> Candidate:
        """With what was measured of its types."""
        return replace(c, here=self.results.get((0, _key(c))), elsewhere=self.results.get((1, _key(c))))

    def for_kl(self, most: float) -> Candidate:
        """The smallest assignment found whose measured KL on the other text is at most this."""
        choices, wanted, lowest = self.catalog.choices(), most, math.inf
        enough: list[Candidate] = []
        for k in range(1, ROUNDS + 1):
            try:
                c = self.searched(for_kl(choices, wanted))
            except UsageError:
                if k == 1:
                    raise
                break  # the scaled predictions ask for more than there is; what was measured counts
            kl = self.other_kl(c)
            lowest = min(lowest, kl)
            enough += [c] if kl <= most else []
            if NEAR * most <= kl <= most or kl == 0 or (kl <= most and c.types == self.catalog.smallest().types):
                break
            wanted *= SAFETY**k * most / kl  # further away each time, as assignments go by steps
        if not enough:
            raise UsageError(
                f"--max-kl {sig(most)}: the best recipe that was found for it has {sig(lowest)} nats when it is measured, expected at most "
                f"that. Give a larger one, or more precise types with --types."
            )
        return min(enough, key=lambda c: c.n_bytes)

    def other_kl(self, c: Candidate) -> float:
        """Measured on the other text."""
        self.measure([c], on=(1,))
        return float(self.results[1, _key(c)].mean())


def _key(c: Candidate) -> tuple[tuple[str, str], ...]:
    return tuple((name, t.name) for name, t in c.types.items())


def front(catalog: Catalog, n: int = POINTS) -> tuple[Point, ...]:
    """Size against predicted KL: the best assignments at n sizes from the smallest to the largest, and all presets."""
    choices, fixed = catalog.choices(), catalog.fixed_bytes()
    low = smallest(choices).n_bytes
    high = sum(min((kl, n_bytes) for n_bytes, kl in options.values())[1] for options in choices.values())

    def best(n_bytes: int) -> Candidate | None:
        if n_bytes - fixed < low:
            return None
        found = for_size(choices, n_bytes - fixed)
        return catalog.candidate(BEST, SEARCHED, {name: QTYPES[t] for name, t in found.types.items()})

    points = {}
    for k in range(n):
        c = best(fixed + round(low * (high / low) ** (k / (n - 1))))
        assert c is not None
        points[c.n_bytes] = Point(None, c.n_bytes, c.bpw, c.predicted, c.predicted)
    found = list(points.values())
    for c in catalog.presets():
        at_size = best(c.n_bytes)
        found.append(Point(c.name, c.n_bytes, c.bpw, c.predicted, at_size.predicted if at_size else None))
    return tuple(sorted(found, key=lambda p: (p.n_bytes, p.name or "")))


def ratio(a: Candidate, b: Candidate) -> tuple[float, float]:
    """Σa/Σb of the measured KL on the other text, and the half-width of its 95 % interval, from paired chunks (NaN for one chunk).

    The delta method: SE of mean(a_c − r·b_c), over mean(b).
    """
    assert a.elsewhere is not None
    assert b.elsewhere is not None
    mean = float(b.elsewhere.mean())
    if mean == 0 or len(b.elsewhere) < 2:
        return (math.nan if mean == 0 else float(a.elsewhere.mean()) / mean), math.nan
    r = float(a.elsewhere.mean()) / mean
    return r, half_width(a.elsewhere - r * b.elsewhere) / mean


def as_recipe(c: Candidate, catalog: Catalog) -> Recipe:
    """recipe.json's content: every matrix by name, and the preset where it is one."""
    arch = catalog.model.facts.arch
    types = tuple((t.name, c.types[t.name]) for t in catalog.shapes if is_quantizable(t, arch))
    is_base = c.kind == PRESET and PRESETS[c.name].qtype.is_quantized
    return Recipe(c.name if is_base else None, types)


def type_lines(recipe: Recipe) -> str:
    """The recipe for ``llama-quantize --tensor-type-file``: a line ``^blk\\.0\\.attn_v\\.weight$=q6_k`` for each matrix.

    Anchored, as llama-quantize searches in the names, and "output.weight" is in "blk.0.attn_output.weight".
    """
    return "".join(f"^{re.escape(name)}$={t.name.lower()}\n" for name, t in recipe.types)
