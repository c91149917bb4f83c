"""The RoPE check on rotations made here, from the definition: (a + ib)·e^(iφ) for every pair of channels."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from quantscope.arch.config import RopeConfig
from quantscope.errors import NonFiniteError, ShapeError
from quantscope.rotation import RotationReport, channel_order, fit_rotation

LLAMA = RopeConfig(theta=10000.0, dim=32, layout="interleaved")
QWEN = RopeConfig(theta=1e6, dim=32, layout="half")
LINEAR = replace(LLAMA, scaling="linear", factor=4.0)
YARN = replace(QWEN, scaling="yarn", factor=4.0, n_ctx_orig=256, magnitude=1.1386)
FACTORS = (1.0,) * 6 + (1.3, 1.9, 2.7, 4.1) + (8.0,) * 6


@dataclass(frozen=True)
class Engine:
    """What an engine does, in its own words: every number here is one that some engine has had wrong."""

    theta: float = 10000.0
    dim: int = 32  # channels that turn
    exponent: int = 32  # channels in the exponent of theta
    half: bool = False
    factors: Sequence[float] = (1.0,) * 16
    scale: float = 1.0
    start: float = 0.0
    magnitude: float = 1.0

    def turn(self, x: NDArray[np.float64], positions: Sequence[int]) -> NDArray[np.float64]:
        """x [T,H,D] → [T,H,D]."""
        R = self.dim // 2
        freqs = self.theta ** (-2 * np.arange(R) / self.exponent) / np.array(self.factors)[:R]
        angle = (self.scale * np.array(positions) + self.start)[:, None, None] * freqs
        first = np.arange(R) if self.half else 2 * np.arange(R)
        second = first + (R if self.half else 1)
        z = (x[..., first] + 1j * x[..., second]) * np.exp(1j * angle) * self.magnitude
        out = x.copy()
        out[..., first], out[..., second] = z.real, z.imag
        return out


def signals(n: int = 24, heads: int = 4, d: int = 32, seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(0, 1, (n, heads, d)) * np.linspace(0.5, 2, d)


def check(
    engine: Engine,
    expected: RopeConfig = LLAMA,
    *,
    n: int = 24,
    heads: int = 4,
    start: int = 0,
    noise: float = 0.0,
    dtype: type[np.floating] = np.float32,
    factors: Sequence[float] | None = None,
    seed: int = 0,
) -> RotationReport:
    """The check of what this engine would record."""
    x, positions = signals(n, heads, seed=seed), range(start, start + n)
    y = engine.turn(x, positions)
    y += noise * y.std() * np.random.default_rng(seed + 1).normal(size=y.shape)
    before, after = (torch.from_numpy(z.astype(dtype).astype(np.float32)).flatten(1) for z in (x, y))
    return fit_rotation(before, after, heads, expected, positions, None if factors is None else torch.tensor(factors))


FAULTS: dict[str, tuple[Engine, RopeConfig, str]] = {
    "theta": (Engine(theta=500000.0), LLAMA, "with theta 500,000 instead of 10,000:"),
    "theta, unknown": (Engine(theta=12345.0), LLAMA, "with theta 12,345 instead of 10,000:"),
    "theta, ignored": (Engine(half=True), QWEN, "with theta 10,000 instead of 1,000,000:"),
    "layout": (Engine(half=True), LLAMA, "with pairs of halves (i, i + dim/2) instead of neighbours (2i, 2i + 1):"),
    "layout, qwen": (Engine(theta=1e6), QWEN, "with pairs of neighbours (2i, 2i + 1) instead of halves (i, i + dim/2):"),
    "half of the exponent": (Engine(exponent=16), LLAMA, "with 16 channels in the exponent of theta instead of 32:"),
    "twice the exponent": (Engine(exponent=64), LLAMA, "with 64 channels in the exponent of theta instead of 32:"),
    "partial": (Engine(dim=16, exponent=16), LLAMA, "with 16 channels of a head turning instead of 32 (and 16 in the exponent):"),
    "partial, halves": (
        Engine(dim=16, half=True, theta=1e6),
        QWEN,
        "with 16 channels of a head turning instead of 32 (with 32 in the exponent):",
    ),
    "not partial": (Engine(), replace(LLAMA, dim=16), "with 32 channels of a head turning instead of 16 (and 32 in the exponent):"),
    "no rotation": (Engine(scale=0), LLAMA, "with no rotation at all:"),
    "from 1": (Engine(start=1), LLAMA, "with positions 1 too high (counted from 1?):"),
    "too low": (Engine(start=-1), LLAMA, "with positions 1 too low:"),
    "past forgotten": (Engine(start=17), LLAMA, "with positions 17 too high:"),
    "one position": (Engine(scale=0, start=9), LLAMA, "with position 9 for every token:"),
    "reverse": (Engine(scale=-1), LLAMA, "with the reverse rotation (the sign of sin):"),
    "twice": (Engine(scale=2), LLAMA, "with the rotation applied twice:"),
    "linear": (Engine(scale=0.25), LLAMA, "with positions divided by 4 (linear scaling):"),
    "linear, unknown": (Engine(scale=0.4), LLAMA, "with positions times 0.4 (linear scaling by 2.5):"),
    "linear, ignored": (Engine(), LINEAR, "with no linear scaling (by 4):"),
    "linear, twice": (Engine(scale=1 / 16), LINEAR, "with linear scaling by 4 applied twice:"),
    "yarn, ignored": (Engine(theta=1e6, half=True), YARN, "with no YaRN scaling (by 4):"),
    "yarn, as linear": (Engine(theta=1e6, half=True, scale=0.25), YARN, "with linear scaling by 4 of every pair instead of YaRN's:"),
    "magnitude": (Engine(magnitude=0.9), LLAMA, "with magnitude 0.9 instead of 1:"),
    "theta, from 1": (
        Engine(theta=500000.0, start=1),
        LLAMA,
        "with theta 500,000 instead of 10,000 and positions 1 too high (counted from 1?):",
    ),
    "theta, unknown, layout": (
        Engine(theta=23456.0, half=True),
        LLAMA,
        "with pairs of halves (i, i + dim/2) instead of neighbours (2i, 2i + 1) and theta 23,456 instead of 10,000:",
    ),
    "linear, magnitude": (
        Engine(scale=0.125, magnitude=1.2),
        LLAMA,
        "with positions divided by 8 (linear scaling) and magnitude 1.2 instead of 1:",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize(("heads", "dtype"), [(4, np.float32), (1, np.float32), (2, np.float16)])
def test_a_planted_fault_is_named(name: str, heads: int, dtype: type[np.floating]) -> None:
    engine, expected, words = FAULTS[name]
    report = check(engine, expected, heads=heads, dtype=dtype)
    if report.fits[0].setting.fitted and dtype is np.float16:  # the number is known to three digits
        words = re.split(r"\d", words)[0]
    assert words in report.verdict
    assert "As good" not in report.verdict
    assert not report.as_expected
    assert report.fits[0].nmse < (1e-6 if dtype is np.float16 else 1e-12)
    assert report.expected_nmse > 5e-4


def test_all_heads_in_the_exponent() -> None:
    assert "with 128 channels in the exponent of theta instead of 32:" in check(Engine(exponent=128)).verdict


FACTOR_FAULTS = {
    "ignored": ((1.0,) * 16, "with the frequency factors (rope_freqs.weight) ignored:"),
    "applied twice": (tuple(f * f for f in FACTORS), "with the frequency factors (rope_freqs.weight) applied twice:"),
    "multiplied": (tuple(1 / f for f in FACTORS), "with frequencies multiplied by their factors (rope_freqs.weight), not divided:"),
}


@pytest.mark.parametrize("name", FACTOR_FAULTS)
def test_a_fault_of_the_factors_is_named(name: str) -> None:
    used, words = FACTOR_FAULTS[name]
    assert words in check(Engine(theta=500000.0, factors=used), replace(LLAMA, theta=500000.0), factors=FACTORS).verdict


def test_factors_that_the_model_has_not_are_named() -> None:
    """Llama 3.1's, by their definition."""
    wavelengths = 2 * math.pi * 500000.0 ** (2 * np.arange(16) / 32)
    smooth = (8192 / wavelengths - 1) / 3
    factors = np.where(wavelengths > 8192, 8.0, np.where(wavelengths < 2048, 1.0, 1 / ((1 - smooth) / 8 + smooth)))
    report = check(Engine(theta=500000.0, factors=factors), replace(LLAMA, theta=500000.0), n=200)
    assert "with Llama 3.1's frequency factors, which this model has not:" in report.verdict


@pytest.mark.parametrize(
    ("engine", "expected", "factors"),
    [
        (Engine(), LLAMA, None),
        (Engine(theta=1e6, half=True), QWEN, None),
        (Engine(scale=0.25), LINEAR, None),
        (Engine(dim=16, exponent=16), replace(LLAMA, dim=16), None),
        (Engine(factors=FACTORS), LLAMA, FACTORS),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_expected_setting_is_recognized(
    engine: Engine, expected: RopeConfig, factors: Sequence[float] | None, dtype: type[np.floating]
) -> None:
    report = check(engine, expected, factors=factors, dtype=dtype)
    assert report.as_expected
    assert report.fits[0].setting.differs == {}
    assert report.verdict.startswith("The engine rotated as expected (theta ")
    assert "do not tell" not in report.verdict


@settings(max_examples=25, deadline=None)
@given(
    log_theta=st.floats(math.log(50), math.log(5e7)),
    half=st.booleans(),
    n=st.integers(12, 100),
    heads=st.integers(1, 4),
    first=st.integers(0, 40),
    seed=st.integers(0, 99),
)
def test_any_theta_is_measured(log_theta: float, half: bool, n: int, heads: int, first: int, seed: int) -> None:
    expected = replace(LLAMA, theta=700.0, layout="half" if half else "interleaved")
    report = check(Engine(theta=math.exp(log_theta), half=half), expected, n=n, heads=heads, start=first, seed=seed)
    assert report.fits[0].setting.rope.theta == pytest.approx(math.exp(log_theta), rel=1e-3)
    assert set(report.fits[0].setting.differs) <= {"theta"}
    assert report.fits[0].nmse < 1e-11


@settings(max_examples=25, deadline=None)
@given(
    scale=st.floats(0.02, 4) | st.floats(-4, -0.02),
    start=st.just(0),
    n=st.integers(12, 100),
    heads=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_any_scale_of_the_positions_is_measured(scale: float, start: int, n: int, heads: int, seed: int) -> None:
    report = check(Engine(scale=scale), n=n, heads=heads, seed=seed)
    assert report.fits[0].setting.scale == pytest.approx(scale, rel=1e-5)
    assert set(report.fits[0].setting.differs) <= {"positions"}


@settings(max_examples=25, deadline=None)
@given(start=st.integers(-4000, 4000), n=st.integers(2, 60), first=st.integers(0, 3000), seed=st.integers(0, 99))
def test_any_offset_of_the_positions_is_found(start: int, n: int, first: int, seed: int) -> None:
    report = check(Engine(start=start), n=n, start=first, seed=seed)
    found = report.fits[0].setting
    assert found.scale * first + found.start == first + start
    assert report.fits[0].nmse < 1e-11


@pytest.mark.parametrize("noise", [0.003, 0.02])
@pytest.mark.parametrize("name", ["theta", "layout", "from 1", "linear, ignored", "no rotation", "twice the exponent"])
def test_noise_does_not_hide_a_fault(name: str, noise: float) -> None:
    engine, expected, words = FAULTS[name]
    report = check(engine, expected, noise=noise, n=48)
    assert words in report.verdict
    assert report.fits[0].nmse == pytest.approx(noise**2, rel=0.2)


def test_two_settings_that_noise_does_not_tell_apart() -> None:
    """With 16 in the exponent the last eight pairs hardly turn: that looks as if 16 channels turned only."""
    verdict = check(Engine(exponent=16), noise=0.02, n=48).verdict
    assert "As good: " in verdict
    assert "16 channels in the exponent of theta instead of 32" in verdict
    assert "16 channels of a head turning instead of 32 (and 16 in the exponent)" in verdict


def test_noise_is_no_fault() -> None:
    report = check(Engine(), noise=0.02, n=48)
    assert report.as_expected
    assert report.expected_nmse == pytest.approx(4e-4, rel=0.2)


def test_position_0_says_nothing() -> None:
    report = check(Engine(theta=500000.0), n=1)
    assert report.as_expected
    assert report.verdict.startswith("Nothing can be said about the rotation: position 0 turns nothing")
    assert {"layout", "theta"} <= {axis for fit in report.undecided for axis in fit.setting.differs}


def test_one_token_that_should_not_turn_but_does() -> None:
    assert "with positions 1 too high" in check(Engine(start=1), n=1).verdict


def test_few_positions_leave_settings_open() -> None:
    """Two noisy tokens: a slow pair turns by 10⁻³ or by less."""
    report = check(Engine(), n=2, noise=0.01)
    assert report.as_expected
    assert "These positions do not tell it from" in report.verdict


def test_something_else_than_a_rotation() -> None:
    x = signals()
    before, after = torch.from_numpy(x).flatten(1), torch.from_numpy(signals(seed=5)).flatten(1)
    report = fit_rotation(before, after, 4, LLAMA, range(24))
    assert report.verdict.startswith("No setting of RoPE explains")
    assert "do not turn alike" in report.verdict
    assert report.fits[0].nmse > 0.5


def test_frequencies_of_no_known_rule_are_measured() -> None:
    rates = np.random.default_rng(3).uniform(0.01, 1, 16)
    freqs = 10000.0 ** (-2 * np.arange(16) / 32)
    report = check(Engine(factors=tuple(freqs / rates)))
    assert report.verdict.startswith("No setting of RoPE explains")
    assert f"pair 15 by {rates[15]:.4f} " in report.verdict


def test_zeros_say_nothing() -> None:
    zeros = torch.zeros(4, 64)
    assert "nothing can be said" in fit_rotation(zeros, zeros, 2, LLAMA, range(4)).verdict


def in_halves(x: torch.Tensor, n_head: int) -> torch.Tensor:
    heads = x.reshape(len(x), n_head, -1)
    return torch.cat([heads[..., 0::2], heads[..., 1::2]], -1).flatten(1)


def test_hugging_faces_order_turned_in_halves_is_as_expected() -> None:
    x = signals()
    before, after = (torch.from_numpy(z).flatten(1) for z in (x, Engine().turn(x, range(24))))
    report = fit_rotation(in_halves(before, 4), in_halves(after, 4), 4, LLAMA, range(24), reference=before)
    assert report.order == "half"
    assert report.as_expected
    assert "Its channels lie in another order" in report.verdict
    unknown = fit_rotation(in_halves(before, 4), in_halves(after, 4), 4, LLAMA, range(24))
    assert "with pairs of halves" in unknown.verdict  # without the reference's q it looks like the wrong pairs


def test_hugging_faces_order_turned_as_neighbours_is_a_fault() -> None:
    x = signals()
    halves = in_halves(torch.from_numpy(x).flatten(1), 4)
    after = torch.from_numpy(Engine().turn(halves.reshape(24, 4, 32).numpy(), range(24))).flatten(1)
    report = fit_rotation(halves, after, 4, LLAMA, range(24), reference=torch.from_numpy(x).flatten(1))
    assert report.order == "half"
    assert "with pairs of neighbours (2i, 2i + 1) instead of halves (i, i + dim/2):" in report.verdict


def test_channel_orders() -> None:
    x = torch.from_numpy(signals()).flatten(1)
    assert channel_order(x, x, 4, 32) == "canonical"
    assert channel_order(x, in_halves(x, 4), 4, 32) == "half"
    assert channel_order(in_halves(x, 4), x, 4, 32) == "interleaved"
    assert channel_order(x, x.flip(1), 4, 32) is None
    assert channel_order(x, x[:, :64], 2, 32) is None


def test_settings_are_ranked() -> None:
    errors = [fit.nmse for fit in check(Engine(theta=500000.0)).fits]
    assert errors == sorted(errors)
    assert len(errors) > 3


@pytest.mark.parametrize(
    ("before", "after", "heads", "n"),
    [
        (torch.zeros(4, 64), torch.zeros(4, 32), 2, 4),
        (torch.zeros(4, 64), torch.zeros(4, 64), 2, 5),
        (torch.zeros(4, 64), torch.zeros(4, 64), 5, 4),
        (torch.zeros(4, 64), torch.zeros(4, 64), 4, 4),
        (torch.zeros(4, 2, 32), torch.zeros(4, 2, 32), 2, 4),
        (torch.zeros(0, 64), torch.zeros(0, 64), 2, 0),
    ],
)
def test_shapes_that_do_not_fit(before: torch.Tensor, after: torch.Tensor, heads: int, n: int) -> None:
    with pytest.raises(ShapeError, match="RoPE check: expected"):
        fit_rotation(before, after, heads, LLAMA, range(n))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_no_numbers(bad: float) -> None:
    x = torch.ones(4, 64)
    x[1, 3] = bad
    with pytest.raises(NonFiniteError, match="before the rotation has 1 NaN"):
        fit_rotation(x, torch.ones(4, 64), 2, LLAMA, range(4))
