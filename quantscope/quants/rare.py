"""Decoding TQ1_0, TQ2_0 (ternary), MXFP4, NVFP4 (4-bit floats), Q1_0 and Q2_0 (1 and 2 bits), and ggml's intermediate Q8_1 and Q8_K.

Each kernel states its block as ``field:bytes``.  Source: ``dequantize_row_*`` in ggml-quants.c; bit-identical.  ggml has no
decoder for Q8_1 and Q8_K in its table of types: it only multiplies with them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quantscope.quants.kernel import as_float, inline, kernel, read_half, read_u32
from quantscope.quants.simd import Lanes, f32, i32, to_f32
from quantscope.quants.simd_bytes import load_i8, load_u8, store_f32

F32 = np.float32

# twice the 16 values of a 4-bit float E2M1 (sign, 2 bits of exponent, 1 of mantissa): whole numbers
DOUBLED_E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)


# TQ1_0: 256 elements, 54 bytes: qs:48 qh:4 d:2       x = d · (trit − 1)
# A byte is the fraction 0.t₀t₁t₂t₃t₄ in base 3, times 256 and rounded up: multiplied by 3ᵏ⁺¹, trit k is the carry out of the low 8 bits.
# Elements: trits 0 … 4 of the first 32 bytes, trits 0 … 4 of the next 16, trits 0 … 3 of the last 4.
@kernel
def decode_tq1_0(blocks: Any, out: Any) -> None:
    for i in range(blocks.shape[0]):
        d = read_half(blocks, i, 52)
        power = np.int32(1)
        for k in range(5):
            for j in range(0, 32, 16):
                store_f32(out, i * 256 + 32 * k + j, _trits(load_u8(blocks, i * 54 + j), power) * f32(d))
            store_f32(out, i * 256 + 160 + 16 * k, _trits(load_u8(blocks, i * 54 + 32), power) * f32(d))
            if k < 4:
                for j in range(4):
                    trit = (((np.int32(blocks[i, 48 + j]) * power) & 255) * 3) >> 8
                    out[i, 240 + 4 * k + j] = F32(trit - 1) * d
            power = np.int32(power * 3)


@inline
def _trits(q: Lanes, power: np.int32) -> Lanes:
    return to_f32(((((q * i32(power)) & i32(255)) * i32(3)) >> i32(8)) - i32(1))


# TQ2_0: 256 elements, 66 bytes: qs:64 d:2       x = d · (q − 1); byte l of a half: elements l, 32 + l, 64 + l, 96 + l from the low bits up
@kernel
def decode_tq2_0(blocks: Any, out: Any) -> None:
    for i in range(blocks.shape[0]):
        d = f32(read_half(blocks, i, 64))
        for sub in range(16):  # sub = 8 · half + 2 · pair of bits + half of the 32 bytes
            q = load_u8(blocks, i * 66 + (sub >> 3) * 32 + (sub & 1) * 16) >> i32(sub & 6)
            store_f32(out, i * 256 + sub * 16, to_f32((q & i32(3)) - i32(1)) * d)


# MXFP4: 32 elements, 17 bytes: e:1 qs:16       x = 2^(e − 127) · E2M1, as 2^(e − 128) times the doubled value
@kernel
def decode_mxfp4(blocks: Any, out: Any) -> None:
    for i in range(blocks.shape[0]):
        e = np.uint32(blocks[i, 0])
        # exponent field e − 1; the two smallest powers are subnormal, a single bit of the mantissa
        d = as_float((e - 1) << 23) if e >= 2 else as_float(0x00200000 << e)
        for j in range(16):
            q = blocks[i, 1 + j]
            out[i, j] = DOUBLED_E2M1[q & 15] * d
            out[i, j + 16] = DOUBLED_E2M1[q >> 4] * d


# NVFP4: 64 elements, 36 bytes: d:4 qs:32       x = UE4M3 · E2M1; 16 elements share a scale and 8 bytes
@kernel
def decode_nvfp4(blocks: Any, out: Any) -> None:
    for i in range(blocks.shape[0]):
        for sub in range(4):
            d = _half_of_ue4m3(blocks[i, sub])
            for j in range(8):
                q = blocks[i, 4 + 8 * sub + j]
                out[i, 16 * sub + j] = DOUBLED_E2M1[q & 15] * d
                out[i, 16 * sub + j + 8] = DOUBLED_E2M1[q >> 4] * d


@inline
def _half_of_ue4m3(byte: int) -> np.float32:
    """Half the value of an unsigned 8-bit float, 4 bits of exponent (bias 7), 3 of mantissa; 127 (NaN) counts as 0, bit 7 is ignored.

    half the value = (8 + mantissa) · 2^(exponent − 11),  for exponent 0: mantissa · 2⁻¹⁰
    """
    exponent, mantissa = np.uint32((byte >> 3) & 15), np.uint32(byte & 7)
    if byte == 0x7F:
        return F32(0)
    if exponent == 0:
        return F32(mantissa) * F32(2.0**-10)
    return F32(8 + mantissa) * as_float((exponent + (127 - 11)) << 23)


# Q1_0: 128 elements, 18 bytes: d:2 qs:16        x = ±d, plus where bit e % 8 of byte e / 8 is set
@kernel
def decode_q1_0(blocks: Any, out: Any) -> None:
    for i in range(blocks.shape[0]):
        d = read_half(blocks, i, 0)
        for j in range(16):
            q = blocks[i, 2 + j]
            for bit in range(8):
                out[i, 8 * j + bit] = d if (q >> bit) & 1 else -d


# Q2_0: 64 elements, 18 bytes: d:2 qs:16        x = d · (q − 1); byte j: elements 4·j … 4·j + 3 from the low bits up
@kernel
def decode_q2_0(blocks: Any, out: Any) -> None:
    for i in range(blocks.shape[0]):
        d = read_half(blocks, i, 0)
        for j in range(16):
            q = np.int32(blocks[i, 2 + j])
            for k in range(4):
                out[i, 4 * j + k] = F32(((q >> (2 * k)) & 3) - 1) * d


# Q8_1: 32 elements, 36 bytes: d:2 s:2 qs:32        x = d · q; s = d · Σq is not needed here
@kernel
def decode_q8_1(blocks: Any, out: Any) -> None:
    for i in range(blocks.shape[0]):
        d = f32(read_half(blocks, i, 0))
        for j in range(0, 32, 16):
            store_f32(out, i * 32 + j, to_f32(load_i8(blocks, i * 36 + 4 + j)) * d)


# Q8_K: 256 elements, 292 bytes: d:4 (float32) qs:256 bsums:32      x = d · q; bsums, the sums of 16 q, are not needed here
@kernel
def decode_q8_k(blocks: Any, out: Any) -> None:
    for i in range(blocks.shape[0]):
        d = f32(as_float(read_u32(blocks, i, 0)))
        for j in range(0, 256, 16):
            store_f32(out, i * 256 + j, to_f32(load_i8(blocks, i * 292 + 4 + j)) * d)
