"""Encoding F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 gives the bytes of ggml_quantize_chunk."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from quantscope.qtypes import QTYPES
from quantscope.quants import encode, set_threads, thread_count
from tests.oracle import ggml
from tests.oracle.test_decode import weights

NAMES = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
ROW = 256
N = 1000 * ROW
F32 = np.float32


def bits_below(limit: int) -> np.ndarray:
    """Floats of both signs whose magnitude, as bits, is below ``limit``, evenly over the bit patterns."""
    rng = np.random.default_rng(1)
    return rng.integers(0, limit, N, dtype=np.uint32).view(F32) * np.where(rng.random(N) < 0.5, F32(-1), F32(1))


def zeros_of_both_signs() -> np.ndarray:
    return np.where(np.random.default_rng(2).random(N) < 0.5, F32(-0.0), F32(0.0))


def with_zeros(x: np.ndarray) -> np.ndarray:
    return np.where(np.random.default_rng(3).random(N) < 0.3, zeros_of_both_signs(), x)


def every_scale() -> np.ndarray:
    """Each block of 32 with its own power of two, from the smallest subnormal to the largest float."""
    rng = np.random.default_rng(4)
    return (rng.standard_normal((N // 32, 32)) * np.exp2(rng.integers(-150, 124, (N // 32, 1)))).astype(F32).reshape(-1)


def outliers(size: float) -> np.ndarray:
    """One huge element in most blocks, sometimes two of opposite sign."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal(N).astype(F32)
    x[rng.integers(0, N, N // 20)] = size
    x[rng.integers(0, N, N // 40)] = -size
    return x


CASES = {
    "normal": np.random.default_rng(0).standard_normal(N).astype(F32),
    "trained": weights(N),
    "zeros": np.zeros(N, F32),
    "zeros of both signs": zeros_of_both_signs(),
    "constant rows": np.repeat(np.random.default_rng(6).standard_normal(N // ROW), ROW).astype(F32),
    "ties in magnitude": np.random.default_rng(7).integers(-3, 4, N).astype(F32),
    "not negative, zeros of both signs": with_zeros(np.abs(weights(N))),
    "not positive, zeros of both signs": with_zeros(-np.abs(weights(N))),
    "outlier": outliers(1e4),
    "scale overflows float16": outliers(3e6),
    "range overflows float32": outliers(3.4e38),
    "subnormal": bits_below(1 << 23),
    "scale without inverse": bits_below(1 << 22),
    "tiny": bits_below(1 << 25),
    "any finite bits": bits_below(0x7F800000),
    "every scale": every_scale(),
    "halves, rounded up and down": (np.random.default_rng(8).integers(-254, 255, N) / 2).astype(F32),
    "float16 and its neighbours": np.nextafter(
        np.random.default_rng(9).integers(0, 0x7C00, N, dtype=np.uint16).view(np.float16).astype(F32), F32(np.inf)
    ),
    "half way between float16s": (np.arange(N, dtype=np.uint32) * 7919 % 0x47800000 & 0xFFFFE000 | 0x1000).astype(np.uint32).view(F32),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_same_bytes(name: str, case: str) -> None:
    x, qtype = CASES[case], QTYPES[name]
    assert np.isfinite(x).all()
    ggml.assert_same_bytes(encode(x.reshape(-1, ROW), qtype, ROW), ggml.quantize(x, qtype, ROW), f"{name}, {case}")


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
few = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.5, 1e-40, -1e-40, 3e38, -3e38, 65504.0, 65520.0])


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(NAMES), st.integers(1, 3), st.data())
def test_any_finite_floats(name: str, n_blocks: int, data: st.DataObject) -> None:
    x = data.draw(arrays(F32, 32 * n_blocks, elements=data.draw(st.sampled_from([finite, few, st.one_of(finite, few)]))))
    ggml.assert_same_bytes(encode(x, QTYPES[name], x.size), ggml.quantize(x, QTYPES[name], x.size), name)


@pytest.mark.parametrize("name", NAMES)
def test_number_of_threads_does_not_matter(name: str) -> None:
    x = weights(1_000_000 // 32 * 32)
    theirs = ggml.quantize(x, QTYPES[name], 32)
    before = thread_count()
    try:
        for threads in (1, 2, 5):
            set_threads(threads)
            ggml.assert_same_bytes(encode(x.reshape(-1, 32), QTYPES[name], 32), theirs, f"{threads} threads")
    finally:
        set_threads(before)
