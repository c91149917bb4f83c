"""Encoding with importance gives the bytes of ggml_quantize_chunk with an importance matrix, for every type of the presets."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from quantscope.qtypes import QTYPES
from quantscope.quants import CODECS, encode, set_threads, thread_count
from tests.oracle import ggml
from tests.oracle.test_k_encode import CASES, LARGEST, case

NAMES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
WEIGHTED = [name for name in NAMES if name != "Q8_0"]
N_ROWS, ROW = 11, 768  # an odd number of super-blocks, and rows that no group of sixteen blocks ends with
F32 = np.float32


def one_hot(rng: np.random.Generator) -> np.ndarray:
    return np.where(np.arange(ROW) == rng.integers(0, ROW), 3.0, 0.0)


def any_finite_bits(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 0x7F800000, ROW, dtype=np.uint32).view(F32)


IMPORTANCE: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "like a model's": lambda rng: rng.lognormal(-2, 2, ROW),
    "all equal": lambda rng: np.ones(ROW),
    "zeros": lambda rng: np.zeros(ROW),
    "one column": one_hot,
    "mostly zero": lambda rng: rng.lognormal(size=ROW) * (rng.random(ROW) < 0.1),
    "zero blocks": lambda rng: rng.lognormal(size=ROW) * np.repeat(rng.random(ROW // 32) < 0.5, 32),
    "over ten orders": lambda rng: 10.0 ** rng.uniform(-5, 5, ROW),
    "one outlier": lambda rng: np.where(np.arange(ROW) == 5, 1e7, 1.0),
    "tiny": lambda rng: rng.lognormal(size=ROW) * 1e-30,
    "subnormal": lambda rng: rng.integers(0, 1 << 22, ROW, dtype=np.uint32).view(F32),
    "huge": lambda rng: rng.lognormal(size=ROW) * 1e30,
    "any finite bits": any_finite_bits,
    "small integers": lambda rng: rng.integers(0, 3, ROW),
}


def importance(what: str) -> np.ndarray:
    return np.ascontiguousarray(IMPORTANCE[what](np.random.default_rng(list(IMPORTANCE).index(what))), F32)


@cache
def rows(what: str) -> np.ndarray:
    """[N_ROWS, ROW] of a case of test_k_encode.py."""
    return np.ascontiguousarray(case(what)[: N_ROWS * ROW // 256].reshape(N_ROWS, ROW))


def assert_same_bytes(name: str, x: np.ndarray, weights: np.ndarray, what: str) -> None:
    """x: float32[n_rows, n_per_row]."""
    qtype = QTYPES[name]
    theirs = ggml.quantize(x, qtype, x.shape[-1], importance=weights)
    ggml.assert_same_bytes(encode(x, qtype, x.shape[-1], weights), theirs, f"{name}, {what}")


@pytest.mark.parametrize("weights", IMPORTANCE)
@pytest.mark.parametrize("name", NAMES)
def test_same_bytes(name: str, weights: str) -> None:
    for what in CASES:
        assert_same_bytes(name, rows(what), importance(weights), f"{what}, importance {weights}")


@pytest.mark.parametrize("name", WEIGHTED)
def test_importance_matters(name: str) -> None:
    x = rows("trained-like")
    plain, weighted = encode(x, QTYPES[name], ROW), encode(x, QTYPES[name], ROW, importance("over ten orders"))
    assert (plain != weighted).mean() > 0.02


exponents = st.lists(st.integers(-149, 126), min_size=16, max_size=16)
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
few = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 1e-15, -1e-15, 1e-40, 3e38, -3e38, 65504.0, 65520.0])
weight = st.one_of(st.floats(0, LARGEST, width=32), st.sampled_from([0.0, 1.0, 1e-40, 1e-15, 1e6, 3e38]))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(NAMES), st.integers(1, 3), exponents, st.integers(1, 1 << 23), st.integers(0, 2**32 - 1), st.floats(-6, 6))
def test_random_blocks_with_a_scale_per_sub_block(name: str, n: int, powers: list[int], mantissas: int, seed: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    integers = rng.integers(-mantissas, mantissas + 1, (n, 16, 16)) / mantissas
    x = np.clip(np.ldexp(integers, np.array(powers)[:, None]), -LARGEST, LARGEST).astype(F32).reshape(n, 256)
    assert_same_bytes(name, x, np.exp(spread * rng.standard_normal(256)).astype(F32), f"{n} blocks")


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(NAMES),
    arrays(F32, (2, 256), elements=st.one_of(finite, few), fill=st.one_of(finite, few)),
    arrays(F32, 256, elements=weight, fill=weight),
)
def test_any_finite_floats(name: str, x: np.ndarray, weights: np.ndarray) -> None:
    assert_same_bytes(name, x, weights, "any floats")


@pytest.mark.parametrize("name", WEIGHTED)
def test_any_number_of_blocks(name: str) -> None:
    """Fewer blocks than lanes hold, rows of any length, and not one byte written past the end."""
    qtype = QTYPES[name]
    flat = case("every scale per sub-block").reshape(-1)
    for n_rows, per_row in [(1, 1), (1, 2), (1, 17), (2, 3), (3, 5), (5, 7), (17, 1), (33, 1), (7, 16)]:
        row = per_row * qtype.block_size
        x = np.ascontiguousarray(flat[: n_rows * row])
        weights = np.ascontiguousarray(np.resize(importance("like a model's"), row))
        out = np.full((n_rows * per_row + 2, qtype.type_size), 0xA5, np.uint8)
        blocks = x.reshape(-1, qtype.block_size)
        CODECS[name].encode_rows(blocks, weights.reshape(per_row, qtype.block_size), out[: len(blocks)])
        theirs = ggml.quantize(x, qtype, row, importance=weights)
        ggml.assert_same_bytes(out[: len(blocks)].reshape(-1), theirs, f"{name}, {n_rows} rows of {per_row} blocks")
        assert (out[len(blocks) :] == 0xA5).all()


@pytest.mark.parametrize("name", NAMES)
def test_number_of_threads_does_not_matter(name: str) -> None:
    x, weights = np.tile(rows("trained-like"), (30, 1)), importance("like a model's")
    theirs = ggml.quantize(x, QTYPES[name], ROW, importance=weights)
    before = thread_count()
    try:
        for threads in (1, 2, 5):
            set_threads(threads)
            ggml.assert_same_bytes(encode(x, QTYPES[name], ROW, weights), theirs, f"{name}, {threads} threads")
    finally:
        set_threads(before)
