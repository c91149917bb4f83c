"""What the K encoders promise without ggml at hand; tests/oracle/test_k_encode.py compares every byte with it."""

from __future__ import annotations

import hashlib

import numba
import numpy as np
import pytest

from quantscope.errors import NonFiniteError
from quantscope.qtypes import QTYPES
from quantscope.quants import decode, encode
from quantscope.quants.k_fit import nearest
from quantscope.quants.k_pack import pack_2_bits, pack_4_bits, pack_bit, pack_scales_q3, pack_scales_q4
from quantscope.quants.simd import LANES, load, store

NAMES = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
F32 = np.float32

# sha256 of encode(pattern(), …), first 16 digits; the same bytes as ggml's.  They must hold on every machine.
DIGESTS = {
    "Q2_K": "9b071c4ad41656f8",
    "Q3_K": "87456dc1cbc21acd",
    "Q4_K": "60d8d48e5f2cee1f",
    "Q5_K": "a33198864e683a7a",
    "Q6_K": "a674f4f5cf4d829d",
}
# Σ(x − decoded)²/Σx² of normal numbers
NMSE = {"Q2_K": 1e-1, "Q3_K": 3e-2, "Q4_K": 7e-3, "Q5_K": 2e-3, "Q6_K": 5e-4}


def pattern() -> np.ndarray:
    """25 super-blocks that need no random numbers: a congruential sequence, each sub-block of 16 with its own power of two."""
    i = np.arange(25 * 256, dtype=np.int64)
    mantissa = (i * 2654435761 + 12345) % 2**24 - 2**23
    return np.ldexp(mantissa.astype(F32), (i // 16 * 7 % 23 - 34).astype(np.int32)).reshape(25, 256)


@numba.njit
def _nearest(v, out):
    store(out, 0, nearest(load(v, 0)))


def test_nearest_rounds_half_to_even() -> None:
    v = np.array([[-4194303, -2.5, -1.5, -0.5, -0.0, 0.49999997, 0.5, 1.5, 2.5, 3.5000002, 7, 15.5, 16.5, 31.499998, 100.5, 4194303]], F32)
    out = np.empty((1, LANES), np.int32)
    _nearest(v, out)
    np.testing.assert_array_equal(out, np.rint(v))


def test_nearest_beyond_its_range_is_what_the_bits_say() -> None:
    """Never the largest code: clamped, infinity becomes the smallest one and NaN becomes 0."""
    v = np.array([[np.inf, -np.inf, 3e38, np.nan] * 4], F32)
    out = np.empty((1, LANES), np.int32)
    _nearest(v, out)
    np.testing.assert_array_equal(out[:, [0, 1, 3]], [[-(2**22), -(2**22), 0]])
    assert out[0, 2] == (int(F32(3e38).view(np.int32)) & 0x7FFFFF) - 2**22


@pytest.mark.parametrize("name", NAMES)
def test_known_bytes(name: str) -> None:
    assert hashlib.sha256(encode(pattern(), QTYPES[name], 256).tobytes()).hexdigest()[:16] == DIGESTS[name]


@pytest.mark.parametrize("name", NAMES)
def test_error_of_normal_numbers(name: str) -> None:
    x = np.random.default_rng(0).standard_normal((50, 256)).astype(F32)
    decoded = decode(encode(x, QTYPES[name], 256), QTYPES[name])
    nmse = np.sum((x.reshape(-1) - decoded).astype(np.float64) ** 2) / np.sum(x.astype(np.float64) ** 2)
    assert NMSE[name] / 3 < nmse < NMSE[name]


@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_zero(name: str) -> None:
    raw = encode(np.zeros((3, 256), F32), QTYPES[name], 256)
    np.testing.assert_array_equal(decode(raw, QTYPES[name]), 0)


@pytest.mark.parametrize("name", NAMES)
def test_super_blocks_do_not_influence_each_other(name: str) -> None:
    qtype, x = QTYPES[name], pattern()
    order = np.random.default_rng(1).permutation(len(x))
    blocks = encode(x, qtype, 256).reshape(-1, qtype.type_size)
    np.testing.assert_array_equal(encode(x[order], qtype, 256).reshape(-1, qtype.type_size), blocks[order])
    np.testing.assert_array_equal(np.concatenate([encode(row, qtype, 256) for row in x]).reshape(-1, qtype.type_size), blocks)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", NAMES)
def test_non_finite_numbers_are_refused(name: str, bad: float) -> None:
    x = pattern()
    x[3, 77] = bad
    with pytest.raises(NonFiniteError, match=r"\[3\]\[77\]"):
        encode(x, QTYPES[name], 256)


def codes(top: int, n: int = 256) -> np.ndarray:
    return np.random.default_rng(top).integers(0, top + 1, n).astype(np.uint8)


def test_pack_2_bits() -> None:
    block, c = np.zeros(70, np.uint8), codes(63)
    pack_2_bits(c, 4, block, 3)
    unpacked = block[3:67].reshape(2, 1, 32) >> np.array([0, 2, 4, 6]).reshape(1, 4, 1) & 3
    np.testing.assert_array_equal(unpacked.reshape(-1), c >> 4)
    assert not block[:3].any()
    assert not block[67:].any()


@pytest.mark.parametrize("stride", [32, 64])
def test_pack_4_bits(stride: int) -> None:
    block, c = np.zeros(132, np.uint8), codes(31)
    pack_4_bits(c, block, 2, stride)
    q = block[2:130].reshape(-1, 1, stride)
    np.testing.assert_array_equal(np.concatenate([q & 15, q >> 4], axis=1).reshape(-1), c & 15)
    assert not block[130:].any()


def test_pack_bit() -> None:
    block, c = np.zeros(33, np.uint8), codes(7)
    pack_bit(c, 2, block, 1)
    np.testing.assert_array_equal((block[1:] >> np.arange(8).reshape(8, 1) & 1).reshape(-1), c >> 2)


def test_pack_scales_q3() -> None:
    block, scales = np.zeros(14, np.uint8), codes(63, 16).astype(np.int64)
    pack_scales_q3(scales, block, 1)
    low, high = block[1:9], block[9:13]
    unpacked = np.concatenate([low & 15, low >> 4]) | np.concatenate([high >> s & 3 for s in (0, 2, 4, 6)]) << 4
    np.testing.assert_array_equal(unpacked, scales)


def test_pack_scales_q4() -> None:
    block, scales, mins = np.zeros(14, np.uint8), codes(63, 16).astype(np.int64), codes(62, 16).astype(np.int64)
    pack_scales_q4(scales, mins, 8, block, 1)
    a, b, c = block[1:5], block[5:9], block[9:13]
    np.testing.assert_array_equal(np.concatenate([a & 63, c & 15 | a >> 6 << 4]), scales[8:])
    np.testing.assert_array_equal(np.concatenate([b & 63, c >> 4 | b >> 6 << 4]), mins[8:])
