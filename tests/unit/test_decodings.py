"""Each wrong decoding against one element at a time, computed from the bits of its block, and against the right one of the gguf package."""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from quantscope.diagnose.decodings import DECODINGS, SCALES, wrongly_decoded
from quantscope.errors import BlockError, UnsupportedTypeError
from quantscope.qtypes import QTYPES
from quantscope.quants import can_encode, decode, encode

F32 = np.float32
Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

# --- one element of a block, by the bits; fault: a name of DECODINGS ---


def number(block: bytes, at: int, fault: str) -> np.float32:
    """The float16 at a byte."""
    if fault == "block-scale-bf16":
        return F32(struct.unpack("<f", b"\0\0" + block[at : at + 2])[0])
    return F32(struct.unpack_from("<e", block, at)[0])


def of_32(name: str, block: bytes, e: int, fault: str) -> np.float32:
    """Q4_0: d:2 qs:16   Q4_1: d:2 m:2 qs:16   Q5_0: d:2 qh:4 qs:16   Q5_1: d:2 m:2 qh:4 qs:16   (element e: byte e % 16, low first)"""
    with_min, five = name.endswith("1"), name.startswith("Q5")
    byte, nibble = (e // 2, e % 2) if fault == "nibble-order-q4_0" else (e % 16, e // 16)
    qh = 4 if with_min else 2
    q = block[qh + 4 * five + byte] >> (4 * nibble) & 15
    if five and fault != "q5-high-bits":
        bit = byte + 16 * nibble
        q |= (block[qh + bit // 8] >> (bit % 8) & 1) << 4
    d = number(block, 0, fault)
    if with_min:
        return d * F32(q) if fault == "block-min-ignored" else d * F32(q) + number(block, 2, fault)
    return d * F32(q if fault == "q4_0-offset" else q - (16 if five else 8))


def q8_0(block: bytes, e: int, fault: str) -> np.float32:
    return number(block, 0, fault) * F32(int.from_bytes(block[2 + e : 3 + e], signed=True))


def q4_k_or_q5_k(name: str, block: bytes, e: int, fault: str) -> np.float32:
    """d:2 dmin:2 scales:12 [qh:32] qs:128; 32 bytes of qs for 64 elements, whose low nibbles come first."""
    group, j = divmod(e, 64)
    nibble, j = (j % 2, j // 2) if fault == "nibble-order-q4_k" else divmod(j, 32)
    sub, five = 2 * group + nibble, name == "Q5_K"
    q = block[16 + 32 * five + 32 * group + j] >> (4 * nibble) & 15
    if five and fault != "q5-high-bits":
        q |= (block[16 + j] >> sub & 1) << 4
    packed = block[4:16]
    if sub < 4:
        scale, minimum = packed[sub] & 63, packed[4 + sub] & 63
    else:
        scale, minimum = packed[4 + sub] & 15, packed[4 + sub] >> 4
        if fault != "k-scale-min":
            scale, minimum = scale | packed[sub - 4] >> 6 << 4, minimum | packed[sub] >> 6 << 4
    x = number(block, 0, fault) * F32(scale) * F32(q)
    return x if fault == "block-min-ignored" else x - number(block, 2, fault) * F32(minimum)


def q6_k(block: bytes, e: int, fault: str) -> np.float32:
    """ql:128 qh:64 scales:16 d:2; each half: 32 bytes with quarters 0 and 2, 32 with 1 and 3, 32 of qh with two bits for each quarter."""
    half, j = divmod(e, 128)
    quarter, j = (j % 4, j // 4) if fault == "q6_k-order" else divmod(j, 32)
    low = block[64 * half + 32 * (quarter % 2) + j] >> (4 * (quarter // 2)) & 15
    high = block[128 + 32 * half + j] >> (2 * quarter) & 3
    scale = struct.unpack_from("b", block, 192 + 8 * half + 2 * quarter + j // 16)[0]
    return number(block, 208, fault) * F32(scale) * F32((low | high << 4) - (0 if fault == "q6_k-offset" else 32))


def q2_k(block: bytes, e: int, fault: str) -> np.float32:
    """scales:16 qs:64 d:2 dmin:2; byte j of 32: elements j, j+32, j+64, j+96 of a half; 16 elements share min and scale, 4 bits each."""
    half, quarter, j = e // 128, e // 32 % 4, e % 32
    q = block[16 + 32 * half + j] >> (2 * quarter) & 3
    x = number(block, 80, fault) * F32(block[e // 16] & 15) * F32(q)
    return x if fault == "block-min-ignored" else x - number(block, 82, fault) * F32(block[e // 16] >> 4)


def q3_k(block: bytes, e: int, fault: str) -> np.float32:
    """hmask:32 qs:64 scales:12 d:2; as Q2_K, bit 2 of element 32·k + j is bit k of hmask byte j."""
    half, quarter, j, s = e // 128, e // 32 % 4, e % 32, e // 16
    q = (block[32 + 32 * half + j] >> (2 * quarter) & 3) | (block[j] >> (e // 32) & 1) << 2
    scale = (block[96 + s % 8] >> (4 * (s // 8)) & 15) | (block[104 + s % 4] >> (2 * (s // 4)) & 3) << 4
    return number(block, 108, fault) * F32(scale - 32) * F32(q - 4)


ELEMENT: dict[str, Callable[[bytes, int, str], np.float32]] = {
    **{name: partial(of_32, name) for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1")},
    **{name: partial(q4_k_or_q5_k, name) for name in ("Q4_K", "Q5_K")},
    "Q8_0": q8_0,
    "Q6_K": q6_k,
    "Q2_K": q2_k,
    "Q3_K": q3_k,
}
ROWS = [(fault, name) for fault, decoding in DECODINGS.items() for name in sorted(decoding.types)]
BY_BITS = [(fault, name) for fault, name in ROWS if name in ELEMENT]


def small(raw: Bytes, name: str) -> Bytes:
    """The same blocks with scales (and mins) below 2 as float16 and as bfloat16, as those of weights are: none overflows."""
    blocks = raw.reshape(-1, QTYPES[name].type_size).copy()
    for at in SCALES[name]:
        blocks[:, at + 1] &= 0b1011_1111
    return blocks.reshape(-1)


def random_blocks(name: str, n: int, seed: int = 3) -> Bytes:
    return small(np.random.default_rng(seed).integers(0, 256, n * QTYPES[name].type_size, np.uint8), name)


def right(raw: Bytes, name: str) -> Floats:
    """By the gguf package where it knows the type."""
    kind = getattr(GGMLQuantizationType, name, None)
    if kind in quants._type_traits:
        return np.asarray(quants.dequantize(raw, kind), np.float32)
    return decode(raw, QTYPES[name])


def encoded(name: str, n_blocks: int = 12) -> Bytes:
    """Weights of the size that weights have, and with a mean."""
    n = QTYPES[name].block_size
    x = np.random.default_rng(5).normal(0.01, 0.03, (n_blocks, n)).astype(np.float32)
    return encode(x, QTYPES[name], n)


@pytest.mark.parametrize("name", sorted(ELEMENT))
def test_the_elements_by_the_bits_are_right_where_there_is_no_fault(name: str) -> None:
    raw = random_blocks(name, 2)
    np.testing.assert_array_equal(by_bits(raw, name, "none"), right(raw, name))


def by_bits(raw: Bytes, name: str, fault: str) -> Floats:
    n, size = QTYPES[name].block_size, QTYPES[name].type_size
    blocks = [raw[i : i + size].tobytes() for i in range(0, raw.size, size)]
    with np.errstate(invalid="ignore"):
        return np.array([ELEMENT[name](block, e, fault) for block in blocks for e in range(n)], np.float32)


@pytest.mark.parametrize(("fault", "name"), BY_BITS, ids=["-".join(row) for row in BY_BITS])
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_by_the_bits(fault: str, name: str, data: st.DataObject) -> None:
    """Also where a scale is not a number or infinite."""
    size = 2 * QTYPES[name].type_size
    raw = np.frombuffer(data.draw(st.binary(min_size=size, max_size=size)), np.uint8)
    raw = small(raw, name) if fault == "block-scale-bf16" else raw
    before = raw.copy()
    wrong = DECODINGS[fault].wrong(raw, QTYPES[name])
    assert wrong.dtype == np.float32
    np.testing.assert_array_equal(wrong, by_bits(raw, name, fault))
    np.testing.assert_array_equal(raw, before)


@pytest.mark.parametrize("name", sorted(SCALES))
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_bf16_scales_are_those_of_the_same_number_as_float16(name: str, data: st.DataObject) -> None:
    """Bits whose value as bfloat16 has a float16 of its own: the right decoder, given that float16, makes the same of the block."""
    read = random_blocks(name, 1, data.draw(st.integers(0, 99)))
    meant = read.copy()
    for at in SCALES[name]:
        bits = data.draw(st.integers(0x3880, 0x477F)) | data.draw(st.sampled_from([0, 0x8000]))  # ±2⁻¹⁴ to ±65280
        read[at : at + 2] = np.frombuffer(struct.pack("<H", bits), np.uint8)
        value = struct.unpack("<f", struct.pack("<I", bits << 16))[0]
        meant[at : at + 2] = np.frombuffer(struct.pack("<e", value), np.uint8)
    np.testing.assert_array_equal(DECODINGS["block-scale-bf16"].wrong(read, QTYPES[name]), right(meant, name))


def test_every_type_with_one_float16_scale_a_block_is_there() -> None:
    without = {"F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64", "Q8_K", "MXFP4", "NVFP4", "IQ1_M"}  # IQ1_M: spread over four words
    assert set(SCALES) == set(QTYPES) - without


@pytest.mark.parametrize(("fault", "name"), ROWS, ids=["-".join(row) for row in ROWS])
def test_every_fault_changes_the_values(fault: str, name: str) -> None:
    """By more than quantization itself does: at least a thousandth of Σ x²."""
    raw = encoded(name) if can_encode(QTYPES[name]) else random_blocks(name, 12)
    x, y = right(raw, name), DECODINGS[fault].wrong(raw, QTYPES[name])
    assert np.isfinite(y).all()
    assert np.square(y - x, dtype=np.float64).sum() > 1e-3 * np.square(x, dtype=np.float64).sum()


# --- how the wrong values differ from the right ones ---


def pair(fault: str, name: str) -> tuple[Floats, Floats]:
    """(right, wrong) values of weights, [n_blocks, block_size]."""
    raw, n = encoded(name), QTYPES[name].block_size
    return right(raw, name).reshape(-1, n), DECODINGS[fault].wrong(raw, QTYPES[name]).reshape(-1, n)


@pytest.mark.parametrize(
    ("fault", "name", "first"),
    [
        ("nibble-order-q4_0", "Q4_0", [0, 16, 1, 17, 2]),
        ("nibble-order-q4_0", "Q4_1", [0, 16, 1, 17, 2]),
        ("nibble-order-q4_0", "Q5_0", [0, 16, 1, 17, 2]),
        ("nibble-order-q4_0", "Q5_1", [0, 16, 1, 17, 2]),
        ("nibble-order-q4_k", "Q4_K", [0, 32, 1, 33, 2]),
        ("nibble-order-q4_k", "Q5_K", [0, 32, 1, 33, 2]),
        ("q6_k-order", "Q6_K", [0, 32, 64, 96, 1]),
    ],
)
def test_a_wrong_order_keeps_the_values(fault: str, name: str, first: list[int]) -> None:
    x, y = pair(fault, name)
    np.testing.assert_array_equal(y[:, :5], x[:, first])
    np.testing.assert_array_equal(np.sort(y), np.sort(x))


@pytest.mark.parametrize(("fault", "name", "steps"), [("q4_0-offset", "Q4_0", 8), ("q4_0-offset", "Q5_0", 16)])
def test_a_missing_offset_adds_the_same_to_a_whole_block(fault: str, name: str, steps: int) -> None:
    x, y = pair(fault, name)
    d = encoded(name).reshape(len(x), -1)[:, :2].copy().view("<f2").astype(np.float32)
    np.testing.assert_allclose(y - x, np.broadcast_to(steps * d, x.shape), rtol=1e-6)


def test_a_missing_offset_of_q6_k_adds_the_same_to_sixteen_elements() -> None:
    x, y = pair("q6_k-offset", "Q6_K")
    added = (y - x).reshape(-1, 16)
    np.testing.assert_allclose(added, np.broadcast_to(added[:, :1], added.shape), rtol=1e-5)
    assert len(np.unique(added[:, 0])) > 20


@pytest.mark.parametrize(("name", "share"), [("Q4_1", 32), ("Q5_1", 32), ("Q2_K", 16), ("Q4_K", 32), ("Q5_K", 32)])
def test_an_ignored_min_is_missing_from_all_that_share_it(name: str, share: int) -> None:
    x, y = pair("block-min-ignored", name)
    added = (y - x).reshape(-1, share)
    assert (added > 0).mean() > 0.8  # the mins of these weights are below zero
    np.testing.assert_allclose(added, np.broadcast_to(added[:, :1], added.shape), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["Q4_K", "Q5_K"])
def test_wrong_scales_leave_the_first_half_alone(name: str) -> None:
    x, y = pair("k-scale-min", name)
    np.testing.assert_array_equal(y[:, :128], x[:, :128])
    assert (y[:, 128:] != x[:, 128:]).mean() > 0.9


@pytest.mark.parametrize("name", ["Q5_0", "Q5_1", "Q5_K"])
def test_without_the_fifth_bit_a_value_stays_or_is_sixteen_steps_away(name: str) -> None:
    x, y = pair("q5-high-bits", name)
    blocks = (y - x).reshape(-1, 32)
    step = np.abs(blocks).max(axis=1, keepdims=True)
    assert ((np.abs(blocks) < 1e-6) | (np.abs(np.abs(blocks) - step) < 1e-6)).all()
    assert 0.2 < (np.abs(blocks) > 1e-6).mean() < 0.8


# --- the helper, and what it refuses ---


def test_the_helper_gives_a_tensor_and_refuses_types_without_the_fault() -> None:
    raw, q6_k_type = encoded("Q6_K", 2), QTYPES["Q6_K"]
    order = DECODINGS["q6_k-order"]
    assert torch.equal(wrongly_decoded(raw, q6_k_type, order), torch.from_numpy(order.wrong(raw, q6_k_type)))
    with pytest.raises(UnsupportedTypeError, match="Q4_0 cannot have the fault q6_k-order: expected one of Q6_K"):
        wrongly_decoded(encoded("Q4_0"), QTYPES["Q4_0"], order)
    with pytest.raises(BlockError, match="multiple of 210 bytes"):
        wrongly_decoded(raw[:-1], q6_k_type, order)


@pytest.mark.parametrize(("fault", "name"), ROWS, ids=["-".join(row) for row in ROWS])
def test_bytes_of_a_file_are_read_only(fault: str, name: str) -> None:
    raw = random_blocks(name, 2)
    raw.flags.writeable = False
    assert wrongly_decoded(raw, QTYPES[name], DECODINGS[fault]).shape == (2 * QTYPES[name].block_size,)


def test_names() -> None:
    assert all(decoding.name == name for name, decoding in DECODINGS.items())
    assert all(types <= set(QTYPES) for types in (decoding.types for decoding in DECODINGS.values()))
