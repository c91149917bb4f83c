"""Encoding Q2_K, Q3_K, Q4_K, Q5_K and Q6_K gives the bytes of ggml_quantize_chunk without an importance matrix."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from quantscope.qtypes import QTYPES
from quantscope.quants import CODECS, decode, encode, set_threads, thread_count
from quantscope.sources.gguf import open_gguf
from tests.models import STORIES
from tests.oracle import ggml

NAMES = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
N = 801  # super-blocks; odd, so that the last one of Q4_K and Q5_K has no partner
F32 = np.float32
LARGEST = float(np.finfo(F32).max)

Case = Callable[[np.random.Generator], np.ndarray]


def normal(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((N, 256))


def per_sub_block(values: np.ndarray) -> np.ndarray:
    """[N, 16] → [N, 256], each number sixteen times."""
    return np.repeat(values, 16, axis=1)


def powers_of_ten(rng: np.random.Generator, low: float, high: float, count: int) -> np.ndarray:
    return 10.0 ** rng.uniform(low, high, (N, count))


def one_element(rng: np.random.Generator) -> np.ndarray:
    return np.where(np.arange(256) == rng.integers(0, 256, (N, 1)), normal(rng), 0.0)


def any_finite_bits(rng: np.random.Generator) -> np.ndarray:
    x = rng.integers(0, 2**32, (N, 256), dtype=np.uint32).view(F32)
    return np.where(np.isfinite(x), x, F32(1))


# fmt: off
CASES: dict[str, Case] = {
    "normal":                        normal,
    "laplace":                       lambda rng: rng.laplace(size=(N, 256)),
    "uniform":                       lambda rng: rng.uniform(-1, 1, (N, 256)),
    "cauchy":                        lambda rng: rng.standard_cauchy((N, 256)),
    "trained-like":                  lambda rng: rng.standard_t(4, (N, 256)) * rng.lognormal(-4, 1, (N, 1)),
    "all negative":                  lambda rng: -np.abs(normal(rng)),
    "all positive":                  lambda rng: np.abs(normal(rng)),
    "far from zero":                 lambda rng: normal(rng) * 1e-2 + per_sub_block(rng.uniform(-2, 2, (N, 16))),
    "one last bit around a number":  lambda rng: normal(rng) * 1e-7 + per_sub_block(rng.uniform(-2, 2, (N, 16))),
    "zeros":                         lambda rng: np.zeros((N, 256)),
    "zeros of both signs":           lambda rng: np.where(rng.random((N, 256)) < 0.5, -0.0, 0.0),
    "mostly zero":                   lambda rng: normal(rng) * (rng.random((N, 256)) < 0.05),
    "zero sub-blocks":               lambda rng: normal(rng) * per_sub_block(rng.random((N, 16)) < 0.3),
    "one element":                   one_element,
    "constant":                      lambda rng: np.repeat(normal(rng)[:, :1], 256, axis=1),
    "constant sub-blocks":           lambda rng: per_sub_block(normal(rng)[:, :16]),
    "alternating signs":             lambda rng: np.tile([1.0, -1.0], (N, 128)) * np.abs(normal(rng)[:, :1]),
    "ramp":                          lambda rng: np.arange(256) * normal(rng)[:, :1],
    "ties, small integers":          lambda rng: rng.integers(-8, 9, (N, 256)),
    "ties, −2 … 2":                  lambda rng: rng.integers(-2, 3, (N, 256)),
    "ties, halves":                  lambda rng: rng.integers(-31, 32, (N, 256)) / 2,
    "outliers":                      lambda rng: normal(rng) * np.where(rng.random((N, 256)) < 0.01, 1e4, 1),
    "outliers near the largest":     lambda rng: np.where(rng.random((N, 256)) < 0.01, LARGEST * np.sign(normal(rng)), normal(rng)),
    "largest, one and zero":         lambda rng: rng.choice([LARGEST, -LARGEST, 1, 0], (N, 256)),
    "scale overflows float16":       lambda rng: normal(rng) * powers_of_ten(rng, 3, 8, 1),
    "scale underflows float16":      lambda rng: normal(rng) * powers_of_ten(rng, -9, -4, 1),
    "squares overflow":              lambda rng: normal(rng) * powers_of_ten(rng, 17, 37, 1),
    "squares underflow":             lambda rng: normal(rng) * powers_of_ten(rng, -26, -18, 1),
    "around 1e-15":                  lambda rng: normal(rng) * per_sub_block(powers_of_ten(rng, -17, -12, 16)),
    "subnormal":                     lambda rng: normal(rng) * powers_of_ten(rng, -45, -37, 1),
    "a scale per sub-block":         lambda rng: normal(rng) * per_sub_block(powers_of_ten(rng, -3, 3, 16)),
    "every scale per super-block":   lambda rng: normal(rng) * powers_of_ten(rng, -45, 37, 1),
    "every scale per sub-block":     lambda rng: normal(rng) * per_sub_block(powers_of_ten(rng, -45, 37, 16)),
    "every scale per element":       lambda rng: normal(rng) * powers_of_ten(rng, -45, 37, 256),
    "any finite bits":               any_finite_bits,
    "ties, a scale per sub-block":   lambda rng: np.round(2 * rng.laplace(size=(N, 256))) * per_sub_block(powers_of_ten(rng, -3, 3, 16)),
}
# fmt: on


def case(name: str) -> np.ndarray:
    x = CASES[name](np.random.default_rng(list(CASES).index(name)))
    return np.ascontiguousarray(np.clip(x, -LARGEST, LARGEST), F32)


def assert_same_bytes(name: str, x: np.ndarray, what: str) -> None:
    """x: float32[n_blocks, 256]."""
    assert np.isfinite(x).all()
    ggml.assert_same_bytes(encode(x, QTYPES[name], 256), ggml.quantize(x, QTYPES[name], 256), f"{name}, {what}")


@pytest.mark.parametrize("what", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_same_bytes(name: str, what: str) -> None:
    assert_same_bytes(name, case(what), what)


@pytest.mark.parametrize("name", NAMES)
def test_trained_weights(name: str) -> None:
    source = open_gguf(STORIES)
    x = np.concatenate([source.raw(t).view(F32) for t in source.tensors])
    assert_same_bytes(name, x[: x.size // 256 * 256].reshape(-1, 256), "stories260K")


@pytest.mark.parametrize("name", NAMES)
def test_encoding_what_was_decoded(name: str) -> None:
    """Values on the grid of the type: every division lands on an integer or between two."""
    raw = encode(case("normal"), QTYPES[name], 256)
    assert_same_bytes(name, decode(raw, QTYPES[name]).reshape(-1, 256), "decoded")


# One exponent per sub-block, and for the elements a range of mantissas: many equal ones, or all different.
exponents = st.lists(st.integers(-149, 126), min_size=16, max_size=16)
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
few = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 1e-15, -1e-15, 1e-40, 3e38, -3e38, 65504.0, 65520.0])


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(NAMES), st.integers(1, 3), exponents, st.integers(1, 1 << 23), st.integers(0, 2**32 - 1))
def test_random_blocks_with_a_scale_per_sub_block(name: str, n: int, powers: list[int], mantissas: int, seed: int) -> None:
    integers = np.random.default_rng(seed).integers(-mantissas, mantissas + 1, (n, 16, 16)) / mantissas
    x = np.clip(np.ldexp(integers, np.array(powers)[:, None]), -LARGEST, LARGEST).astype(F32).reshape(n, 256)
    assert_same_bytes(name, x, f"{n} blocks")


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(NAMES), arrays(F32, (2, 256), elements=st.one_of(finite, few), fill=st.one_of(finite, few)))
def test_any_finite_floats(name: str, x: np.ndarray) -> None:
    assert_same_bytes(name, x, "any floats")


@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_blocks(name: str) -> None:
    """Fewer super-blocks than lanes hold, and not one byte written past the end."""
    x, qtype = case("every scale per sub-block"), QTYPES[name]
    for n in range(1, 20):
        out = np.full((n + 2, qtype.type_size), 0xA5, np.uint8)
        CODECS[name].encode(x[:n], out[:n])
        ggml.assert_same_bytes(out[:n].reshape(-1), ggml.quantize(x[:n], qtype, 256), f"{name}, {n} blocks")
        assert (out[n:] == 0xA5).all()


@pytest.mark.parametrize("name", NAMES)
def test_number_of_threads_does_not_matter(name: str) -> None:
    x, qtype = np.tile(case("trained-like"), (2, 1)), QTYPES[name]
    theirs = ggml.quantize(x, qtype, 256)
    before = thread_count()
    try:
        for threads in (1, 2, 3, 5):
            set_threads(threads)
            ggml.assert_same_bytes(encode(x, qtype, 256), theirs, f"{name}, {threads} threads")
    finally:
        set_threads(before)
