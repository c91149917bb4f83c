"""The registry, its errors and threads; the kernels on blocks worked out by hand.  tests/oracle compares them with ggml."""

from __future__ import annotations

import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantscope import quants
from quantscope.errors import BlockError, NonFiniteError, ShapeError, UnsupportedTypeError
from quantscope.qtypes import QTYPES
from quantscope.quants import CODECS, _kernel, can_decode, can_encode, decode, encode, set_threads, thread_count
from quantscope.quants.kernel import float_to_half, half_to_float
from quantscope.quants.threads import MIN_SHARE_BYTES, share_out

NUMBERS = {"I8", "I16", "I32", "I64", "F64"}  # no weights are stored in these
ENCODED = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]


def half(*values: float) -> bytes:
    return np.array(values, "<f2").tobytes()


def test_every_weight_type_has_a_codec() -> None:
    assert set(CODECS) == set(QTYPES) - NUMBERS
    for codec in CODECS.values():
        assert callable(_kernel(codec.decoder))
        assert codec.encoder is None or callable(_kernel(codec.encoder))
    assert {name for name in QTYPES if can_encode(QTYPES[name])} == set(ENCODED)
    assert not can_decode(QTYPES["I32"])
    assert not can_encode(QTYPES["I32"])


def test_naming_the_codecs_loads_no_compiler() -> None:
    code = "import sys, quantscope.quants; assert not {'numba', 'gguf', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- blocks by hand ------------------------------------------------------------------------------------------------------------------

NIBBLES = bytes(range(16))  # low nibble j, high nibble 0
SWAPPED = bytes(j << 4 for j in range(16))

BLOCKS = [
    ("F32", np.array([1.5, -0.0], "<f4").tobytes(), [1.5, -0.0]),
    ("F16", half(1.5, -2.0, 6e-8), [1.5, -2.0, 2.0**-24]),
    ("BF16", bytes([0x80, 0x3F, 0x80, 0xFF]), [1.0, -np.inf]),
    ("Q4_0", half(0.5) + NIBBLES, [0.5 * (j - 8) for j in range(16)] + [-4.0] * 16),
    ("Q4_0", half(-1) + SWAPPED, [8.0] * 16 + [8.0 - j for j in range(16)]),
    ("Q4_1", half(2, -3) + SWAPPED, [-3.0] * 16 + [2.0 * j - 3 for j in range(16)]),
    ("Q5_0", half(1) + bytes([1, 0, 0, 0x80]) + NIBBLES, [0.0, *(j - 16.0 for j in range(1, 16)), *[-16.0] * 15, 0.0]),
    ("Q5_1", half(1, 100) + bytes([2, 0, 1, 0]) + SWAPPED, [100.0, 116.0] + [100.0] * 14 + [116.0] + [100.0 + j for j in range(1, 16)]),
    ("Q8_0", half(0.25) + bytes(range(240, 256)) + bytes(range(16)), [0.25 * q for q in range(-16, 16)]),
    ("Q8_1", half(0.25, 99) + bytes(range(240, 256)) + bytes(range(16)), [0.25 * q for q in range(-16, 16)]),
    ("IQ4_NL", half(1) + b"\x0f" + b"\xf0" * 15, [113.0] + [-127.0] * 15 + [-127.0] + [113.0] * 15),
    ("MXFP4", bytes([128]) + b"\x72" * 16, [2.0] * 16 + [12.0] * 16),
    ("MXFP4", bytes([0]) + b"\x0f" * 16, [-6 * 2.0**-127] * 16 + [0.0] * 16),
    ("NVFP4", bytes([0x38, 0x01, 0x7F, 0x40]) + b"\x2a" * 32, [sign * s for s in (1.0, 2.0**-9, 0.0, 2.0) for sign in [-1] * 8 + [1] * 8]),
]


@pytest.mark.parametrize(("name", "block", "expected"), BLOCKS, ids=[f"{name}-{k}" for k, (name, _, _) in enumerate(BLOCKS)])
def test_block_by_hand(name: str, block: bytes, expected: list[float]) -> None:
    np.testing.assert_array_equal(decode(np.frombuffer(block, np.uint8), QTYPES[name]), np.array(expected, np.float32))


def test_q4_k_by_hand() -> None:
    # scales 0 … 7 = 1 2 3 33 4 5 6 63, mins = 0 … 0 62: sub-block 7 has the high bits of both in bytes 3 and 7
    scales = bytes([1, 2, 3, 33 | 3 << 6, 0, 0, 0, 0 | 3 << 6, 4, 5, 6, 15 | 14 << 4])
    block = half(0.5, 2) + scales + b"\x21" * 128
    x = decode(np.frombuffer(block, np.uint8), QTYPES["Q4_K"]).reshape(8, 32)
    assert (x == x[:, :1]).all()
    assert x[:, 0].tolist() == [0.5, 2.0, 1.5, 33.0, 2.0, 5.0, 3.0, 63.0 - 124.0]


def test_q6_k_by_hand() -> None:
    # quarters 0 and 2 of each half share a byte of ql; 2 high bits each in qh: 3, 2, 1, 0
    block = b"\x21" * 32 + b"\x43" * 32 + b"\x21" * 32 + b"\x43" * 32 + b"\x1b" * 64 + bytes([1] * 8 + [255] * 8) + half(1)
    x = decode(np.frombuffer(block, np.uint8), QTYPES["Q6_K"]).reshape(2, 4, 32)
    assert (x == x[:, :, :1]).all()
    quarters = [1 + 48 - 32, 3 + 32 - 32, 2 + 16 - 32, 4 + 0 - 32]
    assert x[:, :, 0].tolist() == [quarters, [-q for q in quarters]]


def test_halves() -> None:
    for bits, value in [(0x3C00, 1.0), (0x0001, 2.0**-24), (0x8400, -(2.0**-14)), (0x7BFF, 65504.0), (0xFC00, -np.inf)]:
        assert half_to_float(np.uint32(bits)) == value
        assert float_to_half(np.float32(value)) == bits
    assert np.isnan(half_to_float(np.uint32(0x7C01)))
    assert float_to_half(np.float32(np.nan)) & 0x7FFF == 0x7E00
    assert float_to_half(np.float32(65519.99)) == 0x7BFF
    assert float_to_half(np.float32(65520.0)) == 0x7C00
    assert float_to_half(np.float32(1 + 2.0**-11)) == 0x3C00  # ties to even
    assert float_to_half(np.float32(1 + 3 * 2.0**-11)) == 0x3C02
    assert float_to_half(np.float32(2.0**-25)) == 0
    assert float_to_half(np.float32(1.0001 * 2.0**-25)) == 1


# --- there and back -------------------------------------------------------------------------------------------------------------------

normal_scale = st.floats(2.0**-14, 64, width=16).flatmap(lambda d: st.sampled_from([d, -d]))


@settings(max_examples=100, deadline=None)
@given(normal_scale, st.lists(st.integers(0, 15), min_size=31, max_size=31), st.integers(0, 31))
def test_q4_0_blocks_of_full_range_come_back(d: float, q: list[int], at: int) -> None:
    q.insert(at, 0)  # −8·d, from which the encoder finds d again
    raw = np.frombuffer(half(d) + bytes(q[j] | q[j + 16] << 4 for j in range(16)), np.uint8)
    np.testing.assert_array_equal(encode(decode(raw, QTYPES["Q4_0"]), QTYPES["Q4_0"], 32), raw)


@settings(max_examples=100, deadline=None)
@given(st.floats(2.0**-14, 64, width=16), st.lists(st.integers(-127, 127), min_size=31, max_size=31), st.sampled_from([-127, 127]))
def test_q8_0_blocks_of_full_range_come_back(d: float, q: list[int], top: int) -> None:
    raw = np.frombuffer(half(d) + np.array([*q, top], np.int8).tobytes(), np.uint8)
    np.testing.assert_array_equal(encode(decode(raw, QTYPES["Q8_0"]), QTYPES["Q8_0"], 32), raw)


# greatest error of an element, in units of the greatest magnitude (one-sided formats) or of the range (the others)
BOUNDS = {"F32": 0, "F16": 2**-11, "BF16": 2**-8, "Q4_0": 1 / 8, "Q4_1": 0.5 / 15, "Q5_0": 1 / 16, "Q5_1": 0.5 / 31, "Q8_0": 0.5 / 127}


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(list(BOUNDS)), st.lists(st.floats(-1e4, 1e4, width=32), min_size=64, max_size=64))
def test_error_is_bounded(name: str, values: list[float]) -> None:
    x = np.array(values, np.float32).reshape(2, 32)
    error = np.abs(decode(encode(x, QTYPES[name], 32), QTYPES[name]).reshape(2, 32) - x).max(axis=1)
    span = x.max(axis=1) - x.min(axis=1) if name.endswith("_1") else np.abs(x).max(axis=1)
    assert (error <= span * BOUNDS[name] * 1.001 + np.abs(x).max(axis=1) * 2.0**-9 + 2.0**-19).all()  # and the float16 scale's own error


# --- errors and threads ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw",
    [np.zeros(17, np.uint8), np.zeros(36, np.int8), np.zeros((2, 18), np.uint8), np.zeros(72, np.uint8)[::2]],
    ids=["partial block", "signed", "two axes", "strided"],
)
def test_decode_refuses_what_is_no_block(raw: np.ndarray) -> None:
    with pytest.raises(BlockError, match="multiple of 18"):
        decode(raw, QTYPES["Q4_0"])


def test_decode_into_out() -> None:
    raw = np.frombuffer(half(1) + NIBBLES, np.uint8)
    out = np.empty(32, np.float32)
    assert decode(raw, QTYPES["Q4_0"], out) is out
    for wrong in (np.empty(31, np.float32), np.empty(32), np.empty((1, 32), np.float32), np.empty(64, np.float32)[::2]):
        with pytest.raises(ShapeError, match=r"float32\[32\]"):
            decode(raw, QTYPES["Q4_0"], wrong)


def test_nothing_in_nothing_out() -> None:
    for name in CODECS:
        assert decode(np.empty(0, np.uint8), QTYPES[name]).shape == (0,)
    for name in ENCODED:
        assert encode(np.empty((0, 256), np.float32), QTYPES[name], 256).shape == (0,)


def test_types_without_a_kernel() -> None:
    with pytest.raises(UnsupportedTypeError, match="cannot decode I32"):
        decode(np.zeros(4, np.uint8), QTYPES["I32"])
    with pytest.raises(UnsupportedTypeError, match="cannot encode IQ4_XS"):
        encode(np.zeros(256, np.float32), QTYPES["IQ4_XS"], 256)


def test_rows_that_no_block_fits() -> None:
    with pytest.raises(BlockError, match="multiple of 256"):
        encode(np.zeros((2, 288), np.float32), QTYPES["Q4_K"], 288)
    with pytest.raises(ShapeError, match=r"float32\[..., 64\]"):
        encode(np.zeros((2, 32), np.float32), QTYPES["Q4_0"], 64)
    with pytest.raises(ShapeError, match="float64"):
        encode(np.zeros((2, 32)), QTYPES["Q4_0"], 32)


@pytest.mark.parametrize("name", ENCODED)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite_is_refused_with_its_index(name: str, value: float) -> None:
    x = np.zeros((2, 1500, 256), np.float32)  # several shares
    x[1, 700, 3] = x[1, 1400, 255] = value
    with pytest.raises(NonFiniteError, match=r"element \[1\]\[700\]\[3\] .* 2 of 768000 "):
        encode(x, QTYPES[name], 256)


def test_strided_input_is_copied() -> None:
    x = np.arange(4 * 64, dtype=np.float32).reshape(4, 64)
    np.testing.assert_array_equal(encode(x[:, ::2], QTYPES["Q8_0"], 32), encode(np.ascontiguousarray(x[:, ::2]), QTYPES["Q8_0"], 32))


def test_shares_cover_every_block_once() -> None:
    before = thread_count()
    try:
        for threads in (1, 3, 4):
            set_threads(threads)
            for n_blocks in (0, 1, 2, 7, 1000):
                source, target = np.zeros((n_blocks, MIN_SHARE_BYTES // 4), np.uint8), np.zeros((n_blocks, 1), np.int64)
                seen: set[int] = set()

                def count(_: np.ndarray, part: np.ndarray, seen: set[int] = seen) -> None:
                    part += 1
                    seen.add(threading.get_ident())

                share_out(count, source, target)
                assert (target == 1).all()
                assert len(seen) <= threads
    finally:
        set_threads(before)
    with pytest.raises(ValueError, match="at least 1"):
        set_threads(0)


def test_several_callers_at_once() -> None:
    raw = np.random.default_rng(0).integers(0, 256, 18 * 100_000, dtype=np.uint8)
    expected = decode(raw, QTYPES["Q4_0"]).view(np.uint32)
    results: list[bool] = []
    callers = [
        threading.Thread(target=lambda: results.append(bool((quants.decode(raw, QTYPES["Q4_0"]).view(np.uint32) == expected).all())))
        for _ in range(4)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert results == [True] * 4
