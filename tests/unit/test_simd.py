"""Every lane is one IEEE float32 operation, as numpy computes it."""

from __future__ import annotations

import numba
import numpy as np
import pytest
from numba.core.errors import TypingError

from quantscope.quants import simd

SPECIAL = np.array([0.0, -0.0, 1.0, -1.0, 0.1, -2.5, 3e38, -3e38, 1e-45, -1e-40, np.inf, -np.inf, np.nan, 7.0, 0.5, 16777215.0], np.float32)
OTHER = np.array([-0.0, 0.0, 3.0, -1.0, 0.3, 2.5, 3e38, 3e38, 1e-45, 1e-30, np.inf, 1.0, 1.0, np.nan, -0.5, 1.5], np.float32)


def _row(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values.reshape(1, simd.LANES))


@numba.njit
def _binary(a, b, out):
    x, y = simd.load(a, 0), simd.load(b, 0)
    simd.store(out, 0, x + y)
    simd.store(out, 1, x - y)
    simd.store(out, 2, x * y)
    simd.store(out, 3, x / y)
    simd.store(out, 4, simd.absolute(x))
    simd.store(out, 5, simd.negative(x))
    simd.store(out, 6, simd.square_root(x))


@numba.njit
def _compare(a, b, out):
    x, y = simd.load(a, 0), simd.load(b, 0)
    yes, no = simd.i32(1), simd.i32(0)
    simd.store(out, 0, simd.where(x < y, yes, no))
    simd.store(out, 1, simd.where(x > y, yes, no))
    simd.store(out, 2, simd.where(x == y, yes, no))
    simd.store(out, 3, simd.where(x != y, yes, no))
    simd.store(out, 4, simd.where((x < y) & (x != x), yes, no))
    simd.store(out, 5, simd.where((x < y) | (x != x), yes, no))
    return simd.any_lane(x > y), simd.any_lane((x < y) & (x > y))


@numba.njit
def _multiply_add(a, b, c, out):
    simd.store(out, 0, simd.load(a, 0) * simd.load(b, 0) + simd.load(c, 0))


@numba.njit
def _integers(a, out):
    x = simd.load(a, 0)
    bits = simd.bits_of(x)
    simd.store(out, 0, bits)
    simd.store(out, 1, (bits & simd.i32(0xFF)) + simd.i32(3) - simd.i32(260))
    simd.store(out, 2, simd.where(bits < simd.i32(0), simd.i32(-1), simd.where(bits > simd.i32(0), simd.i32(1), simd.i32(0))))


@numba.njit
def _splat(out):
    simd.store(out, 0, simd.f32(0.1))
    simd.store(out, 1, simd.f32(16777217))
    simd.store(out, 2, simd.to_f32(simd.i32(-7)))


def test_arithmetic_is_ieee_float32() -> None:
    out = np.empty((7, simd.LANES), np.float32)
    _binary(_row(SPECIAL), _row(OTHER), out)
    with np.errstate(all="ignore"):
        expected = [SPECIAL + OTHER, SPECIAL - OTHER, SPECIAL * OTHER, SPECIAL / OTHER, np.abs(SPECIAL), -SPECIAL, np.sqrt(SPECIAL)]
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(np.signbit(out[5]), ~np.signbit(SPECIAL))


def test_comparisons_are_those_of_c() -> None:
    out = np.empty((6, simd.LANES), np.int32)
    any_greater, any_impossible = _compare(_row(SPECIAL), _row(OTHER), out)
    less, nan = SPECIAL < OTHER, np.isnan(SPECIAL)
    np.testing.assert_array_equal(out, [less, SPECIAL > OTHER, SPECIAL == OTHER, SPECIAL != OTHER, less & nan, less | nan])
    assert any_greater
    assert not any_impossible


def test_products_are_rounded_before_the_sum() -> None:
    """A fused multiply-add would keep the 2⁻²⁴ that the rounding of the product drops."""
    a = np.full(simd.LANES, 1 + 2.0**-12, np.float32)
    c = np.full(simd.LANES, -(1 + 2.0**-11), np.float32)
    out = np.empty((1, simd.LANES), np.float32)
    _multiply_add(_row(a), _row(a), _row(c), out)
    np.testing.assert_array_equal(out[0], 0.0)


def test_integers_and_bits() -> None:
    out = np.empty((3, simd.LANES), np.int32)
    _integers(_row(SPECIAL), out)
    bits = SPECIAL.view(np.int32)
    np.testing.assert_array_equal(out, [bits, (bits & 0xFF) + 3 - 260, np.sign(bits)])


def test_splat_rounds_to_float32() -> None:
    out = np.empty((3, simd.LANES), np.float32)
    _splat(out)
    np.testing.assert_array_equal(out, np.array([[0.1], [16777217], [-7]], np.float32).repeat(simd.LANES, 1))


@pytest.mark.parametrize("array", [np.zeros((1, 32), np.float32)[:, ::2], np.zeros((1, 16)), np.zeros(16, np.float32)])
def test_load_refuses_arrays_without_rows_of_lanes(array: np.ndarray) -> None:
    with pytest.raises(TypingError, match="has no rows of lanes"):
        _integers(array, np.empty((3, simd.LANES), np.int32))


def test_store_refuses_other_lanes() -> None:
    with pytest.raises(TypingError, match="cannot be stored"):
        _splat(np.empty((3, simd.LANES), np.int32))
