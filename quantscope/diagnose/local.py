"""The cause of each convicted operation: which known fault makes its output of its own inputs.

    E = 1 − (‖y − ŷ‖² − F) / (‖y − y₀‖² − F)        y: what the trace has;  y₀, ŷ: the operation and the faulty operation on its inputs
                                                    F: the floor of the operation, as energy

Replay convicts a product, not its code: so Y is tested against X·W′ᵀ for each wrong W′, and likewise everything else.  Each operation is
explained alone, so several faults at once do not hide one another.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantscope.diagnose.faults import Instance, instances
from quantscope.diagnose.operations import WHOLE_LAYER
from quantscope.diagnose.replay import Bench, Replay, ReplayRow
from quantscope.diagnose.setup import Setup, reference
from quantscope.metrics import nmse
from quantscope.model.ops import exact_matmul
from quantscope.model.taps import place_of, stem_of
from quantscope.trace import Trace
from quantscope.weights import WeightProvider

NAMED = 0.9  # least E of a fault of one operation: its inputs are known, so the right one leaves the floor
SHOWS = 1e-6  # NMSE from which a fault counts as seen in an operation
LEFT = 1e-3  # of the error: what may be left where rounding follows the fault's own values


@dataclass(frozen=True)
class Cause:
    """A fault that explains one convicted operation.  explained: E.  left: the NMSE that remains."""

    instance: Instance
    explained: float
    left: float


@dataclass(frozen=True)
class Explained:
    """A fault and the convicted taps it explains; twins: faults that explain the same taps as well."""

    instance: Instance
    taps: tuple[str, ...]
    twins: tuple[Instance, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(i.fault.name for i in (self.instance, *self.twins)))


@torch.no_grad()
def causes(trace: Trace, weights: WeightProvider, convicted: Sequence[ReplayRow], n_prompt: int | None = None) -> dict[str, list[Cause]]:
    """Tap → the faults that explain it, best first; nothing for an operation that no known fault explains."""
    base, bench = _bench(trace, weights, n_prompt)
    known = list(instances(base, _limits(bench, convicted, base)))
    with exact_matmul():
        return {row.tap: _of(row, bench, base, known) for row in convicted if row.inputs or row.tap == "embd"}


def _bench(trace: Trace, weights: WeightProvider, n_prompt: int | None) -> tuple[Setup, Bench]:
    base = reference(weights, trace.origin.tokens or (0,), n_prompt)
    return base, Bench(trace, base.weights)


def _of(row: ReplayRow, bench: Bench, base: Setup, known: Iterable[Instance]) -> list[Cause]:
    if row.nmse is None or row.floor is None or row.n == 0:
        return []
    stem, layer = place_of(row.tap)
    found = []
    for instance in known:
        wrong = instance.apply(base) if stem in instance.ops or row.operation == WHOLE_LAYER else None
        if wrong is None or wrong.ids is not base.ids:
            continue
        if wrong.times:  # a layer that is skipped hands on what it was given; one that is repeated has no operation of its own
            if row.operation != WHOLE_LAYER or layer is None or wrong.times.get(layer) != 0:
                continue
            computed, made = bench.handed_on(row)
        else:
            computed, made = bench.again(row, wrong.weights, wrong.arithmetic)
        left = _left(computed, made)
        explained = 1.0 if left <= row.floor else 1 - (left - row.floor) / (row.nmse - row.floor) if math.isfinite(row.nmse) else 0.0
        if explained >= NAMED and left <= max(row.floor, LEFT * row.nmse):
            found.append(Cause(instance, explained, left))
    return sorted(found, key=lambda c: c.left)


def _left(computed: Tensor, made: Tensor) -> float:
    """NMSE of what a faulty operation makes, values that are not finite in both left out; +inf where they are in one."""
    if computed.shape != made.shape:
        return math.inf
    finite = made.isfinite()
    if not torch.equal(finite, computed.isfinite()):
        return math.inf
    return float(nmse(computed[finite], made[finite])) if made[finite].any() or computed[finite].any() else 0.0


def _limits(bench: Bench, convicted: Sequence[ReplayRow], base: Setup) -> list[float]:
    """The largest magnitudes of convicted layer outputs: what an engine that clips has as its limit."""
    rows = [row for row in convicted if row.tap.startswith("l_out-") and row.n]
    made = [bench.again(row, base.weights, base.arithmetic)[1] for row in rows[:2]]
    return [float(x.abs().max()) for x in made if x.isfinite().all()][:1]


@torch.no_grad()
def contradicted(
    trace: Trace, weights: WeightProvider, replayed: Replay, suspects: Iterable[Instance], n_prompt: int | None = None
) -> set[Instance]:
    """Faults that would have shown in an operation that is right: they touch more than what is wrong."""
    base, bench = _bench(trace, weights, n_prompt)
    wrong: set[Instance] = set()
    with exact_matmul():
        for row in replayed.those("cleared"):
            for instance in set(suspects) - wrong:
                touched = stem_of(row.tap) in instance.ops or row.operation == WHOLE_LAYER
                setup = instance.apply(base) if touched else None
                if setup is None or setup.times:
                    continue
                if _left(*bench.again(row, setup.weights, setup.arithmetic)) > max(row.floor or 0.0, SHOWS):
                    wrong.add(instance)
    return wrong


def cover(found: dict[str, list[Cause]], contradicted: Collection[Instance] = ()) -> tuple[list[Explained], list[str]]:
    """The fewest faults that explain all convicted taps, and the taps that none explains.

    Of faults that explain a tap, those that are not contradicted by operations that are right go first.  Of those that explain equally
    many taps, the one that leaves least comes first; those that explain the same taps are its twins.
    """
    found = {tap: [c for c in own if c.instance not in contradicted] or own for tap, own in found.items()}
    open_taps = {tap for tap, causes in found.items() if causes}
    chosen: list[Explained] = []
    while open_taps:
        by_fault: dict[Instance, list[tuple[str, float]]] = {}
        for tap in found:
            if tap in open_taps:
                for cause in found[tap]:
                    by_fault.setdefault(cause.instance, []).append((tap, cause.left))
        best = max(by_fault, key=lambda i: (len(by_fault[i]), -max(left for _, left in by_fault[i])))
        taps = tuple(tap for tap, _ in by_fault[best])
        twins = tuple(i for i, own in by_fault.items() if i != best and {tap for tap, _ in own} == set(taps))
        chosen.append(Explained(best, taps, twins))
        open_taps -= set(taps)
    return chosen, [tap for tap, causes in found.items() if not causes]
