"""Which known faults, one or two at once, make the reference show what the engine showed.

    E = mean over the taps that differ of 1 − (R_fault − 1)₊ / (R_reference − 1)          R: readings.py

The catalogue is run against the reference, all faults side by side, from the first layer that differs on.  A fault is *consistent* when
every piece of evidence is within its allowance, or when less than a thousandth of what the reference leaves is left.  Every consistent
fault is named: evidence that cannot tell them apart says so.  A fault that explains nothing is not named.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from quantscope.diagnose.faults import Instance, instances
from quantscope.diagnose.readings import Reading, readings
from quantscope.diagnose.setup import Setup, reference
from quantscope.diagnose.twins import probe
from quantscope.diagnose.walk import Walker, walk
from quantscope.language import say
from quantscope.model.arithmetic import Arithmetic
from quantscope.model.taps import place_of
from quantscope.phrases import listed
from quantscope.trace import Full, Sample, Stats, Trace
from quantscope.weights import WeightProvider

NAMED = 0.5  # least E of a fault worth naming: wrong ones stay under it (docs/measured.md)
LEFT = 1e-3  # of what the reference leaves: numerical noise grows with a fault's own effect
ADDS = 0.02  # least that a second fault must add to E where the two are not consistent
BESIDE = 8  # single faults that a second one is looked for beside
AT_ONCE = 400  # setups that walk side by side
MOST_CHECKED = 12  # candidates that are tried again from the ids on


@dataclass(frozen=True)
class Candidate:
    """One fault or two, with what they explain.

    front: share of the evidence, in the order of the graph, that comes before the first piece that is not explained.
    """

    faults: tuple[Instance, ...]
    layers: frozenset[int] | None  # that it is limited to, −1 the embedding, n_layer the head; None: everywhere
    explained: float  # E, at most 1
    front: float
    consistent: bool

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(instance.fault.name for instance in self.faults)

    @property
    def label(self) -> str:
        faults = listed(instance.label for instance in self.faults)
        if self.layers is None:
            return faults
        if len(self.layers) == 1:
            return say("{faults} in layer {layer} alone", faults=faults, layer=min(self.layers))
        return say("{faults} from layer {layer} on", faults=faults, layer=min(self.layers))


@dataclass(frozen=True)
class Search:
    """differing: taps that the expected arithmetic does not explain, in the order of the graph.  candidates: worth naming, best first."""

    kind: str  # of the strongest evidence
    differing: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    n_tried: int
    excluded: tuple[str, ...] = ()  # where nothing differs: faults that would have shown
    untestable: tuple[str, ...] = ()  # and those that would not, in this evidence

    @property
    def consistent(self) -> tuple[Candidate, ...]:
        return tuple(c for c in self.candidates if c.consistent)

    @property
    def probe(self) -> str:
        """What would tell the consistent faults apart; empty where there is at most one."""
        names = sorted({name for c in self.consistent for name in c.names})
        return probe(names) if len(names) > 1 else ""


@torch.no_grad()
def search(
    trace: Trace,
    weights: WeightProvider,
    *,
    predicted: Arithmetic | None = None,
    n_prompt: int | None = None,
    ids: Sequence[int] | None = None,
    given: Sequence[Instance] = (),
    pairs: bool = True,
) -> Search:
    """The catalogue against one trace.

    predicted: the arithmetic the engine may have; None: float32.  n_prompt: tokens of the first batch of a decoding.  ids: where the trace
    does not say them.  given: faults that are known to be there; they are tried alone, and with one more.  pairs: look for two faults at
    once where no single one is consistent.
    """
    base = reference(weights, trace.origin.tokens or ids or (), n_prompt)
    ref, hidden = _observed(base, trace)
    rounded = None if predicted is None else _observed(replace(base, arithmetic=predicted, weights=weights), trace)[0]
    read = readings(trace, ref, rounded)
    differing = [r for r in read if r.excess > 1]
    kind = _kind(read)
    bench = _Bench(base, trace, read, hidden)
    if not differing:
        shown, hidden_ones = bench.visible()
        return Search(kind, (), (), len(bench.known), shown, hidden_ones)
    alone = [tuple(given)] if given else []
    singles = bench.tried([*alone, *((*given, instance) for instance in bench.known if instance not in given)])
    found = singles
    if pairs and not given and not any(c.consistent for c in singles):
        found = singles + bench.pairs(singles)
    named = bench.checked([c for c in found if c.explained >= NAMED])
    return Search(kind, tuple(dict.fromkeys(r.tap for r in differing)), tuple(sorted(named, key=_order)), len(found))


def _order(c: Candidate) -> tuple[bool, int, float, float, bool]:
    return not c.consistent, len(c.faults), -c.explained, -c.front, c.layers is not None


def _kind(read: Sequence[Reading]) -> str:
    kinds = {type(r.piece) for r in read}
    return "values" if Full in kinds else "sample" if Sample in kinds else "statistics" if kinds == {Stats} else "fingerprint"


def _observed(setup: Setup, trace: Trace) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The taps that the trace has, and the hidden state before each layer, [1,T,E] each."""
    taps: dict[str, Tensor] = {}
    for step in walk(setup, [Walker(setup)], lambda name: name in trace.taps or _is_stream(name)):
        taps |= step[0]
    n = setup.config.n_layer
    hidden = [taps["embd"], *(taps[f"l_out-{i}"] for i in range(n))]
    return {name: x for name, x in taps.items() if name in trace.taps}, hidden


def _is_stream(name: str) -> bool:
    return name == "embd" or name.startswith("l_out-")


class _Bench:
    """Where setups are compared with one trace."""

    def __init__(self, base: Setup, trace: Trace, read: Sequence[Reading], hidden: Sequence[Tensor]) -> None:
        self._base, self._trace, self._hidden = base, trace, hidden
        self._before = [r.distance(r.ref) for r in read]
        self._read = read
        first = next((r.tap for r in read if r.excess > 1), "embd")
        self._first = max(_layer_of(first, base.config.n_layer), 0)
        shown = [_layer_of(r.tap, base.config.n_layer) for r in read if r.excess <= 1 and r.shows_all(base.ids.shape[1])]
        self._agreed = max((i for i in shown if i < self._first), default=-1)  # the last layer that is shown to agree
        self._from_ids = first == "embd" or self._agreed < 0
        self.known = [instance for instance in instances(base, _limits(read)) if self._possible(instance)]

    def _possible(self, instance: Instance) -> bool:
        """Layers before the first difference ran once; ids are changed only where the trace does not say them."""
        setup = instance.apply(self._base) or self._base
        if setup.times:
            return all(self._agreed < i <= self._first for i in setup.times)
        return setup.ids is self._base.ids or self._trace.origin.tokens is None

    def pairs(self, singles: Sequence[Candidate]) -> list[Candidate]:
        """The faults that explain the beginning best, each with every other one."""
        first = sorted((c for c in singles if c.front > 0 or c.explained > 0.05), key=lambda c: (-c.front, -c.explained))[:BESIDE]
        chosen = [c for c in first if c.layers is None]
        both = {frozenset((a.label, b.label)): (a, b) for c in chosen for b in self.known if (a := c.faults[0]).fault.name != b.fault.name}
        alone = {c.faults[0].label: c.explained for c in singles if c.layers is None}
        found = self.tried(both.values())
        return [c for c in found if c.consistent or c.explained > max(alone[i.label] for i in c.faults) + ADDS]

    def visible(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(names of faults that the evidence rules out wherever they could be, names of those that would not show in it)."""
        changed = [((i,), i.apply(self._base)) for i in self.known]
        chunks = _chunks((faults, Walker(setup)) for faults, setup in changed if setup is not None)
        again = [c for chunk in chunks for c in self._explained(chunk, None)]
        hidden = {c.faults[0].fault.name for c in again if c.consistent}
        names = tuple(dict.fromkeys(i.fault.name for i in self.known))
        return tuple(n for n in names if n not in hidden), tuple(n for n in names if n in hidden)

    def tried(self, sets: Iterable[tuple[Instance, ...]]) -> list[Candidate]:
        """What each set of faults explains: everywhere from the first difference on, and in the first layer that differs alone."""
        start = None if self._from_ids else self._agreed + 1
        return [c for chunk in _chunks(self._walkers(sets)) for c in self._explained(chunk, start)]

    def checked(self, named: Sequence[Candidate]) -> list[Candidate]:
        """Tried again from the ids on: a fault that would have shown before the first difference is not everywhere."""
        if self._from_ids:
            return list(named)
        doubtful = [c for c in named if c.consistent and c.layers is None][:MOST_CHECKED]
        again = self._explained([(c.faults, Walker(self._setup(c.faults))) for c in doubtful], None)  # type: ignore[arg-type]
        wrong = {c.label for c in again if not c.consistent}
        if all(c.label in wrong for c in doubtful):
            later = frozenset(range(self._first, self._base.config.n_layer + 1))
            return [replace(c, layers=later) if c.label in wrong else c for c in named]
        return [c for c in named if c.label not in wrong or c.layers is not None]

    def _setup(self, faults: Iterable[Instance]) -> Setup | None:
        setup: Setup | None = self._base
        for instance in faults:
            setup = None if setup is None else instance.apply(setup)
        return setup

    def _walkers(self, sets: Iterable[tuple[Instance, ...]]) -> Iterable[tuple[tuple[Instance, ...], Walker]]:
        for faults in sets:
            setup = self._setup(faults)
            if setup is None:
                continue
            yield faults, Walker(setup)
            if len(faults) == 1 and 0 <= self._first < self._base.config.n_layer and not setup.times and setup.ids is self._base.ids:
                yield faults, Walker(setup, frozenset({self._first}))

    def _explained(self, chunk: Sequence[tuple[tuple[Instance, ...], Walker]], start: int | None) -> list[Candidate]:
        """start: the layer to begin with, from the reference's hidden state; None: from the ids."""
        left = [list(self._before) for _ in chunk]  # what a setup does not show stays as it is
        at = {r.tap: [k for k, other in enumerate(self._read) if other.tap == r.tap] for r in self._read}
        h = None if start is None else self._hidden[start]
        for step in walk(self._base, [w for _, w in chunk], at.__contains__, start or 0, h):
            for n, taps in enumerate(step):
                for tap, x in taps.items():
                    for k in at[tap]:
                        left[n][k] = self._read[k].distance(self._read[k].seen(x))
        return [self._candidate(faults, w, row) for (faults, w), row in zip(chunk, left, strict=True)]

    def _candidate(self, faults: tuple[Instance, ...], walker: Walker, left: Sequence[float]) -> Candidate:
        shares, good = [], []
        for r, before, after in zip(self._read, self._before, left, strict=True):
            good.append(after <= r.allowance or after <= LEFT * before < math.inf)
            if before > r.allowance:
                rest = 0.0 if good[-1] else 1.0 if math.isinf(before) or math.isinf(after) else max(after - 1, 0.0) / (before - 1)
                shares.append(max(1 - rest, -1.0))
        front = good.index(False) if False in good else len(good)
        start = next((k for k, r in enumerate(self._read) if self._before[k] > r.allowance), 0)
        reach = max(front - start, 0) / (len(good) - start)
        return Candidate(faults, walker.layers, sum(shares) / max(len(shares), 1), reach, all(good))


def _limits(read: Sequence[Reading]) -> list[float]:
    """A magnitude that is the largest of the stream after two layers or more: of no model by chance, but of one that clips."""
    largest = [float(r.peak) for r in read if r.tap.startswith("l_out-") and r.peak is not None]
    return sorted({c for c in largest if c > 0 and sum(math.isclose(c, other, rel_tol=1e-5) for other in largest) > 1})[:1]


def _layer_of(tap: str, n_layer: int) -> int:
    """The layer that makes a tap; −1 for the embedding, n_layer for the head."""
    stem, layer = place_of(tap)
    return -1 if stem == "embd" else n_layer if layer is None else layer


def _chunks(items: Iterable, size: int = AT_ONCE) -> Iterable[list]:  # type: ignore[type-arg]
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
