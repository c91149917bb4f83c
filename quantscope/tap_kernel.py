"""Sums of float32 taps in main memory: one pass over x and the original, about as fast as the memory delivers them.

A chunk is cut into blocks of 64 positions, which the threads share; every block has its own sums, and these are added up in the order
of the positions.  So the result does not depend on the number of threads.

Sums are float64, of exact products (two float32 mantissas fit into one float64).  One running sum per channel, modulo 256 for those that
go over all channels, lets LLVM compute them side by side: it may not reorder a single one.  The longest chain of additions is then
k = 32·⌈channels/256⌉ + 256 + ⌈T/64⌉, and the error of a sum at most k·2⁻⁵³ (10⁻¹³ at 5,632 channels) of the sum of the magnitudes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantscope.quants.kernel import inline, kernel
from quantscope.quants.threads import share_out
from quantscope.tap_sums import MASSIVE, ChunkSums, massive_limit

BLOCK_ROWS = 64
LANES = 256  # running sums side by side: they fit into the first-level cache beside two rows of such a piece
N_SUMS = 4  # Σx, Σr², Σr·x, Σ(r − x)²

Activations = NDArray[np.float32]


@inline
def _extremes(bits: Any, keys: Any) -> None:
    """The smallest and the largest key of one row into keys[0], keys[1].

    float32 bits as int32:  s eeeeeeee mmm...    s = 0: they already rise with the value;  s = 1: they fall, so the 31 bits are flipped.
    Keys are integers, whose minimum LLVM may compute in any order; NaNs lie beyond the infinities, at one end or the other.
    """
    low, high = np.int32(2**31 - 1), np.int32(-(2**31))
    for k in range(bits.size):
        key = np.int32(bits[k] ^ ((bits[k] >> np.int32(31)) & np.int32(0x7FFFFFFF)))
        low, high = min(low, key), max(high, key)
    keys[0], keys[1] = low, high


@inline
def _add_rows(x0: Any, x1: Any, r0: Any, r1: Any, lanes: Any, channel_xx: Any) -> None:
    """Add two rows of x and r: two at a time halve the traffic to the running sums."""
    for first in range(0, x0.size, LANES):
        a, b, xx = x0[first : first + LANES], x1[first : first + LANES], channel_xx[first : first + LANES]
        ra, rb = r0[first : first + LANES], r1[first : first + LANES]
        for k in range(xx.size):
            v, r = np.float64(a[k]), np.float64(ra[k])
            w, s = np.float64(b[k]), np.float64(rb[k])
            d, e = r - v, s - w
            xx[k] += v * v + w * w
            lanes[k] += v + w
            lanes[LANES + k] += r * r + s * s
            lanes[2 * LANES + k] += r * v + s * w
            lanes[3 * LANES + k] += d * d + e * e


@kernel
def _sum_blocks(numbers: Any, sums: Any, x: Any, ref: Any, bits: Any, keys: Any, T: int) -> None:
    """sums[i] = N_SUMS sums, then Σx² of each channel, of block numbers[i]; and the extreme keys of its rows.

    x, ref, bits (those of x): [C·T,channels]; keys: [C·T,2].
    """
    per_chunk = (T + BLOCK_ROWS - 1) // BLOCK_ROWS
    zeros = np.zeros(x.shape[1], np.float32)  # the partner of an odd last row
    for i in range(numbers.size):
        chunk, part = divmod(numbers[i], per_chunk)
        first = chunk * T + part * BLOCK_ROWS
        last = min(first + BLOCK_ROWS, chunk * T + T)
        lanes = np.zeros(N_SUMS * LANES)
        sums[i] = 0.0
        for t in range(first, last, 2):
            paired = t + 1 < last
            _add_rows(x[t], x[t + 1] if paired else zeros, ref[t], ref[t + 1] if paired else zeros, lanes, sums[i, N_SUMS:])
            _extremes(bits[t], keys[t])  # of rows that are in the cache by now
            if paired:
                _extremes(bits[t + 1], keys[t + 1])
        for k in range(N_SUMS):
            for lane in range(LANES):
                sums[i, k] += lanes[k * LANES + lane]


def kernel_sums(ref: Activations | None, x: Activations) -> ChunkSums:
    """``ChunkSums`` of arrays in C order, [C,T,channels], nothing empty."""
    C, T, channels = x.shape
    n_blocks = C * -(-T // BLOCK_ROWS)
    sums, keys = np.empty((n_blocks, N_SUMS + channels)), np.empty((C * T, 2), np.int32)
    rows, ref_rows = x.reshape(-1, channels), (x if ref is None else ref).reshape(-1, channels)

    def work(numbers: NDArray[np.int64], out: NDArray[np.float64]) -> None:
        _sum_blocks(numbers[:, 0].copy(), out, rows, ref_rows, rows.view(np.int32), keys, T)

    # share_out goes by bytes, so a block's number is repeated until it is as large as the block's values
    share_out(work, np.broadcast_to(np.arange(n_blocks)[:, None], (n_blocks, min(T, BLOCK_ROWS) * channels // 2 + 1)), sums)
    totals = sums.reshape(C, -1, N_SUMS + channels).sum(1)  # [C, ...], one block after the other
    if ref is None:
        totals[:, 1:N_SUMS] = 0
    total, rr, rx, dd = totals[:, :N_SUMS].T
    return ChunkSums(total, rr, rx, dd, totals[:, N_SUMS:], *_places(x, keys.reshape(C, T, 2)))


def _places(x: Activations, keys: NDArray[np.int32]) -> tuple[Any, ...]:
    """The fields of ChunkSums from ``low`` on, from the extreme keys of every row, [C,T,2]."""
    low, high = np.moveaxis((keys ^ ((keys >> 31) & 0x7FFFFFFF)).view(np.float32), -1, 0)  # [C,T]; the key of a key is the value
    row_max = np.maximum(np.abs(low), np.abs(high))  # NaN where the row has one
    chunks = np.arange(len(x))
    position = row_max.argmax(-1)  # the first NaN, else the first maximum
    channel = np.abs(x[chunks, position]).argmax(-1)
    abs_max = row_max[chunks, position].astype(np.float64)
    lowest, highest = (np.where(np.isnan(abs_max), np.nan, v.astype(np.float64)) for v in (low.min(-1), high.max(-1)))
    n_non_finite, n_massive = np.zeros(len(x), np.int64), np.zeros(len(x), np.int64)
    for c in np.flatnonzero(~np.isfinite(abs_max)):
        n_non_finite[c] = np.count_nonzero(~np.isfinite(x[c, ~np.isfinite(row_max[c])]))
    for c in np.flatnonzero(abs_max > MASSIVE):
        n_massive[c] = _n_massive(x[c], row_max[c])
    return lowest, highest, abs_max, position, channel, n_non_finite, n_massive


def _n_massive(x: Activations, row_max: Activations) -> int:
    """The massive activations of one chunk [T,channels] that has no NaN; only rows that can hold one are searched."""
    limit = massive_limit(_median_magnitude(x))
    return int(np.count_nonzero(np.abs(x[row_max > MASSIVE]).astype(np.float64) > limit))


def _median_magnitude(x: Activations) -> float:
    """The exact median of |x|; the bits of magnitudes rise with them, and numpy selects integers ten times faster than numpy.median."""
    bits = x.view(np.uint32).ravel() & np.uint32(0x7FFFFFFF)
    middle = bits.size // 2
    bits.partition(middle)
    upper = bits[middle]
    lower = upper if bits.size % 2 else bits[:middle].max()
    return float(np.array([lower, upper], np.uint32).view(np.float32).astype(np.float64).mean())
