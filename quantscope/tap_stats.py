"""Statistics of a tap over a whole text: one pass, a *summary vector* per chunk, which merge like one long chunk.

    vectors = measure(ref, x, chunk0=c)          [C,N]  one vector per chunk of x [C,T,channels]
    total = merge(total, fold(vectors))          [N]    from ``empty()`` on
    TapStats.from_vector(total).rms

A summary vector is float64 [N], N = ``len(Column)``; r is the same tap of the original, sums are over all positions and channels:

    N                   how many values
    MEAN, M2            Σx/n, Σ(x − mean)²
    XX, RR, RX, DD      Σx², Σr², Σr·x, Σ(r − x)²; without an original the last three are 0
    MIN, MAX            of x
    ABS_MAX             largest |x|;  ABS_MAX_CHUNK, ABS_MAX_POSITION, ABS_MAX_CHANNEL: where, the first of several
    N_MASSIVE           how many massive activations (below)
    MASSIVE_MAX         |x| of the largest of them;  MASSIVE_CHUNK, MASSIVE_POSITION, MASSIVE_CHANNEL: where
    N_NON_FINITE        how many NaNs and infinities
    N_CHUNKS            how many chunks
    RMS_MEAN, RMS_M2    mean of the chunks' RMS, and the sum of their squared deviations from it; likewise MEAN_MEAN, MEAN_M2 of the
                        mean, NMSE_MEAN, NMSE_M2 of Σ(r − x)²/Σr², OUTLIERS_MEAN, OUTLIERS_M2 of the share of outlier channels

**Outlier channel** of a chunk: its RMS over the chunk's positions is more than 6 times the median of these RMS over the channels,
sqrt(Σ_t x²/T) > 6 · median.  In the spirit of LLM.int8() (Dettmers et al. 2022), whose criterion is |x| ≥ 6; this one is relative, as taps
have different scales.  **Massive activation**: |x| > 100 and |x| > 1000 · median |x| of the chunk (Sun et al. 2024, ``massive_limit``).

NaN and infinity spread through every sum they enter, and a NaN counts as the largest |x|, so that its place is shown.  A chunk with a
NaN has no median: no massive activations, and NaN as its share of outlier channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantscope.errors import ShapeError
from quantscope.metrics import same_shape
from quantscope.quants.kernel import inline, kernel
from quantscope.results import OpRow
from quantscope.tap_kernel import kernel_sums
from quantscope.tap_sums import ChunkSums, Floats, torch_sums

OUTLIER_TIMES = 6.0  # a channel is an outlier above this multiple of the median channel RMS


class Column(IntEnum):
    """The columns of a summary vector; each M2 follows its mean, each place (chunk, position, channel) its maximum."""

    N = 0
    MEAN = 1
    M2 = 2
    XX = 3
    RR = 4
    RX = 5
    DD = 6
    MIN = 7
    MAX = 8
    ABS_MAX = 9
    ABS_MAX_CHUNK = 10
    ABS_MAX_POSITION = 11
    ABS_MAX_CHANNEL = 12
    N_MASSIVE = 13
    MASSIVE_MAX = 14
    MASSIVE_CHUNK = 15
    MASSIVE_POSITION = 16
    MASSIVE_CHANNEL = 17
    N_NON_FINITE = 18
    N_CHUNKS = 19
    RMS_MEAN = 20
    RMS_M2 = 21
    MEAN_MEAN = 22
    MEAN_M2 = 23
    NMSE_MEAN = 24
    NMSE_M2 = 25
    OUTLIERS_MEAN = 26
    OUTLIERS_M2 = 27


SUMS = (Column.XX, Column.RR, Column.RX, Column.DD, Column.N_MASSIVE, Column.N_NON_FINITE)
PER_CHUNK = (Column.RMS_MEAN, Column.MEAN_MEAN, Column.NMSE_MEAN, Column.OUTLIERS_MEAN)


def empty(shape: tuple[int, ...] = ()) -> Floats:
    """Summaries of nothing, [*shape,N]: 0 everywhere, the extremes infinitely far away, places −1."""
    out = np.zeros((*shape, len(Column)))
    out[..., Column.MIN] = math.inf
    out[..., Column.MAX] = -math.inf
    for largest in (Column.ABS_MAX, Column.MASSIVE_MAX):
        out[..., largest] = -math.inf
        out[..., largest + 1 : largest + 4] = -1
    return out


# ---- One chunk -----------------------------------------------------------------------------------------------------------------------


def measure(ref: Tensor | None, x: Tensor, *, chunk0: int = 0, position0: int = 0) -> Floats:
    """One summary vector per chunk, [C,N].

    ref, x: [C,T,channels], any float dtype, device and strides; sums in float64 (their error: ``tap_kernel``).  chunk0: number of the
    first chunk in the text; position0: number of the first position given, which places are counted from.  M2 is Σx² − (Σx)²/n within a
    chunk, so a standard deviation below about 10⁻⁶ of the RMS is rounding.  A chunk without values gives ``empty()``.
    Raises ShapeError when the shapes differ, or are not three axes.
    """
    if x.ndim != 3:
        raise ShapeError(f"measure: expected a tap [chunks, positions, channels], found the shape {tuple(x.shape)}.")
    if ref is not None:
        same_shape(ref, x)
    out = empty((len(x),))
    if x.numel():
        sums = _sums(ref, x)
        _fill_sums(out, sums, x.shape[1] * x.shape[2])
        _fill_places(out, sums, chunk0, position0)
        _fill_per_chunk(out, outlier_share(sums.channel_xx, x.shape[1]))
    return out


def _sums(ref: Tensor | None, x: Tensor) -> ChunkSums:
    if all(t.device.type == "cpu" and t.dtype == torch.float32 for t in (x, x if ref is None else ref)):
        return kernel_sums(None if ref is None else ref.detach().contiguous().numpy(), x.detach().contiguous().numpy())
    return torch_sums(ref, x)


def _fill_sums(out: Floats, sums: ChunkSums, n: int) -> None:
    """The columns that are sums over the values, n per chunk."""
    xx = sums.channel_xx.sum(-1)
    with np.errstate(invalid="ignore"):  # ∞ − ∞
        m2 = np.maximum(xx - sums.x * sums.x / n, 0.0)
    out[:, Column.N], out[:, Column.MEAN], out[:, Column.M2] = n, sums.x / n, m2
    out[:, Column.XX], out[:, Column.RR], out[:, Column.RX], out[:, Column.DD] = xx, sums.rr, sums.rx, sums.dd
    out[:, Column.MIN], out[:, Column.MAX], out[:, Column.N_NON_FINITE] = sums.low, sums.high, sums.n_non_finite


def _fill_places(out: Floats, sums: ChunkSums, chunk0: int, position0: int) -> None:
    """The largest |x| of each chunk, which is also its largest massive activation, where it has one."""
    at = np.stack([sums.abs_max, chunk0 + np.arange(len(out)), position0 + sums.position, sums.channel], axis=-1)
    out[:, Column.ABS_MAX : Column.ABS_MAX + 4] = at
    out[:, Column.N_MASSIVE] = sums.n_massive
    has = sums.n_massive > 0
    out[has, Column.MASSIVE_MAX : Column.MASSIVE_MAX + 4] = at[has]


def _fill_per_chunk(out: Floats, outliers: Floats) -> None:
    """What is averaged over chunks; a single chunk deviates from its mean by 0."""
    out[:, Column.N_CHUNKS] = 1
    out[:, Column.RMS_MEAN] = np.sqrt(out[:, Column.XX] / out[:, Column.N])
    out[:, Column.MEAN_MEAN] = out[:, Column.MEAN]
    out[:, Column.NMSE_MEAN] = [_nmse(dd, rr) for dd, rr in out[:, (Column.DD, Column.RR)].tolist()]
    out[:, Column.OUTLIERS_MEAN] = outliers


def outlier_share(channel_xx: Floats, n_positions: int) -> Floats:
    """Share of the channels whose RMS over the positions is more than 6 times the median of these RMS.

    channel_xx: Σx² over the positions of each channel, [C,channels].  Returns [C], 0 … 1; NaN where a channel's is NaN.  The median of
    an even number of channels is the mean of the two in the middle.  Source: in the spirit of LLM.int8(), Dettmers et al. 2022.
    """
    upper_middle = channel_xx.shape[-1] // 2
    ordered = np.partition(channel_xx, upper_middle, axis=-1)  # NaNs last
    upper = ordered[:, upper_middle]
    lower = upper if channel_xx.shape[-1] % 2 else ordered[:, :upper_middle].max(-1)
    median = (np.sqrt(lower / n_positions) + np.sqrt(upper / n_positions)) / 2  # [C]
    share: Floats = (channel_xx > (OUTLIER_TIMES * median[:, None]) ** 2 * n_positions).mean(-1)
    return np.where(np.isnan(channel_xx).any(-1), np.nan, share)


# ---- Merging -------------------------------------------------------------------------------------------------------------------------


@inline
def _merge_moments(a: Any, b: Any, out: Any, count: int, mean: int) -> None:
    """Mean and M2 (the column after it) of both: mean = mean_a + δ·n_b/n, M2 = M2_a + M2_b + δ²·n_a·n_b/n, δ = mean_b − mean_a.

    Source: Chan, Golub, LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
    """
    n = a[count] + b[count]
    delta = b[mean] - a[mean]
    out[mean] = a[mean] + delta * (b[count] / n)
    out[mean + 1] = a[mean + 1] + b[mean + 1] + delta * delta * (a[count] * b[count] / n)


@inline
def _merge_largest(a: Any, b: Any, out: Any, largest: int) -> None:
    """The larger value with its place (the three columns after it); of equal ones the first, and a NaN is larger than anything."""
    second = b[largest] > a[largest] or (np.isnan(b[largest]) and not np.isnan(a[largest]))
    for k in range(largest, largest + 4):
        out[k] = b[k] if second else a[k]


@kernel
def _merge_rows(a: Any, b: Any, out: Any) -> None:
    for i in range(a.shape[0]):
        p, q, o = a[i], b[i], out[i]
        if p[Column.N] == 0 or q[Column.N] == 0:
            o[:] = q if p[Column.N] == 0 else p
            continue
        _merge_moments(p, q, o, Column.N, Column.MEAN)
        for mean in PER_CHUNK:
            _merge_moments(p, q, o, Column.N_CHUNKS, mean)
        for k in SUMS:
            o[k] = p[k] + q[k]
        o[Column.N], o[Column.N_CHUNKS] = p[Column.N] + q[Column.N], p[Column.N_CHUNKS] + q[Column.N_CHUNKS]
        o[Column.MIN] = q[Column.MIN] if q[Column.MIN] < p[Column.MIN] or np.isnan(q[Column.MIN]) else p[Column.MIN]
        o[Column.MAX] = q[Column.MAX] if q[Column.MAX] > p[Column.MAX] or np.isnan(q[Column.MAX]) else p[Column.MAX]
        _merge_largest(p, q, o, Column.ABS_MAX)
        _merge_largest(p, q, o, Column.MASSIVE_MAX)


def merge(a: Floats, b: Floats) -> Floats:
    """The summaries of both, a before b; [...,N] each, entry by entry.

    Merging with ``empty()`` changes no bit.  Merging in another grouping gives the same counts, extremes and places, and everything else
    that is finite up to rounding.  Raises ShapeError when the shapes differ.
    """
    if a.shape != b.shape or a.shape[-1] != len(Column):
        raise ShapeError(f"merge: expected two equal shapes [..., {len(Column)}], found {a.shape} and {b.shape}.")
    out = np.empty(a.shape)
    rows = (np.ascontiguousarray(v, np.float64).reshape(-1, len(Column)) for v in (a, b))
    _merge_rows(*rows, out.reshape(-1, len(Column)))
    return out


def fold(vectors: Floats) -> Floats:
    """[...,C,N] → [...,N]: chunk after chunk, from the first on; no chunks give ``empty()``."""
    out = empty(vectors.shape[:-2])
    for c in range(vectors.shape[-2]):
        out = merge(out, vectors[..., c, :])
    return out


# ---- Reading -------------------------------------------------------------------------------------------------------------------------


def _nmse(dd: float, rr: float) -> float:
    """Σ(r − x)²/Σr²; 0 where both are zero, infinity where only the original is."""
    if rr == 0 and not math.isnan(dd):
        return math.inf if dd else 0.0
    return dd / rr if rr else math.nan


def _cos_sim(rr: float, rx: float, xx: float, dd: float) -> float:
    """Σr·x / sqrt(Σr²·Σx²); 1 where both are zero or they are identical, 0 where one is zero."""
    if rr == 0 or xx == 0:
        return 1.0 if rr == xx else 0.0
    if dd == 0:
        return 1.0
    cosine = rx / (math.sqrt(rr) * math.sqrt(xx))
    return cosine if math.isnan(cosine) else max(-1.0, min(1.0, cosine))


@dataclass(frozen=True)
class TapStats:
    """A summary vector as numbers.  n = 0: everything but counts is NaN, places are None.  Without an original nmse, sqnr_db and cos_sim
    say nothing: what was added up is a signal of zeros."""

    n: int
    mean: float
    rms: float  # sqrt(Σx²/n)
    std: float  # sqrt(Σ(x − mean)²/n)
    min: float
    max: float
    abs_max: float
    abs_max_at: tuple[int, int, int] | None  # chunk, position, channel
    nmse: float  # Σ(r − x)²/Σr²; 0 where both are zero, +inf where only the original is
    sqnr_db: float  # −10·log10(nmse); +inf where identical
    cos_sim: float  # Σr·x / sqrt(Σr²·Σx²); 1 where both are zero, 0 where one is
    outlier_share: float  # mean over the chunks
    n_massive: int
    massive_max: float | None  # |x| of the largest massive activation; None where there is none
    massive_at: tuple[int, int, int] | None
    n_non_finite: int
    n_chunks: int
    rms_spread: float  # standard deviation over the chunks, n_chunks − 1 in the denominator; NaN for fewer than two
    mean_spread: float
    nmse_spread: float
    outlier_share_spread: float

    @classmethod
    def from_vector(cls, vector: Floats) -> TapStats:
        """vector: [N], of ``measure``, ``fold`` or ``merge``.  Raises ShapeError for another shape."""
        if vector.shape != (len(Column),):
            raise ShapeError(f"TapStats: expected one summary vector of shape ({len(Column)},), found {vector.shape}.")
        v = dict(zip(Column, vector.tolist(), strict=True))
        n, n_chunks = int(v[Column.N]), int(v[Column.N_CHUNKS])
        nmse = _nmse(v[Column.DD], v[Column.RR]) if n else math.nan
        rms_spread, mean_spread, nmse_spread, outlier_share_spread = (_root(v[Column(m + 1)], n_chunks - 1) for m in PER_CHUNK)
        return cls(
            n=n,
            mean=v[Column.MEAN] if n else math.nan,
            rms=_root(v[Column.XX], n),
            std=_root(v[Column.M2], n),
            min=v[Column.MIN] if n else math.nan,
            max=v[Column.MAX] if n else math.nan,
            abs_max=v[Column.ABS_MAX] if n else math.nan,
            abs_max_at=_place(vector, Column.ABS_MAX) if n else None,
            nmse=nmse,
            sqnr_db=math.inf if nmse == 0 else -10 * math.log10(nmse),
            cos_sim=_cos_sim(v[Column.RR], v[Column.RX], v[Column.XX], v[Column.DD]) if n else math.nan,
            outlier_share=v[Column.OUTLIERS_MEAN] if n else math.nan,
            n_massive=int(v[Column.N_MASSIVE]),
            massive_max=v[Column.MASSIVE_MAX] if v[Column.N_MASSIVE] else None,
            massive_at=_place(vector, Column.MASSIVE_MAX) if v[Column.N_MASSIVE] else None,
            n_non_finite=int(v[Column.N_NON_FINITE]),
            n_chunks=n_chunks,
            rms_spread=rms_spread,
            mean_spread=mean_spread,
            nmse_spread=nmse_spread,
            outlier_share_spread=outlier_share_spread,
        )


def _root(total: float, n: int) -> float:
    """sqrt(total / n), NaN for no n."""
    return math.sqrt(total / n) if n > 0 else math.nan


def _place(vector: Floats, largest: Column) -> tuple[int, int, int]:
    chunk, position, channel = vector[largest + 1 : largest + 4].astype(np.int64).tolist()
    return chunk, position, channel


def op_row(tap: str, layer: int | None, vector: NDArray[np.float64], compared: bool) -> OpRow:
    """The table row of one tap ("ffn_swiglu", 3) from its summary vector; ``compared``: with the errors against the original."""
    s = TapStats.from_vector(vector)
    place, massive = s.abs_max_at or (None, None, None), s.massive_at or (None, None, None)
    several = s.n_chunks > 1
    return OpRow(
        tap=tap,
        layer=layer,
        n=s.n,
        mean=s.mean,
        rms=s.rms,
        std=s.std,
        min=s.min,
        max=s.max,
        abs_max=s.abs_max,
        abs_max_chunk=place[0],
        abs_max_position=place[1],
        abs_max_channel=place[2],
        nmse=s.nmse if compared else None,
        sqnr_db=s.sqnr_db if compared else None,
        cos_sim=s.cos_sim if compared else None,
        outlier_share=s.outlier_share,
        n_massive=s.n_massive,
        massive_max=s.massive_max,
        massive_chunk=massive[0],
        massive_position=massive[1],
        massive_channel=massive[2],
        n_non_finite=s.n_non_finite,
        n_chunks=s.n_chunks,
        rms_spread=s.rms_spread if several else None,
        mean_spread=s.mean_spread if several else None,
        nmse_spread=s.nmse_spread if several and compared else None,
        outlier_share_spread=s.outlier_share_spread if several else None,
    )
