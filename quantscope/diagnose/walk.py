"""Many setups of one model walk through its layers side by side, so that each layer's weights are read once for all of them.

    for step in walk([(setup, layers), ...], start):            embd and the layers before are passed, then one step a layer, then the head
        step[k]                                                 tap → [1,T,channels] of setup k in this step

A setup can be limited to some layers: in the others the reference computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantscope.diagnose.setup import Setup
from quantscope.model.forward import embed, head, layer, tables
from quantscope.model.ops import exact_matmul
from quantscope.model.taps import Recorder

Taps = Mapping[str, Tensor]


@dataclass(frozen=True)
class Walker:
    """A setup, and the layers it is limited to, −1 the embedding and n_layer the head; None: it is the whole program."""

    setup: Setup
    layers: frozenset[int] | None = None


@torch.no_grad()
def walk(
    reference: Setup, walkers: Sequence[Walker], wanted: Callable[[str], bool], first: int = 0, h: Tensor | None = None
) -> Iterator[list[Taps]]:
    """A step for the embedding, for each layer from ``first`` on, and for the head.

    wanted: names of the taps that are kept.  h: the reference's hidden state before layer ``first``, [1,T,E], where the walk does not begin
    with the embedding; then no setup changes what comes before.
    """
    running = [_run(reference, w, wanted, first, h) for w in walkers]
    with exact_matmul():
        for _ in range(first, reference.config.n_layer + 2):
            yield [next(r) for r in running]


def _run(reference: Setup, walker: Walker, wanted: Callable[[str], bool], first: int, h: Tensor | None) -> Iterator[Taps]:
    own, config = walker.setup, reference.config
    taps = _Wanted(wanted)

    def at(i: int) -> Setup:
        return own if walker.layers is None or i in walker.layers else reference

    if h is None:
        h = embed(at(-1).ids, at(-1).weights, taps, arithmetic=at(-1).arithmetic)
    ropes = {id(s): tables(h, s.weights, arithmetic=s.arithmetic) for s in (own, reference)}
    yield taps.taken()
    for i in range(first, config.n_layer):
        s = at(i)
        n = s.times.get(i, 1)
        for _ in range(n):
            h = layer(h, s.arithmetic.layer(s.weights, i, torch.float32), i, config, ropes[id(s)], taps, None, s.arithmetic)
        if n == 0:
            taps(f"l_out-{i}", h)
        yield taps.taken()
    s = at(config.n_layer)
    head(h, s.arithmetic.top(s.weights, torch.float32), config, taps, s.arithmetic)
    yield taps.taken()


class _Wanted(Recorder):
    """A tap that keeps what is wanted until it is taken."""

    def __init__(self, wanted: Callable[[str], bool]) -> None:
        super().__init__()
        self._is_wanted = wanted

    def wants(self, name: str) -> bool:
        return self._is_wanted(name)

    def taken(self) -> Taps:
        taken, self.taps = self.taps, {}
        return taken
