"""RoPE against its definition."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from quantscope.arch.config import RopeConfig, RopeLayout
from quantscope.model.rope import RopeTables, frequencies, rope_tables, rotate, yarn_ramp

PLAIN = RopeConfig(theta=10000.0, dim=8, layout="interleaved")
YARN = RopeConfig(theta=10000.0, dim=64, layout="half", scaling="yarn", factor=4.0, n_ctx_orig=2048)


def tables(rope: RopeConfig, n: int = 6, start: int = 0) -> RopeTables:
    return rope_tables(rope, torch.arange(start, start + n), dtype=torch.float64)


def random_heads(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, n, 2, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)  # [B,T,H,D]


def test_frequencies_are_powers_of_theta() -> None:
    assert frequencies(PLAIN).tolist() == pytest.approx([1.0, 0.1, 0.01, 0.001], rel=1e-12)


@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_rotation_is_complex_multiplication(layout: RopeLayout) -> None:
    rope = replace(PLAIN, layout=layout)
    x = random_heads(6, 8)
    pairs = (0, 2, 4, 6), (1, 3, 5, 7)
    first, second = pairs if layout == "interleaved" else ((0, 1, 2, 3), (4, 5, 6, 7))
    z = torch.complex(x[..., first], x[..., second])
    turned = z * torch.exp(1j * torch.arange(6)[:, None, None] * frequencies(rope))
    out = rotate(x, tables(rope))
    torch.testing.assert_close(out[..., first], turned.real)
    torch.testing.assert_close(out[..., second], turned.imag)


def test_layouts_are_permutations_of_each_other() -> None:
    x = random_heads(6, 8)
    halves = torch.cat([x[..., 0::2], x[..., 1::2]], -1)
    out, out_halves = rotate(x, tables(PLAIN)), rotate(halves, tables(replace(PLAIN, layout="half")))
    assert torch.equal(torch.cat([out[..., 0::2], out[..., 1::2]], -1), out_halves)


@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_scores_depend_on_the_distance_only(layout: RopeLayout) -> None:
    rope = replace(PLAIN, layout=layout)
    q, k = random_heads(1, 8, 1).expand(-1, 6, -1, -1), random_heads(1, 8, 2).expand(-1, 6, -1, -1)
    scores = [(rotate(q, tables(rope, start=s)) @ rotate(k, tables(rope, start=s)).mT)[..., 0, 1] for s in (0, 1000)]
    torch.testing.assert_close(scores[0], scores[1])
    apart = (rotate(q, tables(rope, start=0)) * rotate(k, tables(rope, start=3))).sum(-1)
    torch.testing.assert_close(apart, (rotate(q, tables(rope, start=50)) * rotate(k, tables(rope, start=53))).sum(-1))


def test_channels_beyond_dim_do_not_turn() -> None:
    x = random_heads(6, 12)
    out = rotate(x, tables(PLAIN))
    assert torch.equal(out[..., 8:], x[..., 8:])
    assert torch.equal(out[..., :8], rotate(x[..., :8], tables(PLAIN)))


def test_linear_scaling_stretches_positions() -> None:
    scaled = rope_tables(replace(PLAIN, scaling="linear", factor=4.0), torch.arange(0, 24, 4), dtype=torch.float64)
    torch.testing.assert_close(scaled.cos, tables(PLAIN).cos)
    torch.testing.assert_close(scaled.sin, tables(PLAIN).sin)


def test_factors_divide_frequencies() -> None:
    factors = torch.tensor([1.0, 2.0, 4.0, 8.0])
    torch.testing.assert_close(frequencies(PLAIN, factors), frequencies(PLAIN) / factors.double())


def test_yarn_keeps_fast_pairs_and_interpolates_slow_ones() -> None:
    freqs, plain = frequencies(YARN), frequencies(replace(YARN, scaling="none"))
    turns = plain * YARN.n_ctx_orig / (2 * math.pi)
    fast, slow = turns > 2 * YARN.beta_fast, turns < YARN.beta_slow / 2
    assert fast.sum() >= 5
    assert slow.sum() >= 5
    assert torch.equal(freqs[fast], plain[fast])
    torch.testing.assert_close(freqs[slow], plain[slow] / YARN.factor)
    ramp = yarn_ramp(YARN)
    assert ((ramp[1:] <= ramp[:-1]) & (ramp[1:] >= 0)).all()
    assert ((ramp > 0) & (ramp < 1)).any()


def test_yarn_ramp_by_hand() -> None:
    """dim 64, context 2048: 32 turns at pair 8.1 → 8, one turn at pair 20.1 → 21."""
    assert yarn_ramp(YARN)[[8, 9, 20, 21]].tolist() == pytest.approx([1, 12 / 13, 1 / 13, 0])


def test_yarn_ramp_of_equal_ends_is_a_step() -> None:
    ramp = yarn_ramp(replace(YARN, n_ctx_orig=1))
    assert set(ramp.tolist()) == {0.0, 1.0}


def test_magnitude_scales_cos_and_sin() -> None:
    out = tables(replace(PLAIN, magnitude=1.25))
    torch.testing.assert_close(out.cos, 1.25 * tables(PLAIN).cos)
    torch.testing.assert_close(out.sin, 1.25 * tables(PLAIN).sin)


def test_angles_are_exact_in_float32_tables() -> None:
    """Angles are not rounded to float32 before cos: at position 100,000 that would cost 0.004."""
    positions = torch.tensor([100_003])
    got = rope_tables(PLAIN, positions).cos[0]
    expected = [math.cos(100_003 * 10000.0 ** (-i / 4)) for i in range(4)]
    assert got.dtype == torch.float32
    assert got.tolist() == pytest.approx(expected, abs=1e-7)
