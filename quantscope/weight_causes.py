"""Why a tensor differs between two files: hypotheses, each judged by the NMSE it leaves.

    left = Σ (b − h(a))² / Σ b²        h: what a wrong conversion or a wrong decoder would have made of file A's tensor

A hypothesis is *verified* when what it leaves is explained by the types of the two files.  Several can be, where they are the same
thing for these values (a constant norm plus 1 is also scaled): then all are named.  Orders are not guessed but found, from the
correlations of positions, and named when they are one of ``ORDERS``; a narrower order (inside blocks) is tried before a wider one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from quantscope.language import mark, say
from quantscope.qtypes import QTYPES, QuantType
from quantscope.weights import ALL_IDS, Weights, interleave_rows
from quantscope.wording import sig

UNRELATED = 0.5  # [NMSE] no type loses half of the signal: more than this left explains nothing
ARITHMETIC = 1e-9  # [NMSE] of undoing a hypothesis in float32: 1 + w keeps w to 6e-8 absolute
MOSTLY = 0.1  # of the difference: a hypothesis that leaves no more is worth naming although it is not all
SAMPLE = 1 << 20  # [elements] enough to refuse a hypothesis
CHUNK = 1 << 22  # [elements] converted to float64 at a time
MOST_ROWS = 4096  # rows or columns whose order is looked for: the correlations are a square matrix
SAME_SHIFT = 1e-4  # a shift this near to 1 is the one of a norm
HEAD_ROWS = 64  # rows that decide whether another tensor is worth reading


@dataclass(frozen=True)
class Stored:
    """One tensor of one file."""

    weights: Weights
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weights.shape(self.name)

    @property
    def qtype(self) -> QuantType:
        """F32 for rope_freqs.weight made from a config.json."""
        return self.weights.stored(self.name).qtype if self.name in self.weights.stored_names() else QTYPES["F32"]

    def some(self, rows: Tensor) -> Tensor:
        """Rows of a matrix in float32."""
        return self.weights.rows(self.name, rows)

    def band(self, rows: slice = ALL_IDS) -> Tensor:
        """Some rows in float32; a vector is one row."""
        return self.weights.band(self.name, rows) if len(self.shape) > 1 else self.weights.get(self.name)[None]


@dataclass(frozen=True)
class Cause:
    """What B's tensor is to A's, the NMSE that is left when that is so, and whether the types explain that."""

    text: str
    left: float
    verified: bool


Hypothesis = tuple[str, Tensor]
# How a wrong decoder orders a group: it writes `parts` equal parts of it as neighbours (or the other way round).
# parts, group, what it is
ORDERS = (
    (2, 32, mark("low and high nibbles as neighbours: the order of Q4_0, Q4_1, Q5_0 or Q5_1 was misread")),
    (2, 64, mark("low and high nibbles as neighbours: the order of Q4_K or Q5_K was misread")),
    (4, 128, mark("the elements l, l+32, l+64, l+96 as neighbours: the order of Q6_K, Q3_K or Q2_K was misread")),
)


def causes(a: Stored, b: Stored, bound: float) -> tuple[Cause, ...]:
    """The verified hypotheses of the first stage that has any; else the best that leaves at most MOSTLY of the difference; else none.

    bound: the NMSE that the two types explain.  Holds both tensors and some copies of them at once.
    """
    x, y = a.band(), b.band()
    if not x.any() or not y.any():
        return (Cause(say("values where A has only zeros") if y.any() else say("only zeros"), 0.0, True),)
    limit = min(max(bound, ARITHMETIC), UNRELATED)
    tried: list[Cause] = []
    for stage in STAGES:
        found = [Cause(text, n := left_over(p, y), n <= limit) for text, p in stage(a, x, y)]
        if verified := tuple(c for c in found if c.verified):
            return verified
        tried += found
    best = min(tried, key=lambda c: c.left)
    return (best,) if best.left <= MOSTLY * left_over(x, y) else ()


def left_over(predicted: Tensor, y: Tensor) -> float:
    """Σ (y − predicted)² / Σ y² of two [n,m]; of a part of the rows when that part already refuses.  NaN becomes +inf."""
    step = max(1, y.numel() // SAMPLE)
    first = _nmse(predicted[::step], y[::step])
    return first if step == 1 or first > UNRELATED else _nmse(predicted, y)


def _nmse(p: Tensor, y: Tensor) -> float:
    n = max(1, CHUNK // y.shape[1])
    error = energy = 0.0
    for i in range(0, len(y), n):
        u, v = p[i : i + n].double(), y[i : i + n].double()
        error += (u - v).square().sum().item()
        energy += v.square().sum().item()
    return error / energy if energy else math.inf


def _layouts(a: Stored, x: Tensor, y: Tensor) -> Iterator[Hypothesis]:
    """Matrices turned or read in another shape, rows of heads in another order, a constant added or multiplied."""
    n, m = x.shape
    if n == m:
        yield say("A's matrix transposed"), x.T
    elif n > 1:
        yield say("the values of A's transposed matrix in this matrix's shape (reinterpreted)"), x.T.reshape(n, m)
        yield say("A's values read in the shape of the transposed matrix, then transposed"), x.reshape(m, n).T
    if a.name.split(".")[-2] in ("attn_q", "attn_k") and not a.name.endswith(".scale"):
        yield from _heads(x, a.weights.config.head_dim)
    yield from _affine(x, y)


def _heads(x: Tensor, head_dim: int) -> Iterator[Hypothesis]:
    rows = x if x.shape[0] > 1 else x.T  # a bias is one row
    n_head = rows.shape[0] // head_dim
    order = torch.arange(rows.shape[0])
    interleaved = interleave_rows(order, n_head)
    for order, text in (
        (
            interleaved,
            mark(
                "the rows of each head interleaved, half-split in A: the q/k row permutation of a conversion is missing in one file or "
                "done once too often in the other"
            ),
        ),
        (
            interleaved.argsort(),
            mark(
                "the rows of each head half-split, interleaved in A: the q/k row permutation of a conversion is missing in one file or "
                "done once too often in the other"
            ),
        ),
    ):
        yield say(text), rows[order].reshape(x.shape)


def _affine(x: Tensor, y: Tensor) -> Iterator[Hypothesis]:
    yield say("A's values plus 1 (one side stores norm weights as w − 1, the other as w)"), x + 1
    yield say("A's values minus 1 (one side stores norm weights as w − 1, the other as w)"), x - 1
    sums = [(u * v).sum(dtype=torch.float64).item() for u, v in ((x, y), (x, x))]
    factor = sums[0] / sums[1] if sums[1] else 1.0
    yield say("A's values times {factor}", factor=sig(factor, 4)), x * factor
    shift = (y - x).mean(dtype=torch.float64).item()
    if abs(abs(shift) - 1) > SAME_SHIFT:
        yield say("A's values plus {shift}", shift=sig(shift, 4)), x + shift


def _block_orders(size: int, a: Stored, x: Tensor, y: Tensor) -> Iterator[Hypothesis]:
    """The elements of every block in the same other order."""
    if len(x) > 1 and x.shape[1] % size == 0 and (order := found_order(x.reshape(-1, size), y.reshape(-1, size))) is not None:
        text = say("the elements of each block of {size} in another order, the same in every block", size=size)
        if name := named_order(order):
            text = say("{order} ({name})", order=text, name=name)
        yield text, x.reshape(-1, size)[:, order].reshape(x.shape)


def _orders(a: Stored, x: Tensor, y: Tensor) -> Iterator[Hypothesis]:
    """Rows or columns of a matrix in another order, or a vector's values."""
    n, m = x.shape
    if n == 1:
        if left_over(x.sort().values, y.sort().values) <= ARITHMETIC:  # else any two vectors of one distribution would fit
            yield say("the same values in another order"), x.sort().values[:, y.argsort().argsort()[0]]
        return
    if n <= MOST_ROWS and (order := found_order(x.T, y.T)) is not None:
        yield say("A's rows in another order"), x[order]
    if m <= MOST_ROWS and (order := found_order(x, y)) is not None:
        yield say("A's columns in another order"), x[:, order]


def found_order(x: Tensor, y: Tensor) -> Tensor | None:
    """The order of columns with y ≈ x[:, order], x, y: [n,k], from the k × k correlations; None where there is no one-to-one match."""
    step = max(1, x.numel() // SAMPLE)
    u, v = (t[::step] / t[::step].norm(dim=0).clamp(min=1e-30) for t in (x, y))
    order = (u.T @ v).argmax(0)  # [k], for each column of y the most like column of x
    return order if len(order.unique()) == len(order) else None


def named_order(order: Tensor) -> str:
    """What a row of ORDERS that makes this order is; empty where none does."""
    here = torch.arange(len(order))
    for parts, group, text in ORDERS:
        if len(order) % group == 0:
            neighbours = here.reshape(-1, parts, group // parts).transpose(1, 2).flatten()
            if torch.equal(order, neighbours) or torch.equal(order, neighbours.argsort()):
                return say(text)
    return ""


def _others(a: Stored, x: Tensor, y: Tensor) -> Iterator[Hypothesis]:
    """Another tensor of A: of the same layer, or of the same name in another layer."""
    layer, local = _split(a.name)
    for name in a.weights.names():
        other = Stored(a.weights, name)
        if name == a.name or other.shape != a.shape or not (_split(name)[0] == layer or _split(name)[1] == local):
            continue
        if left_over(other.band(slice(0, HEAD_ROWS))[:HEAD_ROWS], y[:HEAD_ROWS]) <= UNRELATED:
            yield say("what A has as {name}", name=name), other.band()


def _split(name: str) -> tuple[str, str]:
    """("3", "attn_q.weight") of blk.3.attn_q.weight; the layer of a tensor of no layer is empty."""
    first, _, rest = name.partition(".")
    return tuple(rest.split(".", 1)) if first == "blk" else ("", name)  # type: ignore[return-value]


STAGES: tuple[Callable[[Stored, Tensor, Tensor], Iterator[Hypothesis]], ...] = (
    _layouts,
    partial(_block_orders, 32),
    partial(_block_orders, 256),
    _orders,
    _others,
)
