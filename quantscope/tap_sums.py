"""Sums of one tap, chunk by chunk: what ``tap_stats`` makes its summaries of, and how torch computes it.

Any float dtype on any device goes through here; float32 on the CPU, where the time is spent, has its own kernel (``tap_kernel``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MASSIVE = 100.0  # an activation is massive above this |x| ...
MASSIVE_TIMES = 1000.0  # ... that is also above this multiple of the median |x|

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class ChunkSums:
    """Sums over each chunk of a tap x [C,T,channels] and of the original's r; [C] unless said otherwise.

    x, rr, rx, dd: Σx, Σr², Σr·x, Σ(r − x)²; the last three are 0 without an original.  channel_xx: Σx² over the positions,
    [C,channels].  low, high, abs_max: min x, max x, max |x|, NaN where the chunk has a NaN.  position, channel: where |x| is largest,
    the first in order of positions, then channels; a NaN is larger than anything.  n_massive: ``massive_limit``.
    """

    x: Floats
    rr: Floats
    rx: Floats
    dd: Floats
    channel_xx: Floats
    low: Floats
    high: Floats
    abs_max: Floats
    position: Integers
    channel: Integers
    n_non_finite: Integers
    n_massive: Integers


def massive_limit(median: float) -> float:
    """max(100, 1000 · median |x|): |x| above it is a massive activation; NaN (so nothing is above) where the median is.

    median: of |x| over the positions and channels of one chunk of the tap; of an even number, the mean of the two in the middle.
    Source: Sun et al. 2024, "Massive Activations in Large Language Models" (there: above 100 and about 1000 times the median or more).
    """
    return median if np.isnan(median) else max(MASSIVE, MASSIVE_TIMES * median)


def torch_sums(ref: Tensor | None, x: Tensor) -> ChunkSums:
    """``ChunkSums`` by torch, one chunk after the other as the float64 copies are large.

    ref, x: [C,T,channels], any float dtype and device, nothing empty; sums in float64.
    """
    shown = x if ref is None else ref.to(x.device)
    parts = [_one_chunk(r, c) for r, c in zip(shown.detach(), x.detach(), strict=True)]
    numbers = torch.stack([row for row, _ in parts]).cpu().numpy()  # [C,9], the one wait for the device
    total, rr, rx, dd, low, high, abs_max, index, n_non_finite = numbers.T
    if ref is None:
        rr = rx = dd = np.zeros(len(x))
    n_massive = np.zeros(len(x), np.int64)
    for c in np.flatnonzero(abs_max > MASSIVE):
        n_massive[c] = _n_massive(x[c])
    position, channel = np.divmod(index.astype(np.int64), x.shape[-1])
    channel_xx = torch.stack([xx for _, xx in parts]).cpu().numpy()
    return ChunkSums(total, rr, rx, dd, channel_xx, low, high, abs_max, position, channel, n_non_finite.astype(np.int64), n_massive)


def _one_chunk(ref: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The nine numbers of one chunk [T,channels] that ``torch_sums`` names, and Σx² per channel."""
    r, v = ref.double(), x.double()  # sums in float64
    magnitude = v.abs()
    top = magnitude.amax()  # NaN where there is one
    first = ((magnitude == top) | magnitude.isnan()).flatten().to(torch.uint8).argmax()
    row = [v.sum(), (r * r).sum(), (r * v).sum(), (r - v).square().sum(), v.amin(), v.amax(), top, first, (~v.isfinite()).sum()]
    return torch.stack([n.double() for n in row]), v.square().sum(0)


def _n_massive(x: Tensor) -> int:
    """The massive activations of one chunk that has no NaN."""
    magnitude = x.detach().double().abs().flatten().sort().values  # kthvalue takes quadratic time where many are equal
    n = magnitude.numel()
    median = float(magnitude[(n - 1) // 2] + magnitude[n // 2]) / 2  # the same one twice where n is odd
    return int((magnitude > massive_limit(median)).sum())
