"""Every formula against numbers worked out by hand or with numpy, and its edge cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantscope import metrics
from quantscope.errors import ShapeError

F32 = torch.float32


def logits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


class TestErrors:
    def test_by_hand(self) -> None:
        ref, test = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.0])
        assert metrics.nmse(ref, test).item() == 1 / 25
        assert metrics.sqnr_db(ref, test).item() == pytest.approx(10 * math.log10(25), rel=1e-15)
        assert metrics.cos_sim(ref, test).item() == pytest.approx(21 / (5 * math.sqrt(18)), rel=1e-15)
        assert metrics.rms(ref).item() == math.sqrt(12.5)
        assert metrics.mean(ref).item() == 3.5

    def test_order_of_arguments_matters(self) -> None:
        a, b = torch.tensor([1.0, 0.0]), torch.tensor([2.0, 0.0])
        assert metrics.nmse(a, b).item() == 1.0
        assert metrics.nmse(b, a).item() == 0.25

    def test_last_axis_is_reduced(self) -> None:
        ref, test = logits(2, 3, 5), logits(2, 3, 5, seed=1)
        for f in (metrics.nmse, metrics.sqnr_db, metrics.cos_sim, metrics.kl_nats, metrics.top1_agree):
            assert f(ref, test).shape == (2, 3)
            torch.testing.assert_close(f(ref, test)[1, 2], f(ref[1, 2], test[1, 2]))

    def test_identical(self) -> None:
        x = logits(7)
        assert metrics.nmse(x, x).item() == 0
        assert metrics.sqnr_db(x, x).item() == math.inf
        assert metrics.cos_sim(x, x).item() == pytest.approx(1, abs=1e-15)
        assert metrics.kl_nats(x, x).item() == 0

    def test_zero_signals(self) -> None:
        zero, one = torch.zeros(3), torch.ones(3)
        assert metrics.nmse(zero, zero).item() == 0
        assert metrics.nmse(zero, one).item() == math.inf
        assert metrics.cos_sim(zero, one).item() == 0
        assert metrics.cos_sim(zero, zero).item() == 1

    def test_nan_is_never_hidden(self) -> None:
        x, bad = torch.ones(3), torch.tensor([1.0, math.nan, 1.0])
        for f in (metrics.nmse, metrics.sqnr_db, metrics.cos_sim, metrics.kl_nats):
            assert math.isnan(f(x, bad).item()), f.__name__
            assert math.isnan(f(bad, x).item()), f.__name__

    def test_sums_are_float64(self) -> None:
        x = torch.full((1 << 20,), 0.1, dtype=F32)
        x[0] = 1e4  # in float32 the small squares are lost beside 1e8
        expected = float(np.sqrt(np.mean(np.square(x.numpy().astype(np.float64)))))
        assert metrics.rms(x).item() == pytest.approx(expected, rel=1e-12)
        assert metrics.rms(x.bfloat16()).dtype == torch.float64

    @pytest.mark.parametrize("f", [metrics.nmse, metrics.sqnr_db, metrics.cos_sim, metrics.kl_nats, metrics.top1_agree])
    def test_shapes_must_be_equal(self, f: object) -> None:
        with pytest.raises(ShapeError, match=r"ref \(2, 3\) and test \(1, 3\)"):
            f(torch.ones(2, 3), torch.ones(1, 3))  # type: ignore[operator]

    @settings(deadline=None, max_examples=50)
    @given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=20), st.floats(0.1, 10))
    def test_scale_invariance(self, values: list[float], scale: float) -> None:
        ref = torch.tensor(values, dtype=torch.float64) + 0.5
        test = ref.roll(1)
        torch.testing.assert_close(metrics.nmse(ref * scale, test * scale), metrics.nmse(ref, test))
        torch.testing.assert_close(metrics.cos_sim(ref, test * scale), metrics.cos_sim(ref, test), equal_nan=True)


class TestLogits:
    def test_kl_by_hand(self) -> None:
        p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
        expected = 0.5 * math.log(2) - 0.25 * math.log(2)
        assert metrics.kl_nats(p.double().log(), q.double().log() + 7).item() == pytest.approx(expected, rel=1e-14)

    def test_kl_ignores_impossible_tokens_but_not_lost_ones(self) -> None:
        ref = torch.tensor([0.0, 0.0, -math.inf])
        assert metrics.kl_nats(ref, torch.tensor([0.0, 0.0, -math.inf])).item() == 0
        assert metrics.kl_nats(ref, torch.tensor([0.0, 0.0, 0.0])).item() == pytest.approx(math.log(1.5))
        assert metrics.kl_nats(torch.zeros(3), ref).item() == math.inf

    def test_tiny_kl_is_not_rounded_away(self) -> None:
        x = logits(32000)
        direction = logits(32000, seed=1).double()
        kl = metrics.kl_nats(x, x.double() + 1e-6 * direction).item()
        p = x.double().softmax(-1)
        variance = ((p * direction**2).sum() - (p * direction).sum() ** 2).item()
        assert kl == pytest.approx(1e-12 * variance / 2, rel=1e-3)  # second-order expansion

    def test_top1_takes_the_smallest_id_of_equals(self) -> None:
        assert metrics.top1_agree(torch.tensor([1.0, 5.0, 5.0]), torch.tensor([1.0, 5.0, 4.0])).item()
        assert not metrics.top1_agree(torch.tensor([1.0, 5.0, 5.0]), torch.tensor([1.0, 4.0, 5.0])).item()
        assert metrics.first_argmax(torch.zeros(3, 1000)).tolist() == [0, 0, 0]

    def test_rank(self) -> None:
        x = torch.tensor([2.0, 9.0, 2.0, -1.0])
        assert [metrics.rank(x, torch.tensor(i)).item() for i in range(4)] == [2, 1, 3, 4]
        y = logits(5, 40)
        order = y.argsort(-1, descending=True)
        for k in range(40):
            assert metrics.rank(y, order[:, k]).tolist() == [k + 1] * 5

    def test_perplexity_of_a_uniform_distribution(self) -> None:
        assert metrics.ppl(torch.zeros(6, 512), torch.arange(6)).item() == pytest.approx(512, rel=1e-12)

    def test_log_prob_and_rms_dp(self) -> None:
        ref, test = logits(8, 10), logits(8, 10, seed=1)
        ids = torch.arange(8)
        p, q = ref.double().softmax(-1)[ids, ids], test.double().softmax(-1)[ids, ids]
        torch.testing.assert_close(metrics.log_prob(ref, ids), p.log())
        assert metrics.rms_dp(ref, test, ids).item() == pytest.approx(float((p - q).square().mean().sqrt()), rel=1e-12)
        assert metrics.rms_dp(ref, ref, ids).item() == 0

    @pytest.mark.parametrize("f", [metrics.log_prob, metrics.rank])
    def test_one_id_per_row(self, f: object) -> None:
        with pytest.raises(ShapeError, match="one id per row"):
            f(torch.ones(2, 3), torch.zeros(3, dtype=torch.int64))  # type: ignore[operator]

    def test_mean_and_se(self) -> None:
        values = logits(100)
        m, se = metrics.mean_and_se(values)
        a = values.numpy().astype(np.float64)
        assert m == pytest.approx(a.mean(), rel=1e-12)
        assert se == pytest.approx(a.std(ddof=1) / 10, rel=1e-12)
        agree, se = metrics.mean_and_se(torch.tensor([True, True, False, True]))
        assert (agree, se) == (0.75, pytest.approx(0.25))
        assert math.isnan(metrics.mean_and_se(values[:1])[1])
        assert math.isnan(metrics.mean_and_se(values[:0])[0])


class TestTableQuantities:
    def test_growth_and_drift(self) -> None:
        assert metrics.rms_growth([2.0, 3.0, 10.0]) == [1.0, 1.5, 5.0]
        assert metrics.mean_drift([0.5, 7.0, -1.0]) == -2.0
        assert all(math.isnan(g) for g in metrics.rms_growth([0.0, 1.0]))
        assert math.isnan(metrics.mean_drift([0.0, 1.0]))

    def test_mean_to_rms(self) -> None:
        assert metrics.mean_to_rms(-1.0, 4.0) == 0.25
        assert math.isnan(metrics.mean_to_rms(0.0, 0.0))

    def test_times_of_others(self) -> None:
        assert metrics.times_of_others(8.0, [1.0, 2.0, 100.0]) == (4.0, 2.0)
        assert metrics.times_of_others(8.0, [1.0, math.nan, 3.0]) == (4.0, 2.0)
        assert metrics.times_of_others(8.0, [0.0]) == (math.inf, 0.0)
        assert math.isnan(metrics.times_of_others(0.0, [0.0])[0])
        assert math.isnan(metrics.times_of_others(8.0, [])[0])


class TestKnee:
    def test_exact_bend(self) -> None:
        y = [-40 + i + 2 * max(0, i - 6) for i in range(12)]
        k = metrics.knee(range(12), y)
        assert k is not None
        assert (k.layer, k.before, k.after) == (7, pytest.approx(1), pytest.approx(3))

    def test_none_on_a_straight_or_flattening_curve(self) -> None:
        assert metrics.knee(range(12), [float(i) for i in range(12)]) is None
        assert metrics.knee(range(12), [math.sqrt(i) for i in range(12)]) is None
        assert metrics.knee(range(12), [3.0] * 12) is None

    def test_none_on_noise_around_a_line(self) -> None:
        noise = np.random.default_rng(0).normal(size=(200, 24))
        found = sum(metrics.knee(range(24), list(np.arange(24) + row)) is not None for row in noise)
        assert found <= 2

    def test_found_in_noise(self) -> None:
        noise = np.random.default_rng(0).normal(size=24) * 0.5
        k = metrics.knee(range(24), [0.2 * i + 1.5 * max(0, i - 15) + e for i, e in enumerate(noise)])
        assert k is not None
        assert abs(k.layer - 16) <= 1
        assert (k.before, k.after) == (pytest.approx(0.2, abs=0.1), pytest.approx(1.7, abs=0.2))

    def test_too_few_points_or_not_finite(self) -> None:
        assert metrics.knee(range(5), [0, 0, 0, 0, 9]) is None
        assert metrics.knee(range(6), [0, 0, 0, 0, 0, math.inf]) is None
        assert metrics.knee(range(6), [0, 0, 0, 0, 0, 9]) is not None

    def test_layer_numbers_need_not_be_dense(self) -> None:
        x = [0, 5, 10, 15, 20, 21, 22]
        k = metrics.knee(x, [i + 4 * max(0, i - 15) for i in x])
        assert k is not None
        assert (k.layer, k.before, k.after) == (20, pytest.approx(1), pytest.approx(5))
