"""Encoding Q2_K, Q3_K, Q4_K, Q5_K and Q6_K: float32 → the bytes that ggml makes without an importance matrix.

A super-block has 256 elements in sub-blocks of 16 (Q2_K, Q3_K, Q6_K) or 32 (Q4_K, Q5_K).  Encoding it is four steps:

    1. fit       a scale s (and offset m) for every sub-block                     k_fit.py, sixteen sub-blocks at a time
    2. scales    s → 4- to 8-bit codes in units of a float16 d, likewise −m in units of dmin
    3. codes     once more for all elements, now with the rounded scale: l = round((x + dmin·min_code)/(d·scale_code))
    4. pack      the bits                                                         k_pack.py

Sixteen sub-blocks are one super-block or two; lane k holds sub-block k of this group.  Where a rounded scale is 0 the codes of step 1
stay, as in ggml.  Source: ``quantize_row_q{2,3,4,5,6}_K_ref`` in ggml-quants.c.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantscope.quants.k_fit import TINY, clamped, fit_affine, fit_by_coordinate, fit_symmetric, nearest
from quantscope.quants.k_pack import (
    pack_2_bits,
    pack_4_bits,
    pack_bit,
    pack_scales_q3,
    pack_scales_q4,
)
from quantscope.quants.kernel import float_to_half, half_to_float, inline, kernel, write_u16
from quantscope.quants.simd import LANES, Lanes, absolute, f32, load, negative, square_root, store, to_f32, where

SUPER_BLOCK = 256  # [elements]


def trial_steps(start: float, width: float, count: int, top: int) -> NDArray[np.float32]:
    """(start + width·i) + top for i = 0 … count − 1, rounded to float32 after every operation."""
    return np.float32(start) + np.float32(width) * np.arange(count, dtype=np.float32) + np.float32(top)


_Q2_STEPS = trial_steps(-0.5, 0.1, 16, 3)
_Q4_STEPS = trial_steps(-1.0, 0.1, 21, 15)
_Q5_STEPS = trial_steps(-0.5, 0.1, 16, 31)
_Q6_STEPS = np.float32(32) + np.float32(0.1) * np.delete(np.arange(-9, 10), 9).astype(np.float32)  # −9 … 9 without 0


# --- steps that the types share -------------------------------------------------------------------------------------------------------


@inline
def gather(x: Any, first: int, values: Any) -> None:
    """values[i, k] = element i of sub-block k, counted from block ``first``; past the last block it is repeated.

    x: float32[n_blocks, block size]; values: float32[sub-block size, 16].
    """
    size, block, last = values.shape[0], x.shape[1], x.shape[0] - 1
    for k in range(LANES):
        row = x[min(first + k * size // block, last)]
        start = k * size % block
        for i in range(size):
            values[i, k] = row[start + i]


@inline
def in_element_order(codes: Any, part: int, flat: Any) -> None:
    """flat[e] = code of element e of super-block ``part`` (0 or 1) of the group; codes: float32[size, 16], flat: uint8[256]."""
    size = codes.shape[0]
    sub_blocks = SUPER_BLOCK // size
    for k in range(sub_blocks):
        for i in range(size):
            flat[k * size + i] = np.uint8(codes[i, part * sub_blocks + k])


@inline
def nearest_int(v: np.float32) -> np.int64:
    """``nearest`` for one float32."""
    return (np.int64(np.float32(v + np.float32(12582912.0)).view(np.int32)) & 0x7FFFFF) - 0x400000


@inline
def _code_scales(scales: Any, first: int, count: int, top: int, codes: Any) -> np.uint32:
    """codes = round(top/max·scale) mod 256 for the ``count`` scales from ``first``; returns the float16 bits of d = max/top.

    A maximum that is not above 0 gives zeros.  scales: float32[16], codes: int64[16].
    """
    largest = np.float32(0)
    for k in range(first, first + count):
        if scales[k] > largest:
            largest = scales[k]
    inverse = np.float32(top) / largest if largest > 0 else np.float32(0)
    for k in range(first, first + count):
        codes[k] = nearest_int(inverse * scales[k]) & 0xFF
    return float_to_half(largest / np.float32(top))


@inline
def greatest_scale(scales: Any) -> np.float32:
    """The first scale of greatest magnitude, with its sign."""
    peak = np.float32(0)
    for k in range(LANES):
        if abs(scales[k]) > abs(peak):
            peak = scales[k]
    return peak


@inline
def recode_affine(x: Any, d: Lanes, dmin: Lanes, top: int, codes: Any) -> None:
    """codes = clamp(round((x + dmin)/d), 0, top); unchanged in lanes where d is 0.  x, codes: float32[size, 16]."""
    for i in range(x.shape[0]):
        code = to_f32(clamped(nearest((load(x, i) + dmin) / d), 0, top))
        store(codes, i, where(d == f32(0), load(codes, i), code))


@inline
def recode_symmetric(x: Any, d: Lanes, half: int, codes: Any) -> None:
    """codes = half + clamp(round(x/d), −half, half − 1); unchanged in lanes where d is 0.  x, codes: float32[16, 16]."""
    for i in range(x.shape[0]):
        code = to_f32(clamped(nearest(load(x, i) / d), -half, half - 1)) + f32(half)
        store(codes, i, where(d == f32(0), load(codes, i), code))


# --- with offset: Q2_K, Q4_K, Q5_K ----------------------------------------------------------------------------------------------------


def encode_q2_k(x: Any, out: Any) -> None:
    """x ≈ d·scale_code·l − dmin·min_code, l of 2 bits, scale and minimum codes of 4 bits; sub-blocks of 16, error Σ|x|·|difference|.

    x: float32[n_blocks, 256], finite; out: uint8[n_blocks, 84].  Source: ``quantize_row_q2_K_ref``.

    84 bytes: scales:16 (bit 7654 minimum, bit 3210 scale) qs:64 d:2 dmin:2
    """
    _encode_affine_16(x, out, 3, _Q2_STEPS)


@kernel
def _encode_affine_16(x: Any, out: Any, top: int, steps: Any) -> None:
    """Q2_K (top 3), one super-block of sixteen sub-blocks at a time; error Σ|x|·|difference|."""
    values = np.empty((16, LANES), np.float32)
    weights = np.empty((16, LANES), np.float32)
    codes = np.empty((16, LANES), np.float32)
    fitted = np.empty((2, LANES), np.float32)
    unit = np.empty((2, LANES), np.float32)
    scale_codes = np.empty(LANES, np.int64)
    min_codes = np.empty(LANES, np.int64)
    flat = np.empty(SUPER_BLOCK, np.uint8)
    for b in range(x.shape[0]):
        gather(x, b, values)
        for i in range(16):
            store(weights, i, absolute(load(values, i)))
        s, m = fit_affine(values, weights, codes, top, steps, True)
        store(fitted, 0, s)
        store(fitted, 1, negative(m))
        d = _code_scales(fitted[0], 0, LANES, 15, scale_codes)
        dmin = _code_scales(fitted[1], 0, LANES, 15, min_codes)
        block = out[b]
        for k in range(LANES):
            block[k] = scale_codes[k] | (min_codes[k] << 4)
            unit[0, k] = half_to_float(d) * np.float32(block[k] & 15)
            unit[1, k] = half_to_float(dmin) * np.float32(block[k] >> 4)
        recode_affine(values, load(unit, 0), load(unit, 1), top, codes)
        in_element_order(codes, 0, flat)
        pack_2_bits(flat, 0, block, 16)
        write_u16(out, b, 80, d)
        write_u16(out, b, 82, dmin)


def encode_q4_k(x: Any, out: Any) -> None:
    """x ≈ d·scale_code·l − dmin·min_code, l of 4 bits, scale and minimum codes of 6 bits; sub-blocks of 32.

    x: float32[n_blocks, 256], finite; out: uint8[n_blocks, 144].  Source: ``quantize_row_q4_K_ref``.

    144 bytes: d:2 dmin:2 scales:12 qs:128
    """
    _encode_affine_32(x, out, 15, _Q4_STEPS)


def encode_q5_k(x: Any, out: Any) -> None:
    """As Q4_K with l of 5 bits.

    x: float32[n_blocks, 256], finite; out: uint8[n_blocks, 176].  Source: ``quantize_row_q5_K_ref``.

    176 bytes: d:2 dmin:2 scales:12 qh:32 (fifth bits) qs:128
    """
    _encode_affine_32(x, out, 31, _Q5_STEPS)


@kernel
def _encode_affine_32(x: Any, out: Any, top: int, steps: Any) -> None:
    """Q4_K (top 15) and Q5_K (top 31), two super-blocks of eight sub-blocks at a time; error Σ(rms + |x|)·difference²."""
    values = np.empty((32, LANES), np.float32)
    weights = np.empty((32, LANES), np.float32)
    codes = np.empty((32, LANES), np.float32)
    fitted = np.empty((2, LANES), np.float32)
    unit = np.empty((2, LANES), np.float32)
    scale_codes = np.empty(LANES, np.int64)
    min_codes = np.empty(LANES, np.int64)
    flat = np.empty(SUPER_BLOCK, np.uint8)
    for first in range(0, x.shape[0], 2):
        parts = min(2, x.shape[0] - first)
        gather(x, first, values)
        _weights_32(values, weights)
        s, m = fit_affine(values, weights, codes, top, steps, False)
        store(fitted, 0, s)
        store(fitted, 1, negative(m))
        for part in range(2):
            d = _code_scales(fitted[0], 8 * part, 8, 63, scale_codes)
            dmin = _code_scales(fitted[1], 8 * part, 8, 63, min_codes)
            for k in range(8 * part, 8 * part + 8):
                scale_codes[k], min_codes[k] = min(63, scale_codes[k]), min(63, min_codes[k])
                unit[0, k] = half_to_float(d) * np.float32(scale_codes[k])
                unit[1, k] = half_to_float(dmin) * np.float32(min_codes[k])
            if part < parts:
                write_u16(out, first + part, 0, d)
                write_u16(out, first + part, 2, dmin)
                pack_scales_q4(scale_codes, min_codes, 8 * part, out[first + part], 4)
        recode_affine(values, load(unit, 0), load(unit, 1), top, codes)
        pack_codes_32(codes, top, parts, flat, out, first)


@inline
def pack_codes_32(codes: Any, top: int, parts: int, flat: Any, out: Any, first: int) -> None:
    """The codes of one or two super-blocks to the end of blocks ``first`` …: qh:32 (with five bits, at byte 16) qs:128."""
    for part in range(parts):
        in_element_order(codes, part, flat)
        block = out[first + part]
        if top > 15:
            pack_bit(flat, 4, block, 16)
        pack_4_bits(flat, block, block.size - 128, 32)


@inline
def _weights_32(x: Any, weights: Any) -> None:
    """w = sqrt(Σx²/32) + |x|; both float32[32, 16]."""
    sum_xx = f32(0)
    for i in range(32):
        sum_xx = sum_xx + load(x, i) * load(x, i)
    rms = square_root(sum_xx / f32(32))
    for i in range(32):
        store(weights, i, rms + absolute(load(x, i)))


# --- without offset: Q3_K, Q6_K -------------------------------------------------------------------------------------------------------


@kernel
def encode_q3_k(x: Any, out: Any) -> None:
    """x ≈ d·(scale_code − 32)·(l − 4), l of 3 bits, scale codes of 6 bits; sub-blocks of 16.

    x: float32[n_blocks, 256], finite; out: uint8[n_blocks, 110].  Source: ``quantize_row_q3_K_ref``.

    110 bytes: hmask:32 (third bits) qs:64 scales:12 d:2
    """
    values = np.empty((16, LANES), np.float32)
    codes = np.empty((16, LANES), np.float32)
    fitted = np.empty((1, LANES), np.float32)
    unit = np.empty((1, LANES), np.float32)
    scale_codes = np.zeros(LANES, np.int64)
    flat = np.empty(SUPER_BLOCK, np.uint8)
    for b in range(x.shape[0]):
        gather(x, b, values)
        store(fitted, 0, fit_by_coordinate(values, codes, 4))
        peak = greatest_scale(fitted[0])
        d = np.uint32(0)
        for k in range(LANES):
            scale_codes[k] = 0
        if peak != 0:
            inverse = np.float32(-32) / peak
            d = float_to_half(np.float32(1) / inverse)
            for k in range(LANES):
                scale_codes[k] = min(max(nearest_int(inverse * fitted[0, k]), -32), 31) + 32
        for k in range(LANES):
            unit[0, k] = half_to_float(d) * np.float32(scale_codes[k] - 32)
        recode_symmetric(values, load(unit, 0), 4, codes)
        in_element_order(codes, 0, flat)
        block = out[b]
        pack_bit(flat, 2, block, 0)
        pack_2_bits(flat, 0, block, 32)
        pack_scales_q3(scale_codes, block, 96)
        write_u16(out, b, 108, d)


@kernel
def encode_q6_k(x: Any, out: Any) -> None:
    """x ≈ d·scale_code·(l − 32), l of 6 bits, signed scale codes of 8 bits; sub-blocks of 16.

    x: float32[n_blocks, 256], finite; out: uint8[n_blocks, 210].  Source: ``quantize_row_q6_K_ref``.

    210 bytes: ql:128 (low 4 bits) qh:64 (high 2 bits) scales:16 d:2; all 0 where every scale is below 1e-15
    """
    values = np.empty((16, LANES), np.float32)
    codes = np.empty((16, LANES), np.float32)
    fitted = np.empty((1, LANES), np.float32)
    unit = np.empty((1, LANES), np.float32)
    flat = np.empty(SUPER_BLOCK, np.uint8)
    for b in range(x.shape[0]):
        block = out[b]
        gather(x, b, values)
        store(fitted, 0, fit_symmetric(values, codes, 32, _Q6_STEPS))
        peak = greatest_scale(fitted[0])
        if abs(peak) < np.float32(TINY):
            block[:] = 0
            continue
        inverse = np.float32(-128) / peak
        d = float_to_half(np.float32(1) / inverse)
        for k in range(LANES):
            code = np.int8(min(127, nearest_int(inverse * fitted[0, k])))
            block[192 + k] = np.uint8(code)
            unit[0, k] = half_to_float(d) * np.float32(code)
        recode_symmetric(values, load(unit, 0), 32, codes)
        in_element_order(codes, 0, flat)
        pack_4_bits(flat, block, 0, 64)
        pack_2_bits(flat, 4, block, 128)
        write_u16(out, b, 208, d)
