"""Encoding with importance: float32 → the bytes that ggml makes when it is given an importance matrix.

    encode_q4_k(x: float32[n_blocks, 256], importance: float32[blocks_per_row, 256], out: uint8[n_blocks, 144])

x is whole rows: block b holds the columns of ``importance[b % blocks_per_row]``.  The steps are those of ``k_search.py`` (fit, scales,
codes, pack); the searches differ (``weighted_fit.py``).  The types without sub-blocks search their one scale, too, and their codes stay
those of the search.  Sixteen blocks of 32, or the sub-blocks of one or two super-blocks, go side by side.
Source: ``quantize_row_*_impl`` in ggml-quants.c, and ``ggml_quantize_chunk``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quantscope.quants.k_fit import TINY, fit_affine
from quantscope.quants.k_pack import pack_2_bits, pack_4_bits, pack_bit, pack_scales_q3, pack_scales_q4
from quantscope.quants.k_quants import scale_min_k4
from quantscope.quants.k_search import (
    SUPER_BLOCK,
    gather,
    greatest_scale,
    in_element_order,
    nearest_int,
    pack_codes_32,
    recode_affine,
    recode_symmetric,
    trial_steps,
)
from quantscope.quants.kernel import float_to_half, half_to_float, inline, kernel, write_half, write_u16, write_u32
from quantscope.quants.simd import LANES, load, negative, store
from quantscope.quants.weighted_fit import fit_scales, fit_weighted, sum_of_squares, weigh

F32 = np.float32


def _symmetric_steps(half: int) -> Any:
    """half + 0.1·i for i = −9 … 9 without 0."""
    return F32(half) + F32(0.1) * np.delete(np.arange(-9, 10), 9).astype(F32)


_STEPS_3, _STEPS_15, _STEPS_31 = (trial_steps(-0.9, 0.05, 37, top) for top in (3, 15, 31))
_HALF_4, _HALF_8, _HALF_16, _HALF_32 = (_symmetric_steps(half) for half in (4, 8, 16, 32))


# --- one scale per 32 elements: Q4_0, Q4_1, Q5_0, Q5_1 --------------------------------------------------------------------------------


def encode_q4_0(x: Any, importance: Any, out: Any) -> None:
    """x ≈ d·(l − 8).  18 bytes: d:2 qs:16.  Source: ``quantize_row_q4_0_impl``."""
    _encode_symmetric_blocks(x, importance, out, 8, _HALF_8)


def encode_q5_0(x: Any, importance: Any, out: Any) -> None:
    """x ≈ d·(l − 16).  22 bytes: d:2 qh:4 qs:16.  Source: ``quantize_row_q5_0_impl``."""
    _encode_symmetric_blocks(x, importance, out, 16, _HALF_16)


def encode_q4_1(x: Any, importance: Any, out: Any) -> None:
    """x ≈ d·l + m.  20 bytes: d:2 m:2 qs:16.  Source: ``quantize_row_q4_1_impl``."""
    _encode_affine_blocks(x, importance, out, 15, _STEPS_15)


def encode_q5_1(x: Any, importance: Any, out: Any) -> None:
    """x ≈ d·l + m.  24 bytes: d:2 m:2 qh:4 qs:16.  Source: ``quantize_row_q5_1_impl``."""
    _encode_affine_blocks(x, importance, out, 31, _STEPS_31)


@kernel
def _encode_symmetric_blocks(x: Any, importance: Any, out: Any, half: int, trials: Any) -> None:
    values, columns, weights, codes = _room(32), _room(32), _room(32), _room(32)
    fitted = _room(1)
    means = _row_means(x, importance.shape[0])
    mean = _room(1)
    for first in range(0, x.shape[0], LANES):
        gather(x, first, values)
        _gather_columns(importance, first, x.shape[0], columns)
        _gather_means(means, importance.shape[0], first, mean)
        weigh(values, columns, mean, weights)
        store(fitted, 0, fit_weighted(values, weights, codes, half, trials))
        for k in range(min(LANES, x.shape[0] - first)):
            write_half(out, first + k, 0, fitted[0, k])
            _pack_32(codes, k, half == 16, out, first + k, 2)


@kernel
def _encode_affine_blocks(x: Any, importance: Any, out: Any, top: int, trials: Any) -> None:
    values, columns, weights, codes = _room(32), _room(32), _room(32), _room(32)
    fitted = _room(2)
    means = _row_means(x, importance.shape[0])
    mean = _room(1)
    for first in range(0, x.shape[0], LANES):
        gather(x, first, values)
        _gather_columns(importance, first, x.shape[0], columns)
        _gather_means(means, importance.shape[0], first, mean)
        weigh(values, columns, mean, weights)
        s, m = fit_affine(values, weights, codes, top, trials, False)
        store(fitted, 0, s)
        store(fitted, 1, m)
        for k in range(min(LANES, x.shape[0] - first)):
            write_half(out, first + k, 0, fitted[0, k])
            write_half(out, first + k, 2, fitted[1, k])
            _pack_32(codes, k, top == 31, out, first + k, 4)


@inline
def _row_means(x: Any, blocks_per_row: int) -> Any:
    """Mean square of every row: float32[n_rows]."""
    rows = x.reshape(-1, blocks_per_row * x.shape[1])
    means = np.empty(rows.shape[0], F32)
    for row in range(rows.shape[0]):
        means[row] = sum_of_squares(rows[row]) / F32(rows.shape[1])
    return means


@inline
def _gather_means(means: Any, blocks_per_row: int, first: int, mean: Any) -> None:
    """mean[0, k] = that of the row of block first + k; past the last row it is repeated."""
    for k in range(LANES):
        mean[0, k] = means[min((first + k) // blocks_per_row, means.size - 1)]


@inline
def _pack_32(codes: Any, k: int, five_bits: bool, out: Any, i: int, at: int) -> None:
    """Lane k of float32[32, 16] → qh:4 (with five bits) qs:16 from byte ``at`` of block i."""
    if five_bits:
        high = np.uint32(0)
        for j in range(32):
            high = np.uint32(high | (((np.uint32(codes[j, k]) >> np.uint32(4)) & np.uint32(1)) << np.uint32(j)))
        write_u32(out, i, at, high)
        at += 4
    for j in range(16):
        out[i, at + j] = np.uint8((np.uint32(codes[j, k]) & 15) | ((np.uint32(codes[j + 16, k]) & 15) << 4))


# --- steps that the types share -------------------------------------------------------------------------------------------------------


@inline
def _room(n: int) -> Any:
    """float32[n, 16], not set."""
    return np.empty((n, LANES), F32)


@inline
def _gather_columns(importance: Any, first: int, n_blocks: int, columns: Any) -> None:
    """columns[i, k] = importance of what ``gather`` puts in values[i, k].  importance: float32[blocks_per_row, block size]."""
    size, block = columns.shape[0], importance.shape[1]
    for k in range(LANES):
        row = importance[min(first + k * size // block, n_blocks - 1) % importance.shape[0]]
        start = k * size % block
        for i in range(size):
            columns[i, k] = row[start + i]


@inline
def _block_means(x: Any, first: int, size: int, factor: np.float32, mean: Any) -> None:
    """mean[0, k] = factor·Σx²/256 of the super-block of sub-block k."""
    per_block = SUPER_BLOCK // size
    for part in range(LANES // per_block):
        sum_xx = sum_of_squares(x[min(first + part, x.shape[0] - 1)])
        for k in range(part * per_block, (part + 1) * per_block):
            mean[0, k] = F32(factor * sum_xx) / F32(SUPER_BLOCK)


# --- with offset: Q2_K, Q4_K, Q5_K ----------------------------------------------------------------------------------------------------


@kernel
def encode_q2_k(x: Any, importance: Any, out: Any) -> None:
    """x ≈ d·scale_code·l − dmin·min_code; σ² = Σx²/256.  84 bytes: scales:16 qs:64 d:2 dmin:2.  Source: ``quantize_row_q2_K_impl``."""
    values, columns, weights, codes = _room(16), _room(16), _room(16), _room(16)
    mean, totals, fitted, unit = _room(1), _room(1), _room(2), _room(2)
    scale_codes, min_codes = np.empty(LANES, np.int64), np.empty(LANES, np.int64)
    flat = np.empty(SUPER_BLOCK, np.uint8)
    for b in range(x.shape[0]):
        gather(x, b, values)
        _gather_columns(importance, b, x.shape[0], columns)
        _block_means(x, b, 16, F32(1), mean)
        store(totals, 0, weigh(values, columns, mean, weights))
        s, m = fit_affine(values, weights, codes, 3, _STEPS_3, False)
        _store_affine(s, m, fitted)
        d = float_to_half(fit_scales(fitted[0], totals[0], 15, scale_codes))
        dmin = float_to_half(fit_scales(fitted[1], totals[0], 15, min_codes))
        block = out[b]
        for k in range(LANES):
            block[k] = scale_codes[k] | (min_codes[k] << 4)
            unit[0, k] = half_to_float(d) * F32(block[k] & 15)
            unit[1, k] = half_to_float(dmin) * F32(block[k] >> 4)
        recode_affine(values, load(unit, 0), load(unit, 1), 3, codes)
        in_element_order(codes, 0, flat)
        pack_2_bits(flat, 0, block, 16)
        write_u16(out, b, 80, d)
        write_u16(out, b, 82, dmin)


def encode_q4_k(x: Any, importance: Any, out: Any) -> None:
    """x ≈ d·scale_code·l − dmin·min_code; σ² = 2·Σx²/256.  144 bytes: d:2 dmin:2 scales:12 qs:128.  Source: ``quantize_row_q4_K_impl``."""
    _encode_affine_32(x, importance, out, 15, _STEPS_15)


def encode_q5_k(x: Any, importance: Any, out: Any) -> None:
    """As Q4_K with l of 5 bits.  176 bytes: d:2 dmin:2 scales:12 qh:32 qs:128.  Source: ``quantize_row_q5_K_impl``."""
    _encode_affine_32(x, importance, out, 31, _STEPS_31)


@kernel
def _encode_affine_32(x: Any, importance: Any, out: Any, top: int, trials: Any) -> None:
    values, columns, weights, codes = _room(32), _room(32), _room(32), _room(32)
    mean, totals, fitted, unit = _room(1), _room(1), _room(2), np.zeros((2, LANES), F32)
    flat = np.empty(SUPER_BLOCK, np.uint8)
    for first in range(0, x.shape[0], 2):
        parts = min(2, x.shape[0] - first)
        gather(x, first, values)
        _gather_columns(importance, first, x.shape[0], columns)
        _block_means(x, first, 32, F32(2), mean)
        store(totals, 0, weigh(values, columns, mean, weights))
        s, m = fit_affine(values, weights, codes, top, trials, False)
        _store_affine(s, m, fitted)
        for part in range(parts):
            _scales_of_super_block(fitted, totals, part, 255 if top == 15 else 63, out, first + part, unit)
        recode_affine(values, load(unit, 0), load(unit, 1), top, codes)
        pack_codes_32(codes, top, parts, flat, out, first)


@inline
def _store_affine(s: Any, m: Any, fitted: Any) -> None:
    """fitted[0] = s, fitted[1] = −m: what is stored as minimum is subtracted."""
    store(fitted, 0, s)
    store(fitted, 1, negative(m))


@inline
def _scales_of_super_block(fitted: Any, totals: Any, part: int, largest: int, out: Any, i: int, unit: Any) -> None:
    """d, dmin and the packed codes of eight sub-blocks into block i; the scales as a reader finds them there into ``unit``.

    ggml does not clamp the codes of Q4_K, which wrap where a scale is negative and then spill over in the packed bytes: so read them back.
    """
    scale_codes, min_codes = np.empty(8, np.int64), np.empty(8, np.int64)
    lanes = slice(8 * part, 8 * part + 8)
    d = float_to_half(fit_scales(fitted[0, lanes], totals[0, lanes], 63, scale_codes))
    dmin = float_to_half(fit_scales(fitted[1, lanes], totals[0, lanes], 63, min_codes))
    for k in range(8):
        scale_codes[k], min_codes[k] = min(largest, scale_codes[k]), min(largest, min_codes[k])
    write_u16(out, i, 0, d)
    write_u16(out, i, 2, dmin)
    pack_scales_q4(scale_codes, min_codes, 0, out[i], 4)
    for k in range(8):
        scale, minimum = scale_min_k4(out, i, k)
        unit[0, 8 * part + k] = half_to_float(d) * scale
        unit[1, 8 * part + k] = half_to_float(dmin) * minimum


# --- without offset: Q3_K, Q6_K -------------------------------------------------------------------------------------------------------


@kernel
def encode_q3_k(x: Any, importance: Any, out: Any) -> None:
    """x ≈ d·(scale_code − 32)·(l − 4); σ² = 2·Σx²/256.  110 bytes: hmask:32 qs:64 scales:12 d:2.  Source: ``quantize_row_q3_K_impl``.

    Sixteen super-blocks at a time, so that the search for d has one in every lane, too.
    """
    values, columns, weights = _room(16), _room(16), _room(16)
    scales, scale_weights, scale_codes = _room(16), _room(16), _room(16)  # [sub-block, super-block of the group]
    codes = np.empty((LANES, 16, LANES), F32)
    mean, totals, fitted = _room(1), _room(1), _room(1)
    for first in range(0, x.shape[0], LANES):
        parts = min(LANES, x.shape[0] - first)
        scales[:], scale_weights[:] = F32(0), F32(0)
        for part in range(parts):
            gather(x, first + part, values)
            _gather_columns(importance, first + part, x.shape[0], columns)
            _block_means(x, first + part, 16, F32(2), mean)
            store(totals, 0, weigh(values, columns, mean, weights))
            store(fitted, 0, fit_weighted(values, weights, codes[part], 4, _HALF_4))
            for k in range(LANES):
                scales[k, part], scale_weights[k, part] = fitted[0, k], totals[0, k]
        store(fitted, 0, fit_weighted(scales, scale_weights, scale_codes, 32, _HALF_32))
        for part in range(parts):
            gather(x, first + part, values)
            _write_q3_k(values, codes[part], float_to_half(fitted[0, part]), scale_codes[:, part], out, first + part)


@inline
def _write_q3_k(values: Any, codes: Any, d: np.uint32, scale_codes: Any, out: Any, i: int) -> None:
    """Block i of d (float16 bits), scale codes float32[16] and codes float32[16, 16], which are rounded again first."""
    packed, unit, flat = np.empty(LANES, np.int64), _room(1), np.empty(SUPER_BLOCK, np.uint8)
    for k in range(LANES):
        packed[k] = np.int64(scale_codes[k])
        unit[0, k] = half_to_float(d) * F32(packed[k] - 32)
    recode_symmetric(values, load(unit, 0), 4, codes)
    in_element_order(codes, 0, flat)
    block = out[i]
    pack_bit(flat, 2, block, 0)
    pack_2_bits(flat, 0, block, 32)
    pack_scales_q3(packed, block, 96)
    write_u16(out, i, 108, d)


@kernel
def encode_q6_k(x: Any, importance: Any, out: Any) -> None:
    """x ≈ d·scale_code·(l − 32); the importance itself is the weight.  210 bytes: ql:128 qh:64 scales:16 d:2.

    Source: ``quantize_row_q6_K_impl``.
    """
    values, columns, codes = _room(16), _room(16), _room(16)
    fitted, unit = _room(1), _room(1)
    flat = np.empty(SUPER_BLOCK, np.uint8)
    for b in range(x.shape[0]):
        block = out[b]
        gather(x, b, values)
        _gather_columns(importance, b, x.shape[0], columns)
        store(fitted, 0, fit_weighted(values, columns, codes, 32, _HALF_32))
        largest = greatest_scale(fitted[0])
        if abs(largest) < F32(TINY):
            block[:] = 0
            continue
        inverse = F32(-128) / largest
        d = float_to_half(F32(1) / inverse)
        for k in range(LANES):
            code = np.int8(min(127, nearest_int(inverse * fitted[0, k])))
            block[192 + k] = np.uint8(code)
            unit[0, k] = half_to_float(d) * F32(code)
        recode_symmetric(values, load(unit, 0), 32, codes)
        in_element_order(codes, 0, flat)
        pack_4_bits(flat, block, 0, 64)
        pack_2_bits(flat, 4, block, 128)
        write_u16(out, b, 208, d)
