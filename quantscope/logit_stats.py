"""Values per position → the statistics that llama-perplexity prints, and intervals that hold when positions of a chunk are related.

Definitions and standard errors are those of ``kl_divergence()`` in llama.cpp's tools/perplexity/perplexity.cpp, whose standard errors
take positions as independent.  They are not: a hard passage is hard for many positions.  Chunks are (nearly) independent, so intervals
come from the means of the chunks, with Student's t.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from quantscope.results import Histogram, LogitStats, Paired

Floats = NDArray[np.float64]

CONFIDENCE = 0.95
MIN_CHUNKS = 8  # before a study may stop early: fewer means are close to each other by luck too often, and the interval is short then
HISTOGRAM_LOW, HISTOGRAM_HIGH, PER_DECADE = -10, 2, 5  # of the KL divergences: log10 of the ends, and bins in each decade
quiet = np.errstate(invalid="ignore", over="ignore")  # a broken variant has infinite and NaN values: they are results, not warnings
KL_PERCENTILES = {"p999": 0.999, "p99": 0.99, "p95": 0.95, "p90": 0.9, "median": 0.5, "p10": 0.1, "p05": 0.05, "p01": 0.01, "p001": 0.001}
DP_PERCENTILES = KL_PERCENTILES | {"p75": 0.75, "p25": 0.25}


@quiet
def logit_stats(
    *,
    n_positions: int,
    kl: Floats | None = None,
    same_top: NDArray[Any] | None = None,
    log_p: Floats | None = None,
    ref_log_p: Floats | None = None,
) -> LogitStats:
    """Statistics of one variant from its values at each scored position, [C,P] of C chunks.

    kl: KL divergence from the original [nats]; same_top: whether the most probable token is the same; log_p, ref_log_p: ln probability
    of the token that follows, the variant's and the original's.  What is not given stays None.
    """
    found: dict[str, float | None] = {}
    if kl is not None:
        found |= _kl(kl)
    if same_top is not None:
        agree, n = float(same_top.mean()), same_top.size
        found |= {"top1_agree": agree, "top1_agree_se": math.sqrt(agree * (1 - agree) / (n - 1)) if n > 1 else math.nan}
    if log_p is not None:
        nll, se = mean_and_se(-log_p)
        found |= {"ppl": _exp(nll), "ppl_se": _exp(nll) * se}  # the error of exp(x), to first order
        if ref_log_p is not None:
            found |= _against(-log_p, -ref_log_p) | _dp(log_p, ref_log_p)
    return LogitStats(n_positions=n_positions, kl_histogram=None if kl is None else log_histogram(kl), **found)


def log_histogram(values: NDArray[Any]) -> Histogram:
    """How many values are in each fifth of a decade from 10⁻¹⁰ to 10²; every value is counted once, somewhere."""
    n_bins = (HISTOGRAM_HIGH - HISTOGRAM_LOW) * PER_DECADE
    edges = [10.0 ** (HISTOGRAM_LOW + i / PER_DECADE) for i in range(n_bins + 1)]
    known = values[~np.isnan(values)]
    below, *counts, above = np.bincount(np.searchsorted(edges, known, "right"), minlength=len(edges) + 1).tolist()
    return Histogram(float(HISTOGRAM_LOW), PER_DECADE, tuple(counts), below, above, values.size - known.size)


def _kl(kl: Floats) -> dict[str, float | None]:
    mean, se = mean_and_se(kl)
    out: dict[str, float | None] = {"kl_nats": mean, "kl_nats_se": se, "kl_nats_max": float(kl.max()), "kl_nats_min": float(kl.min())}
    if len(kl) > 1:
        half = half_width(kl.mean(1))
        out |= {"kl_nats_low": mean - half, "kl_nats_high": mean + half}
    return out | _percentiles(kl, "kl_nats", KL_PERCENTILES)


def _dp(log_p: Floats, ref_log_p: Floats) -> dict[str, float | None]:
    """Δp = p − p of the original: mean, extremes, percentiles, and RMS Δp = sqrt(mean Δp²) with its error to first order."""
    dp = np.exp(log_p) - np.exp(ref_log_p)
    mean, se = mean_and_se(dp)
    square, square_se = mean_and_se(dp**2)
    rms = math.sqrt(square)
    out: dict[str, float | None] = {"dp_mean": mean, "dp_mean_se": se, "dp_max": float(dp.max()), "dp_min": float(dp.min())}
    out |= {"rms_dp": rms, "rms_dp_se": 0.5 / rms * square_se if rms else 0.0}
    return out | _percentiles(dp, "dp", DP_PERCENTILES)


def _against(nll: Floats, ref_nll: Floats) -> dict[str, float | None]:
    """Ratio and difference of perplexities, whose errors take into account that both are over the same tokens."""
    (q, q_se), (base, base_se) = mean_and_se(nll), mean_and_se(ref_nll)
    log_ratio, log_ratio_se = mean_and_se(nll - ref_nll)
    ratio = _exp(log_ratio)
    ppl_q, ppl_base = _exp(q), _exp(base)
    n = nll.size
    covariance = float(((nll - q) * (ref_nll - base)).sum() / (n - 1) / n) if n > 1 else math.nan  # of the two means
    variance = (ppl_q * q_se) ** 2 + (ppl_base * base_se) ** 2 - 2 * ppl_q * ppl_base * covariance
    return {
        "ln_ppl_ratio": log_ratio,
        "ln_ppl_ratio_se": log_ratio_se,
        "ppl_ratio": ratio,
        "ppl_ratio_se": ratio * log_ratio_se,
        "ppl_diff": ppl_q - ppl_base,
        "ppl_diff_se": math.sqrt(max(variance, 0.0)) if math.isfinite(variance) else math.nan,
        "ln_ppl_cor": covariance / (q_se * base_se) if q_se and base_se else math.nan,
    }


def _percentiles(values: Floats, prefix: str, fractions: dict[str, float]) -> dict[str, float | None]:
    """Linear between neighbours, as llama-perplexity does; NaN where there is one.

    numpy.quantile computes a + t·(b − a), which turns all percentiles of values into NaN that are next to an infinite one.
    """
    ordered = np.sort(values, axis=None).tolist()  # NaNs last
    out: dict[str, float | None] = {}
    for name, fraction in fractions.items():
        t, i = math.modf(fraction * (len(ordered) - 1))
        a, b = ordered[int(i)], ordered[min(int(i) + 1, len(ordered) - 1)]
        between = (1 - t) * a + t * b if t else a
        out[f"{prefix}_{name}"] = math.nan if math.isnan(ordered[-1]) else between
    return out


def _exp(x: float) -> float:
    """eˣ, infinity where that is too large for a float64."""
    return math.exp(x) if x < 709 else math.inf if x >= 709 else math.nan


def mean_and_se(values: Floats) -> tuple[float, float]:
    """Mean and sqrt(Σ (x − mean)² / (n − 1) / n), over all values as if independent; NaN for the error of a single one."""
    n = values.size
    return float(values.mean()), float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan


def half_width(means: Floats) -> float:
    """Half-width of the 95 % interval of the mean of independent values [n], t · s / √n with n − 1 degrees of freedom; n ≥ 2."""
    from scipy.special import stdtrit

    n = len(means)
    return float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * float(means.std(ddof=1)) / math.sqrt(n)


@quiet
def relative_half_width(kl: Floats) -> float:
    """How well the mean KL divergence is known: half-width of its 95 % interval over the chunks of kl [C,P], divided by the mean.

    Infinity with fewer than 8 chunks, whose means may be close by luck, and where a value is not finite; 0 where nothing differs.
    """
    if not kl.any():
        return 0.0
    width = half_width(kl.mean(1)) / float(kl.mean()) if len(kl) >= MIN_CHUNKS else math.inf
    return math.inf if math.isnan(width) else width


@quiet
def paired(name_a: str, kl_a: Floats, name_b: str, kl_b: Floats) -> Paired:
    """Which of two variants is closer to the original, from their KL divergences [C,P] at the same positions.

    The 95 % interval is of the mean of kl_a − kl_b, over the chunks' means; over the positions, taken as independent, where there is a
    single chunk.  Each interval is for one pair: of 20 pairs of equals one is expected to be told apart.
    """
    difference = kl_a - kl_b
    unit: Literal["chunk", "position"] = "chunk" if len(difference) > 1 else "position"
    units = difference.mean(1) if unit == "chunk" else difference.flatten()
    mean = float(difference.mean())
    half = half_width(units) if len(units) > 1 else math.nan
    low, high = mean - half, mean + half
    better = name_a if high < 0 else name_b if low > 0 else None
    return Paired(name_a, name_b, mean, low, high, unit, len(units), better)


def all_pairs(names: Sequence[str], kl: Sequence[Floats]) -> tuple[Paired, ...]:
    """``paired`` of every two variants, in their order."""
    return tuple(paired(a, x, b, y) for (a, x), (b, y) in combinations(zip(names, kl, strict=True), 2))
