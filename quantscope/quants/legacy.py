"""F32, F16, BF16 and the formats with one float16 scale per 32 elements: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0.

Each kernel states its block as ``field:bytes``.  In the 4- and 5-bit formats byte j holds element j in its low and element j + 16 in
its high nibble.  Source: ``dequantize_row_*`` and ``quantize_row_*_ref`` in ggml-quants.c; bit-identical in both directions.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quantscope.quants.kernel import as_float, float_to_half, half_to_float, inline, kernel, read_half, read_u32, write_half, write_u32
from quantscope.quants.simd import Lanes, bits_of, f32, i32, to_f32, where
from quantscope.quants.simd_bytes import (
    collect_bits,
    largest,
    load_f32,
    load_i8,
    load_u8,
    round_half_away,
    smallest,
    spread_bits,
    store_f32,
    store_u8,
    to_i32,
)

F32 = np.float32
INFINITY = np.float32(np.inf)
TINY = np.float32(2.0**-128)  # 1/d overflows up to here


def decode_f32(blocks: Any, out: Any) -> None:
    np.copyto(out, blocks.view(np.float32))


def encode_f32(x: Any, out: Any) -> None:
    np.copyto(out, x.view(np.uint8))


def decode_f16(blocks: Any, out: Any) -> None:
    _halves_to_floats(blocks.reshape(-1).view(np.uint16), out.reshape(-1))


def encode_f16(x: Any, out: Any) -> None:
    _floats_to_halves(x.reshape(-1), out.reshape(-1).view(np.uint16))


def decode_bf16(blocks: Any, out: Any) -> None:
    _bfloats_to_floats(blocks.reshape(-1).view(np.uint16), out.reshape(-1).view(np.uint32))


def encode_bf16(x: Any, out: Any) -> None:
    _floats_to_bfloats(x.reshape(-1).view(np.uint32), out.reshape(-1).view(np.uint16))


@kernel
def _halves_to_floats(halves: Any, out: Any) -> None:
    for i in range(halves.size):
        out[i] = half_to_float(np.uint32(halves[i]))


@kernel
def _floats_to_halves(x: Any, out: Any) -> None:
    for i in range(x.size):
        out[i] = np.uint16(float_to_half(x[i]))


@kernel
def _bfloats_to_floats(bfloats: Any, out: Any) -> None:
    # bfloat16 is the upper half of a float32: s eeeeeeee mmmmmmm | 16 zero bits
    for i in range(bfloats.size):
        out[i] = np.uint32(np.uint32(bfloats[i]) << np.uint32(16))


@kernel
def _floats_to_bfloats(x: Any, out: Any) -> None:
    for i in range(x.size):
        bits = np.uint32(x[i])
        # half of what falls off, and the last kept bit so that ties go to even
        out[i] = np.uint16(np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


# Q4_0: 32 elements, 18 bytes: d:2 qs:16        x = d · (q − 8)
@kernel
def decode_q4_0(blocks: Any, out: Any) -> None:
    for i in range(blocks.shape[0]):
        d = f32(read_half(blocks, i, 0))
        q = load_u8(blocks, i * 18 + 2)
        store_f32(out, i * 32, to_f32((q & i32(15)) - i32(8)) * d)
        store_f32(out, i * 32 + 16, to_f32((q >> i32(4)) - i32(8)) * d)


# Q4_1: 32 elements, 20 bytes: d:2 m:2 qs:16    x = d · q + m
@kernel
def decode_q4_1(blocks: Any, out: Any) -> None:
    for i in range(blocks.shape[0]):
        d, m = f32(read_half(blocks, i, 0)), f32(read_half(blocks, i, 2))
        q = load_u8(blocks, i * 20 + 4)
        store_f32(out, i * 32, to_f32(q & i32(15)) * d + m)
        store_f32(out, i * 32 + 16, to_f32(q >> i32(4)) * d + m)


# Q5_0: 32 elements, 22 bytes: d:2 qh:4 qs:16   x = d · (q − 16), bit 4 of element j is bit j of qh
@kernel
def decode_q5_0(blocks: Any, out: Any) -> None:
    for i in range(blocks.shape[0]):
        d, high = f32(read_half(blocks, i, 0)), read_u32(blocks, i, 2)
        q = load_u8(blocks, i * 22 + 6)
        store_f32(out, i * 32, to_f32(((q & i32(15)) | _bit_4(high)) - i32(16)) * d)
        store_f32(out, i * 32 + 16, to_f32(((q >> i32(4)) | _bit_4(high >> 16)) - i32(16)) * d)


# Q5_1: 32 elements, 24 bytes: d:2 m:2 qh:4 qs:16   x = d · q + m
@kernel
def decode_q5_1(blocks: Any, out: Any) -> None:
    for i in range(blocks.shape[0]):
        d, m, high = f32(read_half(blocks, i, 0)), f32(read_half(blocks, i, 2)), read_u32(blocks, i, 4)
        q = load_u8(blocks, i * 24 + 8)
        store_f32(out, i * 32, to_f32((q & i32(15)) | _bit_4(high)) * d + m)
        store_f32(out, i * 32 + 16, to_f32((q >> i32(4)) | _bit_4(high >> 16)) * d + m)


# Q8_0: 32 elements, 34 bytes: d:2 qs:32        x = d · q, q signed
@kernel
def decode_q8_0(blocks: Any, out: Any) -> None:
    for i in range(blocks.shape[0]):
        d = f32(read_half(blocks, i, 0))
        store_f32(out, i * 32, to_f32(load_i8(blocks, i * 34 + 2)) * d)
        store_f32(out, i * 32 + 16, to_f32(load_i8(blocks, i * 34 + 18)) * d)


@kernel
def encode_q4_0(x: Any, out: Any) -> None:
    """d = peak / −8, q = ⌊x/d + 8.5⌋ ≤ 15, peak = the signed element of greatest magnitude."""
    for i in range(x.shape[0]):
        d = F32(_peak(x, i) / F32(-8))
        write_half(out, i, 0, d)
        low, high = _steps(x, i, d, F32(0), F32(8.5), 15)
        store_u8(out, i * 18 + 2, low | (high << i32(4)))


@kernel
def encode_q4_1(x: Any, out: Any) -> None:
    """d = (max − min) / 15, m = min, q = ⌊(x − m)/d + 0.5⌋ ≤ 15."""
    for i in range(x.shape[0]):
        minimum, maximum = _range(x, i)
        d = F32(F32(maximum - minimum) / F32(15))
        write_half(out, i, 0, d)
        write_half(out, i, 2, minimum)
        low, high = _steps(x, i, d, minimum, F32(0.5), 15)
        store_u8(out, i * 20 + 4, low | (high << i32(4)))


@kernel
def encode_q5_0(x: Any, out: Any) -> None:
    """d = peak / −16, q = ⌊x/d + 16.5⌋ ≤ 31."""
    for i in range(x.shape[0]):
        d = F32(_peak(x, i) / F32(-16))
        write_half(out, i, 0, d)
        low, high = _steps(x, i, d, F32(0), F32(16.5), 31)
        write_u32(out, i, 2, _bits_4(low) | (_bits_4(high) << 16))
        store_u8(out, i * 22 + 6, (low & i32(15)) | (high << i32(4)))


@kernel
def encode_q5_1(x: Any, out: Any) -> None:
    """d = (max − min) / 31, m = min, q = ⌊(x − m)/d + 0.5⌋."""
    for i in range(x.shape[0]):
        minimum, maximum = _range(x, i)
        d = F32(F32(maximum - minimum) / F32(31))
        write_half(out, i, 0, d)
        write_half(out, i, 2, minimum)
        low, high = _steps(x, i, d, minimum, F32(0.5), 31)
        write_u32(out, i, 4, _bits_4(low) | (_bits_4(high) << 16))
        store_u8(out, i * 24 + 8, (low & i32(15)) | (high << i32(4)))


@kernel
def encode_q8_0(x: Any, out: Any) -> None:
    """d = max|x| / 127, q = x/d rounded, halves away from zero."""
    for i in range(x.shape[0]):
        a, b = load_f32(x, i * 32), load_f32(x, i * 32 + 16)
        d = F32(as_float(_greatest_magnitude(bits_of(a), bits_of(b))) / F32(127))
        write_half(out, i, 0, d)
        inverse = f32(F32(1) / d) if d > TINY else f32(0)
        store_u8(out, i * 34 + 2, to_i32(round_half_away(a * inverse)))
        store_u8(out, i * 34 + 18, to_i32(round_half_away(b * inverse)))


@inline
def _steps(x: Any, i: int, d: np.float32, minimum: np.float32, bias: np.float32, top: int) -> Any:
    """The two halves of block i in whole steps, min(⌊(x − minimum) / d + bias⌋, top); a zero d counts as 1/d = 0.

    Where 1/d or the range overflows, C's conversion of infinity or NaN to an integer is undefined: on x86 it leaves 0 in the low byte,
    and 0 is what ggml stores in the whole block.
    """
    inverse = F32(1) / d if d != F32(0) else F32(0)
    if not (TINY < abs(d) < INFINITY) and d != F32(0):
        inverse, minimum, bias = F32(0), F32(0), F32(0)
    low = to_i32((load_f32(x, i * 32) - f32(minimum)) * f32(inverse) + f32(bias))
    high = to_i32((load_f32(x, i * 32 + 16) - f32(minimum)) * f32(inverse) + f32(bias))
    return where(low < i32(top), low, i32(top)), where(high < i32(top), high, i32(top))


@inline
def _greatest_magnitude(a: Lanes, b: Lanes) -> np.int32:
    """The bits of max|x| over the bits of 32 floats: without the sign, floats are ordered like their bits."""
    a, b = a & i32(0x7FFFFFFF), b & i32(0x7FFFFFFF)
    return largest(where(a > b, a, b))


@inline
def _peak(x: Any, i: int) -> np.float32:
    """The first element of greatest magnitude in block i, with its sign; +0 for a block of zeros."""
    a, b = bits_of(load_f32(x, i * 32)), bits_of(load_f32(x, i * 32 + 16))
    magnitude = _greatest_magnitude(a, b)
    if magnitude == 0:
        return F32(0)
    positive, negative = _places(a, b, magnitude), _places(a, b, np.int32(magnitude - 2**31))
    return as_float(magnitude) if positive & _first(positive | negative) else -as_float(magnitude)


@inline
def _range(x: Any, i: int) -> tuple[np.float32, np.float32]:
    """(min, max) of block i; a min of zero has the sign of the first zero, as a chain of comparisons would find."""
    a, b = bits_of(load_f32(x, i * 32)), bits_of(load_f32(x, i * 32 + 16))
    c, d = _ordered(a), _ordered(b)
    minimum, maximum = smallest(where(c < d, c, d)), largest(where(c > d, c, d))
    if minimum == -1:  # −0
        positive, negative = _places(a, b, np.int32(0)), _places(a, b, np.int32(-(2**31)))
        if positive & _first(positive | negative):
            minimum = np.int32(0)
    return _float_of(minimum), _float_of(maximum)


@inline
def _places(a: Lanes, b: Lanes, bits: np.int32) -> np.uint32:
    """Bit j: element j of the 32 in a and b has exactly these bits."""
    return np.uint32(collect_bits(a == i32(bits)) | (collect_bits(b == i32(bits)) << 16))


@inline
def _first(places: np.uint32) -> np.uint32:
    """The lowest bit that is set."""
    return np.uint32(places & (~places + 1))


@inline
def _ordered(bits: Lanes) -> Lanes:
    """Bits of floats → integers in the order of the floats: … −1.0 < −0 → −1, +0 → 0 < 1.0 …"""
    return where(bits < i32(0), i32(-1) - (bits & i32(0x7FFFFFFF)), bits)


@inline
def _float_of(ordered: np.int32) -> np.float32:
    """The float that ``_ordered`` made this integer of."""
    return as_float(ordered) if ordered >= 0 else -as_float(-1 - ordered)


@inline
def _bit_4(word: np.uint32) -> Lanes:
    """Bit j of ``word`` moved to bit 4 of lane j."""
    return spread_bits(np.uint32(word)) << i32(4)


@inline
def _bits_4(steps: Lanes) -> np.uint32:
    """Bit 4 of lane j (0 … 31) moved to bit j."""
    return collect_bits(steps > i32(15))
