"""Summaries of a tap: every number against its plain formula, both backends against each other, and merging against one long text."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantscope.errors import ShapeError
from quantscope.quants import threads
from quantscope.tap_kernel import kernel_sums
from quantscope.tap_stats import Column, TapStats, empty, fold, measure, merge, op_row
from quantscope.tap_sums import torch_sums

SHAPES = [(1, 1, 1), (3, 1, 7), (2, 2, 1), (1, 64, 256), (2, 65, 257), (3, 129, 300), (1, 3, 1030)]
EXACT = (Column.N, Column.MIN, Column.MAX, Column.N_NON_FINITE, Column.N_CHUNKS, *range(Column.ABS_MAX, Column.MASSIVE_CHANNEL + 1))


def signals(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    """An original with a mean, and the same with noise."""
    g = torch.Generator().manual_seed(seed)
    ref = torch.randn(shape, generator=g) + 0.3
    return ref, ref + 0.1 * torch.randn(shape, generator=g)


def plain(ref: Tensor, x: Tensor) -> dict[str, float]:
    """Everything that is no place, from the definitions, in numpy."""
    r, v = ref.double().numpy(), x.double().numpy()
    per_chunk = [(math.sqrt((c**2).mean()), c.mean(), ((s - c) ** 2).sum() / (s**2).sum(), outliers(c)) for s, c in zip(r, v, strict=True)]
    rms, mean, nmse, share = np.array(per_chunk).T
    n_massive = sum(int(((abs(c) > 100) & (abs(c) > 1000 * np.median(abs(c)))).sum()) for c in v)
    error = ((r - v) ** 2).sum() / (r**2).sum()
    return {
        "n": v.size,
        "mean": v.mean(),
        "rms": math.sqrt((v**2).mean()),
        "std": v.std(),
        "min": v.min(),
        "max": v.max(),
        "abs_max": abs(v).max(),
        "nmse": error,
        "sqnr_db": -10 * math.log10(error),
        "cos_sim": (r * v).sum() / math.sqrt((r**2).sum() * (v**2).sum()),
        "outlier_share": share.mean(),
        "n_massive": n_massive,
        "n_non_finite": 0,
        "n_chunks": len(v),
        "rms_spread": rms.std(ddof=1),
        "mean_spread": mean.std(ddof=1),
        "nmse_spread": nmse.std(ddof=1),
        "outlier_share_spread": share.std(ddof=1),
    }


def outliers(chunk: np.ndarray) -> float:
    channel_rms = np.sqrt((chunk**2).mean(0))
    return float((channel_rms > 6 * np.median(channel_rms)).mean())


def stats(ref: Tensor | None, x: Tensor) -> TapStats:
    return TapStats.from_vector(fold(measure(ref, x)))


@pytest.fixture
def _thread_count() -> Iterator[None]:
    before = threads.thread_count()
    yield
    threads.set_threads(before)


class TestNumbers:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("channels", [300, 301])
    def test_every_number_is_its_formula(self, dtype: torch.dtype, channels: int) -> None:
        ref, x = signals((4, 67, channels))
        x[1, :, 5] *= 40  # an outlier channel
        x[2, 3, 7], x[2, 8, 9] = -2000.0, 900.0  # two massive activations
        x[3] *= 1.5
        found, expected = stats(ref.to(dtype), x.to(dtype)), plain(ref, x)
        assert {name: getattr(found, name) for name in expected} == pytest.approx(expected, rel=1e-11)
        assert found.abs_max_at == found.massive_at == (2, 3, 7)
        assert found.massive_max == found.abs_max == 2000
        assert {f.name for f in dataclasses.fields(TapStats)} - expected.keys() == {"abs_max_at", "massive_at", "massive_max"}

    def test_a_small_deviation_from_a_large_mean(self) -> None:
        x = 1000 + signals((3, 100, 200))[0]
        assert stats(None, x).std == pytest.approx(x.double().std(correction=0).item(), rel=1e-8)

    def test_identical(self) -> None:
        x = signals((2, 65, 33))[0]
        s = stats(x, x.clone())
        assert (s.nmse, s.sqnr_db, s.cos_sim, s.nmse_spread) == (0, math.inf, 1, 0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_zeros(self, dtype: torch.dtype) -> None:
        zero, one = torch.zeros(1, 3, 4, dtype=dtype), torch.ones(1, 3, 4, dtype=dtype)
        assert [(s.nmse, s.sqnr_db, s.cos_sim) for s in (stats(zero, zero), stats(zero, one), stats(one, zero))] == [
            (0, math.inf, 1),
            (math.inf, -math.inf, 0),
            (1, 0, 0),
        ]
        assert stats(zero, -one).cos_sim == 0
        assert stats(one, -one).cos_sim == -1
        assert (stats(None, zero).outlier_share, stats(None, zero).std) == (0, 0)

    def test_without_an_original(self) -> None:
        ref, x = signals((2, 9, 5))
        alone, beside = measure(None, x), measure(ref, x)
        errors = [Column.RR, Column.RX, Column.DD, Column.NMSE_MEAN]
        assert (alone[:, errors] == 0).all()
        np.testing.assert_array_equal(np.delete(alone, errors, axis=1), np.delete(beside, errors, axis=1))
        np.testing.assert_array_equal(measure(None, x.double())[:, errors], alone[:, errors])

    def test_places_are_counted_from_the_numbers_given(self) -> None:
        x = signals((3, 5, 4))[0]
        x[1, 2, 3] = -5000.0
        v = measure(None, x, chunk0=10, position0=100)
        place = slice(Column.ABS_MAX_CHUNK, Column.ABS_MAX_CHANNEL + 1)
        assert v[1, place].tolist() == v[1, Column.MASSIVE_CHUNK : Column.MASSIVE_CHANNEL + 1].tolist() == [11, 102, 3]
        assert v[2, Column.ABS_MAX_CHUNK] == 12
        assert TapStats.from_vector(fold(v)).abs_max_at == (11, 102, 3)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_the_first_of_equal_maxima(self, dtype: torch.dtype) -> None:
        x = torch.zeros(2, 70, 9, dtype=dtype)
        x[1, 66, 2], x[1, 5, 8], x[1, 5, 6], x[0, 69, 1] = 7, -7, 7, 7
        v = measure(None, x)
        assert [TapStats.from_vector(row).abs_max_at for row in (*v, fold(v))] == [(0, 69, 1), (1, 5, 6), (0, 69, 1)]

    def test_an_empty_chunk(self) -> None:
        for shape in ((2, 0, 4), (2, 4, 0)):
            assert measure(None, torch.zeros(shape)).tobytes() == empty((2,)).tobytes()
        s = TapStats.from_vector(empty())
        assert (s.n, s.n_chunks, s.n_massive, s.abs_max_at, s.massive_max, s.massive_at) == (0, 0, 0, None, None, None)
        assert all(math.isnan(v) for v in (s.mean, s.rms, s.std, s.min, s.max, s.abs_max, s.nmse, s.sqnr_db, s.cos_sim, s.outlier_share))
        assert all(math.isnan(v) for v in (s.rms_spread, s.mean_spread, s.nmse_spread, s.outlier_share_spread))

    def test_other_shapes_are_refused(self) -> None:
        with pytest.raises(ShapeError, match=r"\[chunks, positions, channels\]"):
            measure(None, torch.zeros(3, 4))
        with pytest.raises(ShapeError, match="expected equal shapes"):
            measure(torch.zeros(1, 4, 3), torch.zeros(1, 3, 4))
        with pytest.raises(ShapeError, match="expected two equal shapes"):
            merge(empty((2,)), empty())
        with pytest.raises(ShapeError, match="one summary vector"):
            TapStats.from_vector(empty((2,)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
class TestOutliersAndMassiveActivations:
    @pytest.mark.parametrize("channels", [8, 9])
    def test_an_outlier_channel_is_over_six_medians(self, dtype: torch.dtype, channels: int) -> None:
        x = torch.ones(1, 4, channels, dtype=dtype)
        x[0, ::2] *= -1
        x[0, :, 0] = 0.5
        x[0, :, 2], x[0, 0, 5], x[0, 0, 6] = 6.0, 12.0, 11.0  # channel RMS 6, sqrt((144 + 3)/4) = 6.06, sqrt((121 + 3)/4) = 5.6
        assert stats(None, x).outlier_share == 1 / channels

    def test_the_median_of_an_even_number_is_the_mean_of_the_two_in_the_middle(self, dtype: torch.dtype) -> None:
        rms = torch.tensor([1.0, 1.0, 1.0, 2.0, 8.9, 9.1], dtype=dtype)  # median 1.5
        assert stats(None, rms.expand(1, 5, 6)).outlier_share == 1 / 6

    def test_a_massive_activation_is_over_a_hundred_and_over_a_thousand_medians(self, dtype: torch.dtype) -> None:
        x = torch.full((1, 70, 10), 0.125, dtype=dtype)  # the limit is 125
        x[0, 3, 4], x[0, 69, 9], x[0, 1, 1], x[0, 0, 0] = -126.0, 125.5, 125.0, 110.0
        s = stats(None, x)
        assert (s.n_massive, s.massive_max, s.massive_at) == (2, 126.0, (0, 3, 4))

    def test_below_a_hundred_nothing_is_massive(self, dtype: torch.dtype) -> None:
        x = torch.full((1, 9, 5), 1e-3, dtype=dtype)
        x[0, 1, 1], x[0, 2, 2] = 100.0, 99.0
        assert (stats(None, x).n_massive, stats(None, x).massive_at) == (0, None)
        x[0, 3, 3] = 100.5
        assert (stats(None, x).n_massive, stats(None, x).massive_at) == (1, (0, 3, 3))

    @pytest.mark.parametrize(("n", "limit"), [(4, 250), (5, 300)])
    def test_the_median_is_exact(self, dtype: torch.dtype, n: int, limit: int) -> None:
        values = [0.3, -0.2, 0.1, 5000.0] if n == 4 else [0.3, -0.2, 0.1, 5000.0, -0.4]  # median |x| 0.25 and 0.3
        x = torch.tensor(values, dtype=dtype).reshape(1, 1, n)
        for top, massive in ((limit - 1, 0), (limit + 1, 1)):
            x[0, 0, 3] = top
            assert stats(None, x).n_massive == massive

    def test_the_largest_massive_activation_may_be_smaller_than_the_largest_value(self, dtype: torch.dtype) -> None:
        x = torch.full((2, 3, 5), 10.0, dtype=dtype)
        x[1] = 0.1
        x[0, 1, 1], x[1, 2, 4] = 9000.0, 400.0
        s = stats(None, x)
        assert (s.abs_max, s.abs_max_at, s.n_massive, s.massive_max, s.massive_at) == (
            9000.0,
            (0, 1, 1),
            1,
            pytest.approx(400.0),
            (1, 2, 4),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
class TestNotFinite:
    @pytest.mark.parametrize("sign", [1, -1])
    def test_nan_spreads_and_shows_its_place(self, dtype: torch.dtype, sign: int) -> None:
        ref, x = (t.to(dtype) for t in signals((3, 67, 20)))
        x[1, 66, 3] = x[1, 65, 4] = math.copysign(math.nan, sign)
        x[1, 0, 0] = 1e6
        s = stats(ref, x)
        assert (s.n_non_finite, s.n_massive, s.abs_max_at) == (2, 0, (1, 65, 4))
        values = (s.mean, s.rms, s.std, s.min, s.max, s.abs_max, s.nmse, s.sqnr_db, s.cos_sim, s.outlier_share, s.rms_spread)
        assert all(map(math.isnan, values))
        first = TapStats.from_vector(measure(ref, x)[0])
        assert all(map(math.isfinite, (first.mean, first.rms, first.max, first.abs_max, first.nmse, first.outlier_share)))

    def test_infinity(self, dtype: torch.dtype) -> None:
        ref, x = (t.to(dtype) for t in signals((2, 5, 20)))
        x[1, 2, 3], x[1, 4, 4] = -math.inf, math.inf
        s = stats(ref, x)
        assert (s.n_non_finite, s.min, s.max, s.abs_max, s.abs_max_at) == (2, -math.inf, math.inf, math.inf, (1, 2, 3))
        assert (s.n_massive, s.massive_at, s.rms, s.nmse, s.sqnr_db) == (2, (1, 2, 3), math.inf, math.inf, -math.inf)
        assert (math.isnan(s.mean), math.isnan(s.std), math.isnan(s.cos_sim)) == (True, True, True)
        assert TapStats.from_vector(measure(ref, x)[1]).outlier_share == 2 / 20

    def test_in_the_original_alone(self, dtype: torch.dtype) -> None:
        ref, x = (t.to(dtype) for t in signals((1, 5, 6)))
        ref[0, 0, 0] = math.nan
        s = stats(ref, x)
        assert (s.n_non_finite, math.isfinite(s.rms)) == (0, True)
        assert all(map(math.isnan, (s.nmse, s.sqnr_db, s.cos_sim)))
        assert math.isnan(stats(torch.zeros_like(x), x * math.nan).nmse)


class TestBackends:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_the_kernel_gives_what_torch_gives(self, shape: tuple[int, int, int]) -> None:
        ref, x = signals(shape)
        x *= 200
        ours, theirs = kernel_sums(ref.numpy(), x.numpy()), torch_sums(ref, x)
        for field in dataclasses.fields(ours):
            a, b = getattr(ours, field.name), getattr(theirs, field.name)
            assert (a.shape, a.dtype) == (b.shape, b.dtype), field.name
            exact = field.name in ("low", "high", "abs_max", "position", "channel", "n_non_finite", "n_massive")
            np.testing.assert_allclose(a, b, rtol=0 if exact else 1e-12, atol=0 if exact else 1e-10, err_msg=field.name)

    @pytest.mark.parametrize("shape", SHAPES)
    def test_signs_zeros_and_tiny_numbers(self, shape: tuple[int, int, int]) -> None:
        for values in ((-1.0, -2.0), (1.0, 2.0), (-0.0, 0.0), (1e-45, -1e-40), (3e38, -3e38)):
            x = torch.tensor(values)[torch.arange(math.prod(shape)) % 2].reshape(shape)
            a, b = kernel_sums(None, x.numpy()), torch_sums(None, x)
            assert [a.low.tolist(), a.high.tolist(), a.abs_max.tolist()] == [b.low.tolist(), b.high.tolist(), b.abs_max.tolist()]
            assert (a.position.tolist(), a.channel.tolist()) == (b.position.tolist(), b.channel.tolist())

    @pytest.mark.usefixtures("_thread_count")
    def test_threads_change_no_bit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(threads, "MIN_SHARE_BYTES", 1)
        ref, x = signals((3, 200, 300))
        found = set()
        for n in (1, 2, 5):
            threads.set_threads(n)
            found.add(measure(ref, x).tobytes())
        assert len(found) == 1
        alone = [measure(ref[c : c + 1], x[c : c + 1], chunk0=c) for c in range(3)]
        assert np.concatenate(alone).tobytes() in found

    def test_strides_and_dtypes(self) -> None:
        ref, x = signals((6, 40, 30))
        expected = measure(ref[::2, 1:].contiguous(), x[::2, 1:].contiguous())
        assert measure(ref[::2, 1:], x[::2, 1:]).tobytes() == expected.tobytes()
        turned = measure(ref.mT, x.mT)
        assert turned.tobytes() == measure(ref.mT.contiguous(), x.mT.contiguous()).tobytes() != measure(ref, x).tobytes()
        half = x.bfloat16()
        np.testing.assert_allclose(measure(ref, half), measure(ref, half.float()), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(measure(ref.double(), x), measure(ref, x), rtol=1e-9, atol=1e-9)

    def test_gradients_do_not_matter(self) -> None:
        ref, x = signals((1, 4, 5))
        expected = measure(ref, x).tobytes()
        assert measure(ref.requires_grad_(), x.requires_grad_()).tobytes() == expected
        assert measure(ref.double(), x.double()).shape == (1, len(Column))


VALUES = st.floats(-300, 300, width=32)


@st.composite
def summaries(draw: st.DrawFn) -> np.ndarray:
    """Summary vectors of one to five chunks of different sizes, some of them empty."""
    vectors = []
    for c in range(draw(st.integers(1, 5))):
        T = draw(st.integers(0, 3))
        values = torch.tensor(draw(st.lists(VALUES, min_size=6 * T, max_size=6 * T))).reshape(2, 1, T, 3)
        vectors.append(measure(values[0], values[1], chunk0=c)[0])
    return np.stack(vectors)


def bits(v: np.ndarray) -> bytes:
    return v.tobytes()


def close(a: np.ndarray, b: np.ndarray) -> None:
    """The same exact columns, and the others up to rounding of what they were added up from."""
    finite = np.isfinite(a) & np.isfinite(b)
    np.testing.assert_array_equal(a[..., EXACT], b[..., EXACT])
    np.testing.assert_allclose(
        np.where(finite, a, 0), np.where(finite, b, 0), rtol=1e-9, atol=1e-9 * (1 + float(np.max(np.abs(a[finite]))))
    )


class TestMerging:
    @given(summaries())
    @settings(max_examples=60, deadline=None)
    def test_nothing_is_the_identity(self, vectors: np.ndarray) -> None:
        nothing = empty((len(vectors),))
        assert bits(merge(nothing, vectors)) == bits(merge(vectors, nothing)) == bits(vectors)

    def test_nothing_is_the_identity_of_what_is_not_finite_too(self) -> None:
        odd = np.full((1, len(Column)), -0.0)
        odd[0, Column.N], odd[0, Column.MAX], odd[0, Column.XX], odd[0, Column.MEAN] = 3, math.nan, math.inf, -math.inf
        assert bits(merge(empty((1,)), odd)) == bits(merge(odd, empty((1,)))) == bits(odd)

    @given(summaries(), summaries(), summaries())
    @settings(max_examples=60, deadline=None)
    def test_grouping_changes_rounding_only(self, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> None:
        x, y, z = fold(a), fold(b), fold(c)
        close(merge(merge(x, y), z), merge(x, merge(y, z)))

    def test_batches_are_one_long_text(self) -> None:
        ref, x = signals((7, 20, 30), seed=1)
        x *= torch.arange(1.0, 8)[:, None, None]
        whole = fold(measure(ref, x))
        for edges in ([0, 3, 7], [0, 1, 2, 3, 4, 5, 6, 7], [0, 7]):
            total = empty()
            for a, b in itertools.pairwise(edges):
                total = merge(total, fold(measure(ref[a:b], x[a:b], chunk0=a)))
            close(total, whole)
        found, expected = TapStats.from_vector(whole), plain(ref, x)
        assert {name: getattr(found, name) for name in expected} == pytest.approx(expected, rel=1e-11)

    def test_leading_axes(self) -> None:
        ref, x = signals((12, 6, 10), seed=2)
        vectors = measure(ref, x).reshape(2, 3, 2, -1)
        folded = fold(vectors)
        assert folded.shape == (2, 3, len(Column))
        merged = merge(vectors[0], vectors[1])
        for i, j in itertools.product(range(2), range(3)):
            assert bits(folded[i, j]) == bits(fold(vectors[i, j]))
            assert bits(merged[j, i]) == bits(merge(vectors[0, j, i], vectors[1, j, i]))

    def test_folding_goes_from_left_to_right(self) -> None:
        v = measure(*signals((3, 6, 10), seed=3))
        assert bits(fold(v)) == bits(merge(merge(v[0], v[1]), v[2]))
        assert bits(fold(v[:0])) == bits(empty())

    def test_ties_keep_the_first_and_nan_is_the_largest(self) -> None:
        tops = [5.0, 7.0, -7.0, math.nan, math.nan, math.inf]
        x = torch.tensor(tops)[:, None, None] * torch.ones(1, 1, 2)
        v = measure(None, x)
        places = [merge(v[i], v[j])[Column.ABS_MAX_CHUNK] for i, j in ((0, 1), (1, 0), (1, 2), (2, 1), (1, 3), (3, 5), (5, 4), (3, 4))]
        assert places == [1, 1, 1, 2, 3, 3, 4, 3]
        for i, j in ((1, 3), (3, 1)):
            assert np.isnan(merge(v[i], v[j])[[Column.MIN, Column.MAX, Column.ABS_MAX, Column.MEAN]]).all()

    def test_inputs_stay_as_they_are(self) -> None:
        v = measure(*signals((2, 6, 10)))
        before = bits(v)
        merge(v[0], v[1])[:] = 0
        fold(v[:1])[:] = 0
        assert bits(v) == before


class TestOpRow:
    def test_has_the_numbers_of_the_summary(self) -> None:
        ref, x = signals((3, 5, 8))
        x[1, 2, 3], x[2] = 300.0, 10.0
        x[2, 1, 7] = -900.0
        v = fold(measure(ref, x))
        s, row = TapStats.from_vector(v), op_row("ffn_swiglu", 4, v, compared=True)
        same = [f.name for f in dataclasses.fields(row) if hasattr(s, f.name)]
        assert {name: getattr(row, name) for name in same} == {name: getattr(s, name) for name in same}
        assert (row.tap, row.layer) == ("ffn_swiglu", 4)
        assert (row.abs_max_chunk, row.abs_max_position, row.abs_max_channel) == (2, 1, 7)
        assert (row.n_massive, row.massive_chunk, row.massive_position, row.massive_channel) == (0, None, None, None)
        others = {"tap", "layer"} | {f"{what}_{axis}" for what in ("abs_max", "massive") for axis in ("chunk", "position", "channel")}
        assert others == {f.name for f in dataclasses.fields(row)} - set(same)
        x[1] *= 0.1
        x[1, 2, 3] = 300.0
        massive = op_row("l_out", 0, fold(measure(ref, x)), compared=True)
        assert (massive.massive_max, massive.massive_chunk, massive.massive_position, massive.massive_channel) == (300.0, 1, 2, 3)

    def test_what_was_not_measured_is_none(self) -> None:
        v = measure(None, signals((2, 5, 8))[1])
        row = op_row("embd", None, fold(v), compared=False)
        assert (row.nmse, row.sqnr_db, row.cos_sim, row.nmse_spread, row.layer) == (None,) * 5
        assert row.rms_spread is not None
        single = op_row("embd", None, v[0], compared=True)
        assert (single.rms_spread, single.mean_spread, single.nmse_spread, single.outlier_share_spread) == (None,) * 4
        assert op_row("embd", None, empty(), compared=False).abs_max_chunk is None
