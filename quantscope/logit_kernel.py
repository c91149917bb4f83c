"""The sums of ``logit_sums`` on the CPU: one member's logits go through the cache once, eˣ and all sums in the same loop.

The threads share the positions, and every position has its own sums.  256 running sums side by side let LLVM use SIMD without reordering
any of them, and eˣ is made of additions, multiplications and bit operations alone.  So a result depends neither on the number of
threads, nor on the width of the registers, nor on the C library.  One running sum is at most ⌈V/256⌉ additions long.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantscope.quants.kernel import inline, kernel
from quantscope.quants.threads import share_out

LANES = 256  # running sums side by side: they fit into the first-level cache beside pieces of the logits
TILE = 1 << 16  # e^(r − m) that are kept at a time: the cache holds them until the last member has been compared

SMALLEST = -708.0  # eᵗ below this is taken as 0: 3·10⁻³⁰⁸, the end of the normal float64
LOG2_E = 1 / math.log(2)
LN2_HIGH, LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10  # ln 2 in two parts, k · LN2_HIGH is exact; source: fdlibm
ROUND = 1.5 * 2.0**52  # |y| < 2⁵¹ added to it is rounded to an integer, which the low bits of the sum hold
C2, C3, C4, C5, C6, C7, C8, C9, C10, C11, C12, C13 = (1 / math.factorial(n) for n in range(2, 14))

Floats = NDArray[np.float64]


@inline
def exponential(t: float) -> float:
    """eᵗ = 2ᵏ·eˢ, k = t/ln 2 rounded to an integer, s = t − k·ln 2, |s| ≤ ln 2 / 2: the Taylor series of 14 terms (rest: 4·10⁻¹⁸).

    t: ≤ 0 or NaN.  Returns eᵗ to 2 units in the last place, 0 below −708.  Source: Cody and Waite 1980 (the reduction), Estrin's scheme.
    """
    bounded = SMALLEST if t < SMALLEST else t  # NaN stays
    rounded = bounded * LOG2_E + ROUND
    k = rounded - ROUND
    s = bounded - k * LN2_HIGH - k * LN2_LOW
    s2 = s * s
    s4 = s2 * s2
    low = (1.0 + s) + s2 * (C2 + C3 * s) + s4 * ((C4 + C5 * s) + s2 * (C6 + C7 * s))
    high = (C8 + C9 * s) + s2 * (C10 + C11 * s) + s4 * (C12 + C13 * s)
    # float64: s eeeeeeeeeee mmm...(52)    2ᵏ: e = k + 1023, m = 0; the shift leaves only k of what ``rounded`` holds
    power = np.int64((np.float64(rounded).view(np.int64) << np.int64(52)) + np.int64(1023 << 52)).view(np.float64)
    return 0.0 if t < SMALLEST else (low + s4 * s4 * high) * power


@inline
def _maximum(x: Any) -> float:
    """The largest of x that is no NaN; −∞ where there is none."""
    lanes = np.full(LANES, -np.inf, x.dtype)
    for first in range(0, x.size, LANES):
        piece = x[first : first + LANES]
        for k in range(piece.size):
            lanes[k] = piece[k] if piece[k] > lanes[k] else lanes[k]
    return np.float64(lanes.max())


@inline
def _first(x: Any, value: float) -> int:
    """The smallest index where x is ``value``, which it is somewhere; LLVM compares a whole piece at once, but stops at no element."""
    sought = x.dtype.type(value)
    for first in range(0, x.size, LANES):
        piece = x[first : first + LANES]
        found = np.int32(0)
        for k in range(piece.size):
            found |= np.int32(piece[k] == sought)
        if found:
            for k in range(piece.size):
                if piece[k] == sought:
                    return first + k
    return 0


@inline
def _raise(x: Any, largest: Any, top_id: Any, m: int, i: int, v0: int) -> float:
    """Include x in the largest logit of member m at position i, and its id: by what factor e^(x − largest) so far shrink."""
    before = largest[m, i]
    value = _maximum(x)
    if value > before:  # of equal ones the earlier id; never once there was a NaN
        largest[m, i], top_id[m, i] = value, v0 + _first(x, value)
        return exponential(before - value)  # type: ignore[no-any-return]  # numba's
    return 1.0


@inline
def _offset(largest: float) -> float:
    """What is subtracted before eˣ: 0 as long as all were −∞."""
    return 0.0 if largest == -np.inf else largest


@inline
def _add_total(x: Any, m: int, i: int, grown: float, added: float, largest: Any, total: Any) -> None:
    """Σ e^(x − largest) by the sum over a slice; a NaN among the logits makes ``largest`` NaN."""
    total[m, i] = total[m, i] * grown + added
    if np.isnan(added) and np.isnan(x).any():  # an infinite logit makes the sum NaN, too
        largest[m, i] = np.nan


@kernel
def _add_own(x: Any, weights: Any, shrink: Any, largest: Any, total: Any, top_id: Any, m: int, a: int, v0: int) -> None:
    """Positions a … of member m; e^(x − largest) and the factor of the sums so far are kept for those that are compared with it."""
    lanes = np.empty(LANES)
    for t in range(x.shape[0]):
        row, i = x[t], a + t
        shrink[t] = _raise(row, largest, top_id, m, i, v0)
        offset = _offset(largest[m, i])
        lanes[:] = 0.0
        for first in range(0, row.size, LANES):
            piece, weight = row[first : first + LANES], weights[t, first : first + LANES]
            for k in range(piece.size):
                e = exponential(np.float64(piece[k]) - offset)
                weight[k] = e
                lanes[k] += e
        _add_total(row, m, i, shrink[t], lanes.sum(), largest, total)


@kernel
def _add_compared(
    x: Any, r: Any, weights: Any, shrink: Any, largest: Any, total: Any, cross: Any, top_id: Any, m: int, a: int, v0: int
) -> None:
    """Positions a … of member m beside the original's logits r, whose ``weights`` and ``shrink`` there are already."""
    lanes, crossed = np.empty(LANES), np.empty(LANES)
    for t in range(x.shape[0]):
        row, i = x[t], a + t
        grown = _raise(row, largest, top_id, m, i, v0)
        offset = _offset(largest[m, i])
        lanes[:], crossed[:] = 0.0, 0.0
        for first in range(0, row.size, LANES):
            piece, ref, weight = row[first : first + LANES], r[t, first : first + LANES], weights[t, first : first + LANES]
            for k in range(piece.size):
                v, w = np.float64(piece[k]), weight[k]
                lanes[k] += exponential(v - offset)
                term = w * (np.float64(ref[k]) - v)
                crossed[k] += 0.0 if w == 0.0 else term  # p = 0 contributes nothing, though r − x may be infinite
        so_far = cross[m, i] * shrink[t] if shrink[t] > 0.0 else 0.0
        cross[m, i] = so_far + crossed.sum()
        _add_total(row, m, i, grown, lanes.sum(), largest, total)


def add_slice(
    v0: int,
    members: Sequence[NDArray[Any]],
    *,
    largest: Floats,
    total: Floats,
    cross: Floats,
    top_id: NDArray[np.int64],
    has_reference: bool,
) -> None:
    """Include logits [n,dv] of each member, float32 or float64 in C order, for the ids from v0 on; the sums [M,n] change in place."""
    n, dv = members[0].shape
    step = max(1, TILE // dv)

    def work(numbers: NDArray[np.int64], _: Any) -> None:
        first, last = int(numbers[0, 0]), int(numbers[-1, 0]) + 1
        weights, shrink = np.empty((min(step, last - first), dv)), np.empty(min(step, last - first))
        for a in range(first, last, step):
            rows = slice(a, min(a + step, last))
            for m, x in enumerate(members):
                if has_reference and m:
                    r = members[0][rows]
                    _add_compared(x[rows], r, weights, shrink, largest, total, cross, top_id, m, a, v0)
                else:
                    _add_own(x[rows], weights, shrink, largest, total, top_id, m, a, v0)

    # share_out goes by bytes, so a position's number is repeated until it is as large as the position's logits
    row_bytes = dv * sum(x.itemsize for x in members)
    share_out(work, np.broadcast_to(np.arange(n)[:, None], (n, row_bytes // 8 + 1)), np.empty((n, 0)))
