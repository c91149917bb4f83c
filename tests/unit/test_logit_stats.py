"""Statistics of positions: llama-perplexity's formulas, written a second time as its C++ has them, and intervals that hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from quantscope.logit_stats import MIN_CHUNKS, all_pairs, half_width, log_histogram, logit_stats, mean_and_se, paired, relative_half_width

Floats = NDArray[np.float64]
C, P = 6, 40
RNG = np.random.default_rng(7)
REF_LOG_P = -RNG.gamma(2.0, 1.5, (C, P))
LOG_P = np.minimum(REF_LOG_P + RNG.normal(0, 0.2, (C, P)), -1e-9)
KL = RNG.gamma(0.5, 0.02, (C, P))
SAME = RNG.random((C, P)) < 0.9


def uncertainty(total: float, squares: float, n: int) -> tuple[float, float]:
    """``mean_and_uncertainty`` of perplexity.cpp."""
    f = total / n
    df = squares / n - f * f
    return f, math.sqrt(df / (n - 1))


def test_what_llama_perplexity_prints() -> None:
    s = logit_stats(n_positions=C * P, kl=KL, same_top=SAME, log_p=LOG_P, ref_log_p=REF_LOG_P)
    n = C * P
    nll, base = -LOG_P.ravel(), -REF_LOG_P.ravel()
    log_ppl, log_base = uncertainty(nll.sum(), (nll**2).sum(), n), uncertainty(base.sum(), (base**2).sum(), n)
    cov = ((nll * base).sum() / n - nll.mean() * base.mean()) / (n - 1)
    ratio_se = math.sqrt(log_ppl[1] ** 2 + log_base[1] ** 2 - 2 * cov)
    ppl, ppl_base = math.exp(log_ppl[0]), math.exp(log_base[0])
    assert (s.ppl, s.ppl_se) == pytest.approx((ppl, ppl * log_ppl[1]))
    assert s.ln_ppl_cor == pytest.approx(cov / (log_ppl[1] * log_base[1]))
    assert (s.ln_ppl_ratio, s.ln_ppl_ratio_se) == pytest.approx((log_ppl[0] - log_base[0], ratio_se))
    assert (s.ppl_ratio, s.ppl_ratio_se) == pytest.approx((ppl / ppl_base, ppl / ppl_base * ratio_se))
    se = [ppl * log_ppl[1], ppl_base * log_base[1]]
    assert (s.ppl_diff, s.ppl_diff_se) == pytest.approx((ppl - ppl_base, math.sqrt(se[0] ** 2 + se[1] ** 2 - 2 * ppl * ppl_base * cov)))
    assert (s.kl_nats, s.kl_nats_se) == pytest.approx(uncertainty(KL.sum(), (KL**2).sum(), n))
    dp = np.exp(-nll) - np.exp(-base)
    assert (s.dp_mean, s.dp_mean_se) == pytest.approx(uncertainty(dp.sum(), (dp**2).sum(), n))
    square = uncertainty((dp**2).sum(), (dp**4).sum(), n)
    assert (s.rms_dp, s.rms_dp_se) == pytest.approx((math.sqrt(square[0]), 0.5 / math.sqrt(square[0]) * square[1]))
    assert (s.top1_agree, s.top1_agree_se) == pytest.approx((SAME.mean(), math.sqrt(SAME.mean() * (1 - SAME.mean()) / (n - 1))))


@pytest.mark.parametrize("n_chunks", [1, 2, C])
def test_percentiles_are_linear_between_neighbours(n_chunks: int) -> None:
    s = logit_stats(n_positions=n_chunks * P, kl=KL[:n_chunks], log_p=LOG_P[:n_chunks], ref_log_p=REF_LOG_P[:n_chunks])
    percents = {
        "p999": 99.9,
        "p99": 99,
        "p95": 95,
        "p90": 90,
        "median": 50,
        "p10": 10,
        "p05": 5,
        "p01": 1,
        "p001": 0.1,
        "min": 0,
        "max": 100,
    }
    dp = np.exp(LOG_P[:n_chunks]) - np.exp(REF_LOG_P[:n_chunks])
    for prefix, values, wanted in (("kl_nats", KL[:n_chunks], percents), ("dp", dp, percents | {"p75": 75, "p25": 25})):
        for name, percent in wanted.items():
            assert getattr(s, f"{prefix}_{name}") == pytest.approx(np.percentile(values, percent), rel=1e-12), (prefix, name)
    assert logit_stats(n_positions=1, kl=KL[:1, :1]).kl_nats_p95 == KL[0, 0]


@pytest.mark.parametrize("seed", range(5))
def test_the_histogram_is_numpys(seed: int) -> None:
    kl = 10.0 ** np.random.default_rng(seed).uniform(-12, 4, (C, P))
    kl[0, :4] = 0, -1e-9, np.inf, 1e-10
    s = logit_stats(n_positions=C * P, kl=kl)
    h = s.kl_histogram
    assert h is not None
    assert (h.low, h.per_decade, len(h.counts)) == (-10, 5, 60)
    counts, _ = np.histogram(kl[kl > 0], 10.0 ** (np.arange(61) / h.per_decade + h.low))
    assert h.counts == tuple(counts)
    assert (h.below, h.above) == ((kl < 1e-10).sum(), (kl >= 100).sum())
    assert sum(h.counts) + h.below + h.above == s.n_positions
    kl[1, :3] = np.nan
    broken = log_histogram(kl)
    assert broken.nan == 3
    assert sum(broken.counts) + broken.below + broken.above + broken.nan == kl.size


def test_what_is_not_given_is_not_said() -> None:
    s = logit_stats(n_positions=3)
    assert (s.kl_nats, s.ppl, s.top1_agree, s.rms_dp) == (None, None, None, None)
    assert s.kl_histogram is None
    assert logit_stats(n_positions=3, log_p=LOG_P).ln_ppl_ratio is None
    assert logit_stats(n_positions=P, kl=KL[:1]).kl_nats_low is None  # one chunk has no spread


@pytest.mark.filterwarnings("error")
def test_hopeless_numbers_neither_raise_nor_warn() -> None:
    s = logit_stats(
        n_positions=2, kl=np.array([[np.inf, 1.0], [np.nan, 2.0]]), log_p=np.full((2, 2), -1e4), ref_log_p=np.full((2, 2), -1.0)
    )
    assert s.ppl == math.inf
    for value in (s.kl_nats, s.kl_nats_median, s.kl_nats_p001, s.kl_nats_max, s.kl_nats_low):
        assert value is not None
        assert math.isnan(value)
    p = paired("a", np.array([[np.inf, 1.0], [1.0, 2.0]]), "b", np.ones((2, 2)))
    assert (p.mean_nats, p.better) == (math.inf, None)
    assert relative_half_width(np.full((MIN_CHUNKS, 2), np.inf)) == math.inf


def test_one_infinite_divergence_leaves_the_other_percentiles() -> None:
    kl = np.array([[3.0, 1.0, np.inf], [0.0, 4.0, 2.0]])
    s = logit_stats(n_positions=6, kl=kl)
    assert (s.kl_nats, s.kl_nats_max, s.kl_nats_p90) == (math.inf, math.inf, math.inf)
    assert (s.kl_nats_median, s.kl_nats_min) == (2.5, 0.0)
    assert logit_stats(n_positions=5, kl=np.array([[0.0, 1.0, 2.0, np.inf, np.inf]])).kl_nats_median == 2.0  # its neighbour counts nothing


def test_identical_variants() -> None:
    s = logit_stats(n_positions=C * P, kl=np.zeros((C, P)), same_top=np.ones((C, P), bool), log_p=LOG_P, ref_log_p=LOG_P)
    assert (s.kl_nats, s.kl_nats_low, s.kl_nats_high, s.rms_dp, s.rms_dp_se) == (0, 0, 0, 0, 0)
    assert (s.ln_ppl_ratio, s.ppl_ratio, s.ppl_diff, s.top1_agree, s.top1_agree_se) == (0, 1, 0, 1, 0)
    assert s.ln_ppl_cor == pytest.approx(1)


def test_the_interval_covers_the_mean_when_chunks_differ() -> None:
    """95 of 100 intervals hold the true mean although positions of a chunk go together; the usual standard error would hold half."""
    rng, covered, naive = np.random.default_rng(0), 0, 0
    for _ in range(400):
        x = 1.0 + rng.normal(0, 0.5, (10, 1)) + rng.normal(0, 0.3, (10, 50))
        s = logit_stats(n_positions=500, kl=x)
        assert s.kl_nats_low is not None
        assert s.kl_nats_high is not None
        covered += s.kl_nats_low <= 1.0 <= s.kl_nats_high
        mean, se = mean_and_se(x)
        naive += abs(mean - 1.0) < 1.96 * se
    assert 0.92 < covered / 400 < 0.98
    assert naive / 400 < 0.6


def test_half_width_is_students() -> None:
    assert half_width(np.array([0.0, 2.0])) == pytest.approx(12.706 * math.sqrt(2) / math.sqrt(2), rel=1e-4)  # t(0.975, 1) = 12.706


def test_pairs_know_better_than_separate_intervals() -> None:
    hard = RNG.gamma(1.0, 0.1, (20, 1))  # a hard chunk is hard for both
    a, b = hard + RNG.normal(0, 0.01, (20, 30)), hard + 0.005 + RNG.normal(0, 0.01, (20, 30))
    one, two = (logit_stats(n_positions=600, kl=x) for x in (a, b))
    assert one.kl_nats_high is not None
    assert two.kl_nats_low is not None
    assert one.kl_nats_high > two.kl_nats_low  # the intervals overlap
    p = paired("a", a, "b", b)
    assert p.better == "a"
    assert p.low_nats < p.mean_nats < p.high_nats < 0
    assert p.mean_nats == pytest.approx(a.mean() - b.mean())
    assert p.high_nats - p.mean_nats == pytest.approx(2.0930 * (a - b).mean(1).std(ddof=1) / math.sqrt(20), rel=1e-4)  # t(0.975, 19)
    assert (p.unit, p.n_units) == ("chunk", 20)
    assert paired("b", b, "a", a).better == "a"


def test_equal_variants_are_not_told_apart() -> None:
    assert paired("a", KL, "b", KL).better is None
    assert paired("a", KL, "b", KL + RNG.normal(0, 0.02, (C, P))).better is None


def test_a_single_chunk_is_compared_by_position() -> None:
    p = paired("a", KL[:1], "b", KL[:1] + 0.01)
    assert (p.unit, p.n_units, p.better) == ("position", P, "a")
    assert paired("a", KL[:1, :1], "b", KL[:1, :1] + 1).better is None  # nothing to say from one position


def test_every_pair() -> None:
    assert [(p.a, p.b) for p in all_pairs(["x", "y", "z"], [KL, KL, KL])] == [("x", "y"), ("x", "z"), ("y", "z")]


def test_relative_half_width_wants_enough_chunks() -> None:
    assert relative_half_width(np.ones((MIN_CHUNKS - 1, P))) == math.inf
    assert relative_half_width(np.ones((MIN_CHUNKS, P))) == 0
    assert relative_half_width(np.zeros((1, P))) == 0
    many = RNG.gamma(0.5, 0.02, (400, P))
    assert relative_half_width(many) == pytest.approx(half_width(many.mean(1)) / many.mean())
    assert relative_half_width(many[:100]) > relative_half_width(many)
