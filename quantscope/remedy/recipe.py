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
from quantscope.lockstep import Member
from quantscope.logit_stats import half_width
from quantscope.plan import make_plan
from quantscope.qtypes import QTYPES
from quantscope.quants import Floats
from quantscope.recipes import PRESETS, is_quantizable
from quantscope.remedy.candidates import PRESET, SEARCHED, Candidate, Catalog
from quantscope.remedy.measured_kl import measured
from quantscope.remedy.recipe_file import Recipe
from quantscope.remedy.search import Assignment, for_kl, for_size, smallest
from quantscope.results import StudyOptions
from quantscope.weights import Weights
from quantscope.wording import count, fixed, sig, size

PRESETS_MEASURED = 2
POINTS = 12  # of the assignment, on the Pareto front
ROUNDS = 4  # of scaling predictions to what was measured, for a KL divergence
SAFETY = 0.97  # of the KL divergence that is searched for again
BEST = "lowest predicted KL"

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
        return f"{sig(self.bpw)} bits per weight" if self.bpw is not None else f"a KL divergence of {sig(self.kl)} nats"


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
    """candidates: best measured first, then those that were not measured.  front: by size.  absent: presets not written here."""

    target: Target
    chosen: Candidate
    candidates: tuple[Candidate, ...]
    front: tuple[Point, ...]
    absent: tuple[str, ...] = ()
    n_chunks: tuple[int, int] = (0, 0)  # measured, of the calibration text and of the other one
    n_ctx: int = 0

    @property
    def best_preset(self) -> Candidate | None:
        """The measured preset with the lowest KL on the other text."""
        return next((c for c in self.candidates if c.kind == PRESET and c.kl is not None), None)


def importance_of(weights: Weights, ids: Tensor, text: str) -> Imatrix:
    """The importance matrix of the layers' matrices on ids [C,T], as llama-imatrix makes it.  text: its name, for the metadata."""
    stored = {name: weights.stored(name).qtype for name in weights.stored_names()}
    shapes = {name: weights.shape(name) for name in stored}
    n_chunks, n_ctx = ids.shape
    plan = make_plan(weights.config, shapes, stored, [stored], n_chunks=n_chunks, n_ctx=n_ctx, n_scored=0, memory=StudyOptions.memory_bytes)
    return compute_imatrix(Member("original", weights), ids, plan, datasets=(text,))


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
    check_types(catalog)
    job = _Job(catalog, weights, texts, importance, step)
    most = target.n_bytes if target.bpw is None else catalog.bytes_of_bpw(target.bpw)
    if most is not None:
        _check_size(catalog, target, most)
        best = [job.searched(for_size(catalog.choices(), most - catalog.fixed_bytes()))]
    else:
        assert target.kl is not None
        best, most = job.for_kl(target.kl)
    presets = [c for c in catalog.presets() if c.n_bytes <= most]
    few = sorted(presets, key=lambda c: c.predicted)[:PRESETS_MEASURED]
    rules = list(catalog.rules(most))
    job.measure([*best, *few, *rules], on=(0, 1))
    everything = [job.known(c) for c in (*best, *rules, *presets)]
    ranked = sorted(everything, key=lambda c: (c.kl[1] if c.kl else math.inf, c.predicted))
    enough = [c for c in ranked if c.kl is not None and (target.kl is None or c.kl[1] <= target.kl)]
    chosen = enough[0] if target.kl is None else min(enough, key=lambda c: c.n_bytes)
    absent = tuple(name for name in PRESETS if name not in {c.name for c in catalog.presets()})
    return Found(target, chosen, tuple(ranked), front(catalog), absent, (len(texts[0]), len(texts[1])), texts[0].shape[1])


def _check_size(catalog: Catalog, target: Target, most: int) -> None:
    """UsageError for a size that the original has, or that no types have; of the whole file, as the target is."""
    stored, least = catalog.original_bytes(), catalog.fixed_bytes() + smallest(catalog.choices()).n_bytes
    if most >= stored:
        raise UsageError(f"a target of {target}: expected less than the original has, {size(stored)}. It fits as it is: use the original.")
    if most < least:
        c = catalog.smallest()
        raise UsageError(
            f"a target of {target}: expected at least {size(least)}, {fixed(c.bpw, 2)} bits per weight, what the smallest types that are "
            f"allowed have. Give a larger target, or smaller types with --types."
        )


def check_types(catalog: Catalog) -> None:
    """UsageError where a matrix can be stored in none of the allowed types."""
    for name, options in catalog.choices().items():
        if not options:
            raise UsageError(
                f"--types {','.join(catalog.allowed)}: none of them can be written to {name}, expected at least one for each matrix. Add "
                f"others, as Q8_0 or Q4_K, with --types."
            )


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

    def for_kl(self, most: float) -> tuple[list[Candidate], int]:
        """The smallest assignment whose measured KL on the other text is at most this; and its size."""
        choices, wanted, enough = self.catalog.choices(), most, list[Candidate]()
        least = most
        for _ in range(ROUNDS):
            c = self.searched(for_kl(choices, wanted))
            self.measure([c], on=(1,))
            found = self.known(c)
            assert found.elsewhere is not None
            kl = float(found.elsewhere.mean())
            enough += [c] if kl <= most else []
            least = min(least, wanted)
            if kl <= most and (kl >= SAFETY**2 * most or c.n_bytes == self.catalog.fixed_bytes() + smallest(choices).n_bytes):
                break
            wanted *= SAFETY * most / kl
        if not enough:
            raise UsageError(
                f"--max-kl {sig(most)}: the recipes found for it have at least {sig(kl)} nats when they are measured, expected at most "
                f"that. Give a larger one, or more precise types with --types."
            )
        smallest_one = min(enough, key=lambda c: c.n_bytes)
        return [smallest_one], smallest_one.n_bytes


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
