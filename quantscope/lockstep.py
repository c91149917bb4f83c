"""N variants of a model through the layers together: one layer's weights in memory at a time, made once for all that share them.

    for each layer i:  for each slice of chunks:  for each member: h = layer(h, weights of i)
    then the head:     for each slice of positions:  for each slice of the vocabulary:  for each member: logits

The first member is the reference when there is one: what it shows at a tap is kept while the others pass the same slice of the same
layer, so that every comparison is made on the spot and neither an activation nor a logit is stored for later.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quantscope.model.arithmetic import EXACT, Arithmetic, cast
from quantscope.model.forward import Ropes, check_ids, embed, layer, logits, output_norm, tables
from quantscope.model.ops import exact_matmul
from quantscope.weights import WeightProvider


@dataclass(frozen=True)
class Member:
    """One set of weights that walks along."""

    name: str
    weights: WeightProvider
    dtype: torch.dtype = torch.float32  # of weights and activations
    arithmetic: Arithmetic = EXACT  # of the layers


@dataclass(frozen=True)
class Slices:
    """How much goes through at a time; changes memory and speed, and results by no more than rounding."""

    chunks: int  # through a layer
    positions: int  # through the head
    ids: int  # of the vocabulary


class Observer(Protocol):
    """Sees every wanted tap of every member beside the reference's, and the logits of all members side by side."""

    @property
    def taps(self) -> Collection[str]:
        """Names of the wanted taps; the logits come by ``logits``."""

    def tap(self, member: int, name: str, ref: Tensor | None, x: Tensor, chunk: int) -> None:
        """One tap of one member, [b,T,channels], of the chunks from ``chunk`` on; ``ref`` is the same tap of the reference, None for it."""

    def logits(self, start: int, first_id: int, members: Sequence[Tensor]) -> None:
        """Logits [n,v] of each member, of the ids from ``first_id`` on, at n of the positions the head was asked for, from ``start`` on.

        These are numbered through all chunks.  The whole vocabulary of some positions comes before the next positions do.
        """


class _MemberTap:
    """The tap of one member: hands wanted tensors to the observer beside the reference's, which it finds in ``refs``."""

    def __init__(self, observer: Observer, member: int, refs: dict[str, Tensor], is_ref: bool) -> None:
        self.observer, self.member, self.refs, self.is_ref = observer, member, refs, is_ref
        self.chunk = 0

    def wants(self, name: str) -> bool:
        return name in self.observer.taps

    def __call__(self, name: str, x: Tensor, /) -> None:
        if not self.wants(name):
            return
        self.observer.tap(self.member, name, self.refs.get(name), x, self.chunk)
        if self.is_ref:
            self.refs[name] = x


@torch.no_grad()
def walk(
    ids: Tensor,
    members: Sequence[Member],
    observer: Observer,
    *,
    has_reference: bool,
    slices: Slices,
    first: int = 0,
    step: Callable[[int], None] = lambda n: None,
) -> None:
    """Run ids [C,T] through all members together; everything of interest goes to the observer.

    has_reference: the first member is the one the others are compared with.  first: logits are wanted from this position of each chunk on.
    step: called with the number of stages done (n_layer + 2 in all: embedding, layers, head).
    Raises PromptError for ids the model cannot take.
    """
    check_ids(ids, members[0].weights.config)
    with exact_matmul():
        _Walk(ids, members, observer, has_reference, slices).run(first, step)


class _Walk:
    """The state of one walk: the hidden state of every member, [C,T,E] each, and what the reference shows at the slice at hand."""

    def __init__(self, ids: Tensor, members: Sequence[Member], observer: Observer, has_reference: bool, slices: Slices) -> None:
        self.ids, self.members, self.observer, self.slices = ids, members, observer, slices
        self.n_layer, self.n_vocab = members[0].weights.config.n_layer, members[0].weights.config.n_vocab
        self.refs: dict[str, Tensor] = {}
        self.taps = [_MemberTap(observer, m, self.refs, has_reference and m == 0) for m in range(len(members))]
        self.hidden: list[Tensor] = []

    def run(self, first: int, step: Callable[[int], None]) -> None:
        self._prepare(0)
        self._embed()
        step(1)
        ropes = [tables(h, m.weights, dtype=m.dtype) for h, m in zip(self.hidden, self.members, strict=True)]
        for i in range(self.n_layer):
            self._prepare(i + 1)
            self._layer(i, ropes)
            step(i + 2)
        self._norm()
        self._head([h[:, first:] for h in self.hidden])
        step(self.n_layer + 2)

    def _embed(self) -> None:
        for part in self._parts():
            for m, member in enumerate(self.members):
                x = embed(self.ids[part], member.weights, self.taps[m], dtype=member.dtype)  # [b,T,E]
                if m == len(self.hidden):
                    self.hidden.append(x.new_empty(*self.ids.shape, x.shape[-1]))  # [C,T,E]
                self.hidden[m][part] = x
        self._let_go(["token_embd.weight"])

    def _layer(self, i: int, ropes: Sequence[Ropes]) -> None:
        for part in self._parts():
            for m, member in enumerate(self.members):
                w = member.arithmetic.layer(member.weights, i, member.dtype)
                h = self.hidden[m][part]
                self.hidden[m][part] = layer(h, w, i, member.weights.config, ropes[m], self.taps[m], m=member.arithmetic)
        self._let_go(self._names(i))

    def _norm(self) -> None:
        for part in self._parts():
            for m, member in enumerate(self.members):
                w = cast(member.weights.top(), member.dtype)
                self.hidden[m][part] = output_norm(self.hidden[m][part], w, member.weights.config, self.taps[m])

    def _head(self, normed: Sequence[Tensor]) -> None:
        """Logits of all members from their normed states, [C,P,E] each: positions outside, the vocabulary inside."""
        C, P, _ = normed[0].shape
        for start in range(0, C * P, self.slices.positions):
            at = torch.arange(start, min(start + self.slices.positions, C * P))
            states = [x[at // P, at % P] for x in normed]  # [n,E] each
            for a in range(0, self.n_vocab, self.slices.ids):
                ids = slice(a, min(a + self.slices.ids, self.n_vocab))
                tops = [cast(m.weights.top(ids), m.dtype) for m in self.members]
                self.observer.logits(start, a, [logits(x, w, m.weights.config) for x, w, m in zip(states, tops, self.members, strict=True)])
        self._let_go(self._names(self.n_layer))

    def _parts(self) -> Iterator[slice]:
        """Slices of chunks, the members' taps set to each; what the reference showed is forgotten after each."""
        for a in range(0, len(self.ids), self.slices.chunks):
            for tap in self.taps:
                tap.chunk = a
            yield slice(a, min(a + self.slices.chunks, len(self.ids)))
            self.refs.clear()

    def _names(self, i: int) -> Collection[str]:
        """Canonical names of what layer i needs, of what the head needs after the last."""
        w = self.members[0].weights
        return (w.layer_names(i) if i < self.n_layer else w.top_names()).values()

    def _prepare(self, i: int) -> None:
        """Begin to read layer i from disk while the one before it computes."""
        for member in self.members:
            member.weights.will_need(self._names(i))

    def _let_go(self, names: Collection[str]) -> None:
        for member in self.members:
            member.weights.let_go(names)
