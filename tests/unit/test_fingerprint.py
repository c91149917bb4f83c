"""Fingerprints: the statistics of the signs, the estimate of the NMSE, and that no planted fault escapes it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from quantscope.cli.demo import MODEL, bundled
from quantscope.errors import TraceContentError
from quantscope.fingerprint import (
    N_SUMS,
    RELATIVE_SD,
    estimate_nmse,
    estimate_quantile,
    fingerprint,
    fingerprint_trace,
    sign_bits,
)
from quantscope.images import Images, Requantized
from quantscope.metrics import nmse
from quantscope.model.forward import forward
from quantscope.model.taps import Recorder
from quantscope.qtypes import QTYPES
from quantscope.sources.resolve import open_source
from quantscope.trace import Fingerprint, Origin, Stats, Trace, full_trace
from quantscope.weights import WeightProvider, Weights

WRAP = 0xFFFFFFFF
LENGTH, WINDOWS = 1536, 400  # values of a test signal, and stretches of the sign sequence that it is laid on


def hash_in_plain_integers(i: int) -> int:
    """The specification of docs/fingerprints.md, written once more."""
    h = ((i + 1) * 0x9E3779B1) & WRAP
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & WRAP
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & WRAP
    return h ^ (h >> 16)


@cache
def signs() -> Tensor:
    """±1, float64 [16, WINDOWS·LENGTH]."""
    return 1.0 - 2.0 * sign_bits(WINDOWS * LENGTH).double()


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def estimate(ref: Tensor, test: Tensor) -> float:
    return estimate_nmse(fingerprint(ref), fingerprint(test))


class TestSigns:
    def test_are_those_of_the_specification(self) -> None:
        bits = sign_bits(70_000)
        for i in (0, 1, 2, 3, 255, 4095, 65_535, 65_536, 69_999):
            assert [bool(hash_in_plain_integers(i) >> k & 1) for k in range(N_SUMS)] == bits[:, i].tolist()

    def test_page_gives_values_of_the_hash(self) -> None:
        page = (Path(__file__).parents[2] / "docs" / "fingerprints.md").read_text("utf-8")
        given = dict(re.findall(r"h\((\d+)\) = ([0-9a-f]{8})", page)) | dict(re.findall(r"h\((2³² − 2)\) = ([0-9a-f]{8})", page))
        assert len(given) == 5
        for i, value in given.items():
            assert f"{hash_in_plain_integers(2**32 - 2 if '³' in i else int(i)):08x}" == value

    def test_are_those_that_the_sums_use(self) -> None:
        x = torch.randn(5000, generator=generator(1))
        expected = (signs()[:, :5000] * x.double()).sum(1) / math.sqrt(5000)
        torch.testing.assert_close(fingerprint(x).sums.double(), expected, rtol=1e-6, atol=1e-7)

    def test_have_no_bias_in_any_stretch(self) -> None:
        """Sums of 1,536 signs over √1536, 16 × 400 of them, are standard normal once the steps of 2 between them are filled."""
        steps = 2 * torch.rand(N_SUMS, WINDOWS, generator=generator(0), dtype=torch.float64) - 1
        z = (signs().reshape(N_SUMS, WINDOWS, LENGTH).sum(-1) + steps) / math.sqrt(LENGTH)
        assert z.abs().max() < 4.6  # 6,400 of them: P = 2.7 %
        assert stats.kstest(z.flatten().numpy(), "norm").pvalue > 0.01

    def test_of_different_sums_are_uncorrelated_also_when_shifted(self) -> None:
        s, z = signs(), []
        for shift in (0, 1, 2, 3, 4, 7, 8, 16, 31, 32, 64, 100, 128, 255, 256, 352, 1000, 1024, 2048, 4096, 5632, 11008, 32000, 65536):
            n = s.shape[1] - shift
            products = s[:, :n] @ s[:, shift:].T / math.sqrt(n)  # [16,16]
            z.append(products[~torch.eye(N_SUMS, dtype=torch.bool)] if shift == 0 else products.flatten())
        values = torch.cat(z)
        assert values.abs().max() < 5.2
        assert values.std().item() == pytest.approx(1, abs=0.05)

    @pytest.mark.parametrize("step", [2, 3, 4, 6, 16, 32, 64, 100, 128, 256, 512, 1000, 1024, 2048, 4096])
    def test_are_random_along_every_stride(self, step: int) -> None:
        """What a column of a [P,channels] tensor meets."""
        s = signs()
        columns = s[:, : s.shape[1] // step * step].reshape(N_SUMS, -1, step)  # [16,n,step]
        z = columns.sum(1) / math.sqrt(columns.shape[1])
        assert (z.square().mean() - 1).abs() < 5 * math.sqrt(2 / z.numel())
        neighbours = (columns[:, 1:] * columns[:, :-1]).sum(1) / math.sqrt(columns.shape[1] - 1)
        assert (neighbours.square().mean() - 1).abs() < 5 * math.sqrt(2 / neighbours.numel())


T, E = 24, 64  # T·E = LENGTH
SIGNALS: dict[str, Callable[[], Tensor]] = {
    "constant": lambda: torch.ones(LENGTH),
    "alternating": lambda: torch.tensor([1.0, -1.0]).repeat(LENGTH // 2),
    "alternating in pairs": lambda: torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(LENGTH // 4),
    "ramp": lambda: torch.arange(LENGTH) - LENGTH / 2,
    "sine of 64": lambda: torch.sin(torch.arange(LENGTH) * 2 * math.pi / 64),
    "same channels at every position": lambda: torch.randn(E, generator=generator(2)).repeat(T),
    "one channel at every position": lambda: torch.eye(E)[5].repeat(T),
    "one position, all channels": lambda: torch.eye(T)[7].repeat_interleave(E),
    "outer product": lambda: torch.outer(torch.randn(T, generator=generator(3)), torch.randn(E, generator=generator(4))).flatten(),
    "random": lambda: torch.randn(LENGTH, generator=generator(5)),
    "heavy tails": lambda: torch.randn(LENGTH, generator=generator(6)).pow(3),
    "difference to the transposed": lambda: (lambda x: (x - x.T.reshape(T, E)).flatten())(torch.randn(T, E, generator=generator(7))),
    "difference to shifted positions": lambda: (lambda x: (x - x.roll(1, 0)).flatten())(torch.randn(T, E, generator=generator(8))),
}


class TestEstimate:
    @pytest.mark.parametrize("signal", SIGNALS)
    def test_of_structured_differences_has_the_promised_mean_and_spread(self, signal: str) -> None:
        """A signal on 400 stretches of the signs: the ratio of estimate and truth has mean 1, deviation ≤ 35 %."""
        x = SIGNALS[signal]().double()
        sums = torch.einsum("kwi,i->wk", signs().reshape(N_SUMS, WINDOWS, LENGTH), x) / math.sqrt(LENGTH)  # [windows,16]
        ratio = sums.square().mean(1) / x.square().mean()
        effective = x.square().sum() ** 2 / x.pow(4).sum()  # few large values: fewer random terms, less spread
        deviation = RELATIVE_SD * math.sqrt(1 - 1 / effective)
        assert ratio.mean().item() == pytest.approx(1, abs=4 * deviation / math.sqrt(WINDOWS))
        assert ratio.std().item() == pytest.approx(deviation, rel=0.2)
        if effective > 20:
            assert stats.kstest(16 * ratio.numpy(), "chi2", args=(16,)).pvalue > 1e-3

    def test_of_a_single_wrong_element_is_exact(self) -> None:
        x = torch.randn(999, generator=generator(9))
        y = x.clone()
        y[123] += 3.5
        assert estimate(x, y) == pytest.approx(nmse(x, y).item(), rel=1e-5)

    def test_quantiles_hold_in_simulation(self) -> None:
        below = [0, 0]
        low, high = estimate_quantile(0.025), estimate_quantile(0.975)
        for seed in range(1000):
            x = torch.randn(300, generator=generator(seed))
            noise = torch.randn(300, generator=generator(10_000 + seed)) * 0.01
            ratio = estimate(x, x + noise) / nmse(x, x + noise).item()
            below[0] += ratio < low
            below[1] += ratio < high
        assert abs(below[0] - 25) < 20  # 4 standard deviations of 4.9
        assert abs(below[1] - 975) < 20
        assert (round(low, 2), round(high, 2)) == (0.43, 1.80)  # as the page says

    def test_edges(self) -> None:
        zero, one, bad = torch.zeros(8), torch.ones(8), torch.tensor([1.0, math.nan])
        assert estimate(zero, zero) == 0
        assert estimate(one, one) == 0
        assert estimate(zero, one) == math.inf
        assert math.isnan(estimate(torch.ones(2), bad))
        assert math.isnan(estimate(torch.zeros(2), bad))
        with pytest.raises(TraceContentError, match="found 8 and 2"):
            estimate(one, torch.ones(2))


class TestFingerprint:
    def test_fields_by_hand(self) -> None:
        f = fingerprint(torch.tensor([[1.0, -3.0], [3.0, 0.5]]), positions=(4, 5))
        assert (f.n, f.peak, f.at, f.positions) == (4, 3.0, 1, (4, 5))
        assert f.rms == math.sqrt((1 + 9 + 9 + 0.25) / 4)
        assert f.sums.dtype == torch.float32
        assert f.sums.shape == (16,)

    def test_is_of_the_values_in_row_major_order_whatever_the_strides(self) -> None:
        x = torch.randn(6, 10, generator=generator(1))
        assert torch.equal(fingerprint(x.T).sums, fingerprint(x.T.contiguous()).sums)
        assert torch.equal(fingerprint(x).sums, fingerprint(x.flatten()).sums)
        assert not torch.equal(fingerprint(x.T).sums, fingerprint(x).sums)
        assert torch.equal(fingerprint(x.bfloat16()).sums, fingerprint(x.bfloat16().float()).sums)

    def test_sums_are_float64(self) -> None:
        x = torch.full((1 << 18,), 0.1)
        x[0] = 1e8
        expected = (1.0 - 2.0 * sign_bits(1 << 18).double()) @ x.double() / math.sqrt(1 << 18)
        torch.testing.assert_close(fingerprint(x).sums, expected.float(), rtol=0, atol=0)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_no_number_shows_everywhere(self, bad: float) -> None:
        f = fingerprint(torch.tensor([1.0, bad, 1e30, bad]))
        assert not f.sums.isfinite().any()
        assert not math.isfinite(f.rms)
        assert not math.isfinite(f.peak)
        assert f.at == 1

    def test_no_values_are_refused(self) -> None:
        with pytest.raises(TraceContentError, match="no values"):
            fingerprint(torch.empty(0, 8))

    def test_of_a_trace_replaces_whole_tensors_only(self) -> None:
        x = torch.randn(2, 3, generator=generator(1))
        given = Trace(Origin("e"), dict(full_trace(Origin("e"), {"a": x}).taps) | {"b": (Stats({"rms": 1.0}),)})
        made = fingerprint_trace(given)
        found = made.find("a", Fingerprint)
        assert found is not None
        assert torch.equal(found.sums, fingerprint(x).sums)
        assert made.taps["b"] == given.taps["b"]
        assert made.origin == given.origin


# ---- Real activations ---------------------------------------------------------------------------------------------------

IDS = torch.tensor([[1, 300, 41, 42, 900, 77, 300, 41, 1500, 12, 13, 14]])


@cache
def demo() -> Weights:
    return Weights(open_source(bundled(MODEL)))


def run(provider: WeightProvider, ids: Tensor = IDS) -> dict[str, Tensor]:
    """Every tap, without the batch axis."""
    recorder = Recorder()
    forward(ids, provider, recorder)
    return {name: x[0] for name, x in recorder.taps.items()}


@cache
def taps() -> dict[str, Tensor]:
    return run(demo())


def test_estimates_on_real_activations() -> None:
    """Quantization error of every tap of the demo model: 1,304 estimates, those of one run not quite independent of each other."""
    weights, ratios = demo(), []
    matrices = [n for n in weights.names() if len(weights.shape(n)) == 2]
    for qtype in ("Q8_0", "Q4_0"):
        quantized = Requantized(Images(weights), dict.fromkeys(matrices, QTYPES[qtype]))
        for seed in range(4):
            ids = torch.randint(3, weights.config.n_vocab, (1, 10 + seed), generator=generator(seed))
            exact, test = run(weights, ids), run(quantized, ids)
            ratios += [estimate(x, test[name]) / nmse(x.flatten(), test[name].flatten()).item() for name, x in exact.items()]
    found = np.array(ratios)
    assert len(found) == 8 * 163
    assert found.mean() == pytest.approx(1, abs=0.04)
    assert found.std() == pytest.approx(RELATIVE_SD, abs=0.04)
    assert ((found > estimate_quantile(0.025)) & (found < estimate_quantile(0.975))).mean() == pytest.approx(0.95, abs=0.02)


def by_head(x: Tensor) -> Tensor:
    return x.reshape(len(x), demo().config.n_head, -1)  # [T,H,D]


# fault → (tap it is planted at, the wrong values); all but the rescaling keep the RMS exactly
FAULTS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "channels permuted": ("l_out-4", lambda x: x[:, torch.randperm(x.shape[1], generator=generator(1))]),
    "two neighbouring channels swapped, all pairs": ("ffn_swiglu-2", lambda x: x.reshape(len(x), -1, 2).flip(-1).flatten(1)),
    "signs flipped": ("attn_out-3", lambda x: -x),
    "every other sign flipped": ("Vcur-3", lambda x: x * torch.tensor([1.0, -1.0]).repeat(x.shape[1] // 2)),
    "one position's sign flipped": ("l_out-8", lambda x: torch.cat([x[:-1], -x[-1:]])),
    "heads in reverse": ("kqv_out-1", lambda x: by_head(x).flip(1).flatten(1)),
    "two heads swapped": ("kqv_out-1", lambda x: by_head(x)[:, [1, 0, *range(2, demo().config.n_head)]].flatten(1)),
    "heads and channels transposed": ("kqv_out-6", lambda x: by_head(x).transpose(1, 2).flatten(1)),
    "positions shifted by one": ("Kcur-5", lambda x: x.roll(1, 0)),
    "positions in reverse": ("embd", lambda x: x.flip(0)),
    "[T,E] read as [E,T]": ("ffn_norm-7", lambda x: x.T.reshape(x.shape)),
    "interleaved read as half-split": ("Qcur-0", lambda x: by_head(x).unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(1)),
    "attention maps of two heads swapped": ("kq_soft_max-4", lambda x: x[[1, 0, *range(2, len(x))]]),
    "attention transposed": ("kq_soft_max-4", lambda x: x.transpose(1, 2)),
}


class TestPlantedFaults:
    @pytest.mark.parametrize("fault", FAULTS)
    def test_is_seen_at_its_size_though_rms_is_the_same(self, fault: str) -> None:
        tap, plant = FAULTS[fault]
        ref, wrong = taps()[tap], plant(taps()[tap])
        assert ref.shape == wrong.shape
        assert fingerprint(wrong).rms == pytest.approx(fingerprint(ref).rms, rel=1e-6)  # RMS sees nothing
        ratio = estimate(ref, wrong) / nmse(ref.flatten(), wrong.flatten()).item()
        assert estimate_quantile(1e-4) < ratio < estimate_quantile(1 - 1e-4)

    @pytest.mark.parametrize("local", ["attn_q", "attn_output"])
    def test_a_transposed_square_weight_is_seen(self, local: str) -> None:
        w, x = demo().get(f"blk.3.{local}.weight"), taps()["attn_norm-3"]
        assert w.shape[0] == w.shape[1]
        right, wrong = x @ w.T, x @ w
        assert estimate(right, wrong) == pytest.approx(nmse(right.flatten(), wrong.flatten()).item(), rel=1.5)
        assert estimate(right, wrong) > 0.5

    def test_a_rescaled_tensor_is_seen(self) -> None:
        x = taps()["ffn_out-2"]
        assert estimate(x, 1.001 * x) == pytest.approx(1e-6, rel=1.5)
