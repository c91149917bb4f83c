"""Forward calls of RusTorch, from its log or its dumps → runs: which positions they stand for, and which ids they were given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from quantscope.importers.base import AT_LAST, PRINTED, Draft, Run, common_digits, non_finite_note, number
from quantscope.language import english, mark
from quantscope.trace import Origin, Positions, Sample, Trace

ENGINE = "RusTorch"
FIRST: Positions = (-2,)  # the first position of the call, until that is known


@dataclass
class Call(Draft):
    """One forward call while its lines are read; its positions are FIRST and AT_LAST until all calls are known."""

    begun: set[str] = field(default_factory=set)  # kinds of opening lines that were seen
    labels: set[tuple[str, str]] = field(default_factory=set)  # (what a line shows, tap): twice in one call is another call
    selected: int | None = None
    follows: bool = False  # known to be a later call of one generation
    embedded: list[tuple[int, list[str]]] = field(default_factory=list)  # (token, first values of its embedding)
    logits: dict[int, str] = field(default_factory=dict)
    ranks: dict[int, int] = field(default_factory=dict)  # token → rank of its logit, where one was printed
    widths: dict[str, int] = field(default_factory=dict)  # tap without its layer → channels, where the log says so

    @property
    def computed(self) -> bool:
        """Whether more than the embeddings has been seen."""
        return bool(self.labels or self.logits)


def sample(texts: Sequence[str], index: Sequence[int], width: int, positions: Positions) -> Sample:
    """Printed values of one position, [1,width]."""
    values = torch.tensor([number(t) for t in texts], dtype=torch.float64).float()
    return Sample(values, torch.tensor(list(index)), (1, width), positions, common_digits(texts))


def runs_of(calls: Sequence[Call]) -> list[Run]:
    """One run a call, its positions and ids completed from the calls before it."""
    runs: list[Run] = []
    known: tuple[int, ...] = ()  # ids of the generation so far, where all of them were printed
    chosen: int | None = None  # the token that the call before selected
    for call in calls:
        given = call.tokens
        if call.n is None and given:
            call.n = len(given)
        if call.start is None:
            call.start = len(known) if known and chosen is not None and given == (chosen,) else 0
        longer = bool(known) and given is not None and len(given) > len(known) and given[: len(known)] == known  # no cache: all over again
        if call.start and given is not None:
            call.tokens = known[: call.start] + given if len(known) >= call.start else None
        runs.append(Run(f"call {len(runs) + 1}", _run(call), bool(runs) and (call.start > 0 or longer or call.follows)))
        known, chosen = call.tokens or (), call.selected
    return runs


def _run(call: Call) -> Trace:
    """The call's evidence at its positions."""
    start = call.start or 0
    place = {AT_LAST: call.last if call.n is not None else AT_LAST, FIRST: (start,)}
    call.taps = {tap: [replace(e, positions=place.get(e.positions, e.positions)) for e in pieces] for tap, pieces in call.taps.items()}
    _embeddings(call, start)
    if call.logits:
        ids = sorted(call.logits)
        call.add("result_output", sample([call.logits[i] for i in ids], ids, ids[-1] + 1, place[AT_LAST]))
    _widened(call)
    for tap, pieces in call.taps.items():
        call.notes += [n for e in pieces if isinstance(e, Sample) and (n := non_finite_note(tap, e.values, PRINTED))]
    if call.selected is not None:
        call.notes.append(_choice(call, call.selected))
    positions = None if not start else AT_LAST if call.n is None else tuple(range(start, start + call.n))
    return call.trace(Origin(ENGINE, tokens=call.tokens, positions=positions))


def _embeddings(call: Call, start: int) -> None:
    """Rows of the embeddings, each at the next position that has its token."""
    ids = call.tokens[start:] if call.tokens else ()
    used: dict[int, int] = {}
    lost = 0
    for token, texts in call.embedded:
        at = next((i for i in range(used.get(token, -1) + 1, len(ids)) if ids[i] == token), None)
        if at is None or not texts:
            lost += 1
            continue
        used[token] = at
        call.add("embd", sample(texts, range(len(texts)), len(texts), (start + at,)))
    if lost:
        call.notes.append(english("{n} printed embeddings are left out: the call's ids do not say at which position they stand.", n=lost))


def _widened(call: Call) -> None:
    """Samples with as many channels as the log says; else they show only those that were printed."""
    narrow = False
    for tap, pieces in call.taps.items():
        width = call.widths.get(tap.partition("-")[0])
        for i, e in enumerate(pieces):
            if isinstance(e, Sample) and width and width >= e.shape[-1]:
                pieces[i] = replace(e, shape=(1, width))
            narrow |= isinstance(e, Sample) and not width
    if narrow:
        call.notes.append(mark("The log does not say how many channels a tap has: the shapes of samples end with the last value printed."))


def _choice(call: Call, token: int) -> str:
    """What was generated, with the rank of its logit."""
    logit, rank = call.logits.get(token), call.ranks.get(token)
    if logit is None:
        return english("Selected token {token}, whose logit was not printed.", token=token)
    if not rank:
        return english("Selected token {token}: logit {logit}.", token=token, logit=logit)
    return english("Selected token {token}: logit {logit}, rank {rank}.", token=token, logit=logit, rank=rank)
