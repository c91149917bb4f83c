"""From one trace to its causes: what is wrong, how surely, and what else would be as consistent.

    whole tensors      local replay, then the fault of each convicted operation, then the catalogue for what is left
    anything less      the catalogue over all evidence there is

The level is that of the weakest link (docs/verdict.md):

    1 within expected arithmetic      2 excess like rounding      3 structured excess      4 operation convicted      5 cause consistent
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantscope.compare import Comparison
from quantscope.diagnose.convictions import expected_rounding
from quantscope.diagnose.faults import Instance
from quantscope.diagnose.local import Explained, causes, contradicted, cover
from quantscope.diagnose.replay import Replay, replay
from quantscope.diagnose.search import Candidate, Search, search
from quantscope.diagnose.twins import probe
from quantscope.errors import TraceContentError
from quantscope.language import say
from quantscope.phrases import joined, some
from quantscope.trace import Full, Trace, covered, rows_of
from quantscope.weights import WeightProvider

GAIN = 0.01  # a gain this near to 1 is that of rounding
MANY = 100.0  # times the floor: no unmodelled rounding is that large


@dataclass(frozen=True)
class Named:
    """One fault that was found.  where: the taps it explains.  twins: faults that this evidence cannot tell from it."""

    instance: Instance
    where: str
    twins: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (self.instance.fault.name, *self.twins)


@dataclass(frozen=True)
class Causes:
    """level: see the head of this file.  named: the faults, each with its twins; several hold together.

    alternatives: other sets of faults that are as consistent.  unexplained: taps that no known fault explains.
    """

    level: int
    named: tuple[Named, ...] = ()
    alternatives: tuple[Candidate, ...] = ()
    unexplained: tuple[str, ...] = ()
    replayed: Replay | None = None
    searched: Search | None = None
    separating: str = ""  # what would tell the twins or alternatives apart

    @property
    def names(self) -> tuple[str, ...]:
        """All faults named, twins too."""
        return tuple(dict.fromkeys([n for x in self.named for n in x.names] + [n for c in self.alternatives for n in c.names]))

    @property
    def taps(self) -> tuple[str, ...]:
        """The taps that are wrong by themselves, or, where there was no replay, the first that differs."""
        if self.replayed is not None and (rows := self.replayed.those("convicted")):
            return tuple(row.tap for row in rows)
        return self.searched.differing[:1] if self.searched is not None else ()


def find(
    trace: Trace,
    weights: WeightProvider,
    reference: tuple[Trace, Comparison] | None = None,
    *,
    n_prompt: int | None = None,
    ids: Sequence[int] | None = None,
) -> Causes:
    """The causes of what a trace shows.

    reference: the exact trace and the comparison with it, where they were made.  n_prompt: tokens of the first batch of a decoding.
    ids: where the trace does not say them.

    Raises what ``replay`` and ``search`` raise for ids that are no ids of this model.
    """
    replayed = _replayed(trace, weights)
    if replayed is not None and replayed.those("convicted"):
        return _convicted(trace, weights, replayed, n_prompt)
    differs = reference is not None and reference[1].first_divergence is not None
    if trace.origin.tokens is None and ids is None:
        return Causes(3 if differs else 1, replayed=replayed)
    searched = search(trace, weights, predicted=expected_rounding(trace.origin), n_prompt=n_prompt, ids=ids)
    small = reference is not None and differs and like_rounding(reference[1], reference[0], trace)
    return _searched(searched, replayed, differs, small)


def _replayed(trace: Trace, weights: WeightProvider) -> Replay | None:
    try:
        return replay(trace, weights, predicted=expected_rounding(trace.origin))
    except TraceContentError:
        return None


def _convicted(trace: Trace, weights: WeightProvider, replayed: Replay, n_prompt: int | None) -> Causes:
    convicted = replayed.those("convicted")
    found = causes(trace, weights, convicted, n_prompt)
    suspects = {c.instance for own in found.values() for c in own}
    explained, left = cover(found, contradicted(trace, weights, replayed, suspects, n_prompt))
    left += [row.tap for row in convicted if row.tap not in found]
    named = tuple(_named(e) for e in explained)
    more: tuple[Candidate, ...] = ()
    searched = None
    if left and trace.origin.tokens is not None:
        given = [e.instance for e in explained]
        searched = search(trace, weights, predicted=expected_rounding(trace.origin), n_prompt=n_prompt, given=given)
        more = searched.consistent
    if more and len(more[0].faults) == len(explained):
        left = []  # what could not be judged alone is what these faults make, as a map of twice as many heads
    elif more:
        extra = more[0].faults[-1]
        twins = tuple(dict.fromkeys(c.faults[-1].fault.name for c in more[1:] if c.faults[-1].fault.name != extra.fault.name))
        named, left = (*named, Named(extra, joined(left), twins)), []
    separating = next((p for n in named if len(n.names) > 1 and (p := probe(n.names))), "")
    return Causes(5 if named and not left else 4, named, (), tuple(left), replayed, searched, separating)


def _named(e: Explained) -> Named:
    twins = tuple(name for name in e.names if name != e.instance.fault.name)
    return Named(e.instance, some(e.taps, 3), twins)


def _searched(searched: Search, replayed: Replay | None, differs: bool, small: bool) -> Causes:
    """differs, small: what the comparison with the reference shows: a difference, one like rounding."""
    consistent = searched.consistent
    if not consistent:
        level = 1 if not differs and not searched.differing else 2 if small else 3
        return Causes(level, (), searched.candidates[:3], searched.differing, replayed, searched)
    best = [c for c in consistent if len(c.faults) == len(consistent[0].faults)]
    if len(best[0].faults) == 1:
        first = best[0]
        twins = tuple(dict.fromkeys(c.names[0] for c in best[1:] if c.names != first.names))
        named: tuple[Named, ...] = (Named(first.faults[0], _where(first), twins),)
        return Causes(5, named, (), (), replayed, searched, searched.probe if twins else "")
    named = tuple(Named(i, _where(best[0])) for i in best[0].faults)
    return Causes(5, named, tuple(best[1:]), (), replayed, searched, searched.probe if len(best) > 1 else "")


def _where(c: Candidate) -> str:
    if c.layers is None:
        return say("the whole run")
    return say("layer {layer} alone", layer=min(c.layers)) if len(c.layers) == 1 else say("layer {layer} on", layer=min(c.layers))


def like_rounding(c: Comparison, ref: Trace, test: Trace) -> bool:
    """Whether all that differs does so a little and without a direction: within MANY floors, gain 1."""
    over = [row for row in c.rows if row.verdict == "differs"]
    gains = [g for row in over if (g := gain(ref, test, row.tap)) is not None]
    return bool(over) and all(row.nmse <= MANY * row.floor for row in over) and all(abs(g - 1) <= GAIN for g in gains)


def gain(ref: Trace, test: Trace, tap: str) -> float | None:
    """⟨ref, test⟩ / ‖ref‖² of a tap's whole tensors; None where they are not there."""
    a, b = ref.find(tap, Full), test.find(tap, Full)
    if a is None or b is None:
        return None
    there = covered(b, test.origin)
    x, y = (a.values if there is None else rows_of(a, ref.origin, there)).double(), b.values.double()
    norm = float(x.square().sum())
    return float((x * y).sum()) / norm if x.shape == y.shape and norm else None
