"""Streaming over the vocabulary gives the metrics of the whole logits, whatever the slices, the threads and the backend."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantscope import logit_kernel, logit_sums, metrics
from quantscope.logit_sums import LogitSums
from quantscope.quants import threads

N, V = 7, 50
LABELS = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(1))
EVERYTHING = ("largest", "total", "cross", "kl", "log_p", "top_id", "same_top")


class TorchSums(LogitSums):
    """What an accelerator does, on the CPU."""

    def _add_by_kernel(self, v0: int, members: list[Tensor]) -> None:  # type: ignore[override]
        self._add_by_torch(v0, members)


BACKENDS = pytest.mark.parametrize("kind", [LogitSums, TorchSums])


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small arrays go to several threads, too."""
    before = threads.thread_count()
    monkeypatch.setattr(threads, "MIN_SHARE_BYTES", 1)
    yield
    threads.set_threads(before)


def logits(seed: int = 0, n_members: int = 3, scale: float = 5.0, n: int = N, v: int = V) -> Tensor:
    return scale * torch.randn(n_members, n, v, generator=torch.Generator().manual_seed(seed))


def streamed(
    x: Tensor, widths: list[int], *, labels: Tensor | None = LABELS, has_reference: bool = True, kind: type[LogitSums] = LogitSums
) -> LogitSums:
    sums = kind(x.shape[1], len(x), labels=labels, has_reference=has_reference)
    v0 = 0
    for width in [*widths, x.shape[-1]]:
        part = x[:, :, v0 : v0 + width]
        if part.shape[-1]:
            sums.add(v0, list(part))
        v0 += part.shape[-1]
    return sums


def same_bits(a: LogitSums, b: LogitSums) -> bool:
    return all(getattr(a, what).numpy().tobytes() == getattr(b, what).numpy().tobytes() for what in EVERYTHING)


class TestMetrics:
    @BACKENDS
    @settings(deadline=None)
    @given(widths=st.lists(st.integers(1, 30), max_size=6), seed=st.integers(0, 99), scale=st.sampled_from([0.0, 1e-3, 5.0, 80.0, 1e4]))
    def test_any_slices_give_those_of_the_whole(self, kind: type[LogitSums], widths: list[int], seed: int, scale: float) -> None:
        x = logits(seed, scale=scale)
        sums = streamed(x, widths, kind=kind)
        for m in range(3):
            torch.testing.assert_close(sums.kl[m], metrics.kl_nats(x[0], x[m]), rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(sums.log_p[m], metrics.log_prob(x[m], LABELS), rtol=1e-12, atol=1e-12)
            assert torch.equal(sums.same_top[m], metrics.top1_agree(x[0], x[m]))
            assert torch.equal(sums.top_id[m], metrics.first_argmax(x[m]))
        assert (sums.kl >= 0).all()

    @pytest.mark.parametrize("v", [1, 255, 256, 257, 1000])
    def test_vocabularies_beside_the_256_lanes(self, v: int) -> None:
        x = logits(3, v=v)
        sums = streamed(x, [], labels=None)
        for m in range(3):
            torch.testing.assert_close(sums.kl[m], metrics.kl_nats(x[0], x[m]), rtol=1e-9, atol=1e-12)
            assert torch.equal(sums.top_id[m], metrics.first_argmax(x[m]))

    @BACKENDS
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_every_float_dtype(self, kind: type[LogitSums], dtype: torch.dtype) -> None:
        x = logits().to(dtype)
        torch.testing.assert_close(streamed(x, [20], kind=kind).kl[2], metrics.kl_nats(x[0], x[2]), rtol=1e-9, atol=1e-12)

    def test_float64_is_not_rounded(self) -> None:
        x = 1e8 + logits().double()  # in float32 the differences would be multiples of 8
        torch.testing.assert_close(streamed(x, [20]).kl[1], metrics.kl_nats(x[0], x[1]), rtol=1e-6, atol=1e-9)

    @BACKENDS
    def test_without_labels_and_without_an_original(self, kind: type[LogitSums]) -> None:
        x = logits()
        torch.testing.assert_close(streamed(x, [8], labels=None, kind=kind).kl, streamed(x, [8]).kl)
        torch.testing.assert_close(streamed(x, [8], has_reference=False, kind=kind).log_p, streamed(x, [8]).log_p)

    @BACKENDS
    @settings(deadline=None)
    @given(shift=st.floats(-1e4, 1e4))
    def test_a_constant_added_to_all_logits_changes_nothing(self, kind: type[LogitSums], shift: float) -> None:
        x = logits().double()
        moved = x.clone()
        moved[1] += shift
        torch.testing.assert_close(streamed(moved, [13], kind=kind).kl, streamed(x, [13], kind=kind).kl, rtol=1e-7, atol=1e-10)

    @BACKENDS
    def test_identical_logits_have_exactly_no_divergence(self, kind: type[LogitSums]) -> None:
        assert (streamed(logits(n_members=1).repeat(2, 1, 1), [11], kind=kind).kl == 0).all()

    @BACKENDS
    def test_ties_go_to_the_smallest_id_also_across_slices(self, kind: type[LogitSums]) -> None:
        x = torch.zeros(2, N, V)
        x[1, :, 30:] = 1
        sums = streamed(x, [10, 10, 15], kind=kind)
        assert sums.top_id[0].tolist() == [0] * N
        assert sums.top_id[1].tolist() == [30] * N

    def test_logits_are_left_alone(self) -> None:
        for x in (logits(), logits().double()):
            before = x.clone()
            for kind in (LogitSums, TorchSums):
                streamed(x, [20], kind=kind)
            assert torch.equal(x, before)


class TestSameBits:
    """Groups of members, other threads and other tiles must not show, for a study is put together from parts."""

    @BACKENDS
    def test_a_member_depends_on_itself_and_the_original_alone(self, kind: type[LogitSums]) -> None:
        x = logits()
        assert torch.equal(streamed(x, [9], kind=kind).kl[2], streamed(x[[0, 2]], [9], kind=kind).kl[1])
        assert torch.equal(streamed(x, [9], kind=kind).log_p[1], streamed(x[[1]], [9], has_reference=False, kind=kind).log_p[0])

    @BACKENDS
    @pytest.mark.parametrize("tile", [1, 45, 100])
    def test_tiles(self, kind: type[LogitSums], tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = streamed(logits(), [20], kind=kind)
        monkeypatch.setattr(logit_kernel, "TILE", tile)
        monkeypatch.setattr(logit_sums, "TILE", tile)
        assert same_bits(streamed(logits(), [20], kind=kind), whole)

    @pytest.mark.usefixtures("shared")
    @pytest.mark.parametrize(("n", "v"), [(7, 50), (1, 70_000), (3, 40_000)])  # torch splits the sum of a single long row
    def test_threads(self, n: int, v: int) -> None:
        x = logits(n=n, v=v)
        before, found = torch.get_num_threads(), []
        for count in (1, 2, 5):
            threads.set_threads(count)
            torch.set_num_threads(count)
            found.append(streamed(x, [v // 2], labels=torch.arange(n)))
        torch.set_num_threads(before)
        assert same_bits(found[0], found[1])
        assert same_bits(found[0], found[2])

    def test_positions_together_or_apart(self) -> None:
        x = logits()
        together = streamed(x, [20])
        for i in range(N):
            alone = streamed(x[:, i : i + 1], [20], labels=LABELS[i : i + 1])
            assert torch.equal(alone.kl[:, 0], together.kl[:, i])


class TestStored:
    """An original from a file: log-probabilities that are not normalized again, some of them lost."""

    @BACKENDS
    @pytest.mark.parametrize("width", [50, 9])
    def test_the_sum_is_over_what_was_kept(self, kind: type[LogitSums], width: int) -> None:
        x = logits(n_members=3)
        x[0] = x[0].log_softmax(-1)
        x[0, :, 30:] -= 0.01  # rounded: they do not sum to 1
        x[0][x[0] < -9] = -torch.inf
        sums = kind(N, 3, labels=LABELS, has_reference=True, stored=True)
        for v0 in range(0, V, width):
            sums.add(v0, list(x[:, :, v0 : v0 + width]))
        p, lost = x[0].double().exp(), x[0] == -torch.inf
        assert lost.any()
        for m in (1, 2):
            terms = p * (x[0].double() - x[m].double().log_softmax(-1))
            torch.testing.assert_close(sums.kl[m], torch.where(lost, 0, terms).sum(-1), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(sums.mass, p.sum(-1))
        assert (sums.kl[0] == 0).all()

    @BACKENDS
    def test_rounding_may_go_below_zero(self, kind: type[LogitSums]) -> None:
        x = logits(n_members=1).log_softmax(-1)
        sums = kind(N, 2, labels=None, has_reference=True, stored=True)
        sums.add(0, [x[0] - 1e-3, x[0]])
        torch.testing.assert_close(sums.kl[1], torch.full((N,), -1e-3, dtype=torch.float64), rtol=2e-3, atol=0)


class TestNotFinite:
    @BACKENDS
    def test_tokens_of_probability_zero(self, kind: type[LogitSums]) -> None:
        x = logits()
        x[:, :, 3] = -torch.inf  # in all: contributes nothing
        x[2, 1, 5] = -torch.inf  # only the member excludes it: no code for what the original may say
        x[0, 2, 6] = -torch.inf  # only the original excludes it
        sums = streamed(x, [2, 2, 9], kind=kind)
        assert sums.kl[2, 1] == torch.inf
        assert sums.kl[1].isfinite().all()
        for m in range(3):
            torch.testing.assert_close(sums.kl[m], metrics.kl_nats(x[0], x[m]), rtol=1e-9, atol=1e-12)

    @BACKENDS
    def test_an_excluded_token_whose_probability_vanishes_later(self, kind: type[LogitSums]) -> None:
        x = logits(n_members=2)
        x[1, :, 3] = -torch.inf
        x[0, :, 30] = x[1, :, 30] = 2000.0
        sums = streamed(x, [10], kind=kind)
        torch.testing.assert_close(sums.kl[1], metrics.kl_nats(x[0], x[1]))
        assert (sums.kl[1] == 0).all()

    @BACKENDS
    def test_slices_of_minus_infinity(self, kind: type[LogitSums]) -> None:
        x = logits()
        x[:, :, :10] = x[:, :, 40:] = -torch.inf
        torch.testing.assert_close(streamed(x, [4, 4, 30], kind=kind).kl, streamed(x, []).kl)
        torch.testing.assert_close(streamed(x, [4, 4, 30], kind=kind).kl[1], metrics.kl_nats(x[0], x[1]))

    @BACKENDS
    @pytest.mark.parametrize("member", [0, 1])
    @pytest.mark.parametrize("at", [2, 20, 45])
    def test_nan_is_not_hidden(self, kind: type[LogitSums], member: int, at: int) -> None:
        x = logits()
        x[member, 4, at] = torch.nan
        sums = streamed(x, [10, 30], kind=kind)
        assert sums.kl[1].isnan().tolist() == [False] * 4 + [True] + [False] * 2
        assert sums.log_p[member].isnan().tolist() == [False] * 4 + [True] + [False] * 2
        assert sums.kl[2].isnan().any() == (member == 0)  # a broken variant leaves the others alone
        assert torch.equal(sums.top_id[member], metrics.first_argmax(x[member]))

    @BACKENDS
    def test_infinite_logits_leave_no_distribution(self, kind: type[LogitSums]) -> None:
        x = logits()
        x[1, 2, 25] = torch.inf
        sums = streamed(x, [10, 10], kind=kind)
        assert sums.kl[1].isnan().tolist() == metrics.kl_nats(x[0], x[1]).isnan().tolist()
        assert sums.top_id[1, 2] == 25

    def test_a_token_that_never_came_has_no_probability(self) -> None:
        sums = LogitSums(N, 1, labels=torch.full((N,), V), has_reference=False)
        sums.add(0, [logits()[0]])
        assert sums.log_p.isnan().all()


class TestExponential:
    def test_two_units_in_the_last_place(self) -> None:
        t = -np.concatenate([np.linspace(0, 1, 2001), np.linspace(0, 707.9, 20_011), 10.0 ** -np.arange(320)])
        found = np.array([logit_kernel.exponential(v) for v in t.tolist()])
        expected = np.array([math.exp(v) for v in t.tolist()])
        assert (np.abs(found - expected) <= 2 * np.spacing(expected)).all()

    def test_ends(self) -> None:
        assert logit_kernel.exponential(0.0) == logit_kernel.exponential(-0.0) == 1.0
        assert [logit_kernel.exponential(v) for v in (-708.1, -1e9, -1e300, -math.inf)] == [0.0] * 4
        assert math.isnan(logit_kernel.exponential(math.nan))
