"""Decoding the I formats: groups of 8 or 4 elements are one index into a grid of magnitudes, with signs and scales beside it.

The grids are constants of the format; they come from the ``gguf`` package.  Each kernel states its block as ``field:bytes``; 256 elements
each (IQ4_NL 32), in 8 *parts* of 32.  Source: ``dequantize_row_iq*`` in ggml-quants.c; bit-identical.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from quantscope.quants.kernel import half_to_float, inline, kernel, read_half, read_u16, read_u32

F32 = np.float32
DELTA = np.float32(0.125)  # what IQ1_S and IQ1_M add to or subtract from their grid of −1, 0, 1

# the 16 values of IQ4_NL and IQ4_XS
LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)


@cache
def grid(name: str) -> Any:
    """The grid of a format, float32[n_points, 8 or 4]."""
    from gguf import quants

    table = getattr(quants, name)
    table.init_grid()
    return np.ascontiguousarray(table.grid.reshape(table.grid_shape), np.float32)


def decode_iq1_s(blocks: Any, out: Any) -> None:
    _iq1_s(blocks, out, grid("IQ1_S"))


def decode_iq1_m(blocks: Any, out: Any) -> None:
    _iq1_m(blocks, out, grid("IQ1_S"))


def decode_iq2_xxs(blocks: Any, out: Any) -> None:
    _iq2_xxs(blocks, out, grid("IQ2_XXS"))


def decode_iq2_xs(blocks: Any, out: Any) -> None:
    _iq2_xs(blocks, out, grid("IQ2_XS"))


def decode_iq2_s(blocks: Any, out: Any) -> None:
    _iq2_s(blocks, out, grid("IQ2_S"))


def decode_iq3_xxs(blocks: Any, out: Any) -> None:
    _iq3_xxs(blocks, out, grid("IQ3_XXS"))


def decode_iq3_s(blocks: Any, out: Any) -> None:
    _iq3_s(blocks, out, grid("IQ3_S"))


# IQ1_S: 50 bytes: d:2 qs:32 qh:16      x = d · (2·scale + 1) · (point ± 0.125)
# qh of a part: s ccc kkk jjj iii hhh → sign of the 0.125, scale, the high 3 bits of four indices into 2048 points of 8
@kernel
def _iq1_s(blocks: Any, out: Any, points: Any) -> None:
    for i in range(blocks.shape[0]):
        d = read_half(blocks, i, 0)
        for part in range(8):
            high = read_u16(blocks, i, 34 + 2 * part)
            step = F32(d * F32(2 * ((high >> 12) & 7) + 1))
            delta = -DELTA if high & 0x8000 else DELTA
            for k in range(4):
                index = np.uint32(blocks[i, 2 + 4 * part + k]) | (((high >> (3 * k)) & 7) << 8)
                _shifted_point(out, i, part * 32 + k * 8, points, index, step, delta)


# IQ1_M: 56 bytes: qs:32 qh:16 scales:8     x = d · (2·scale + 1) · (point ± 0.125), a scale of 3 bits for 16 elements
# A nibble of qh: sign of the 0.125, high 3 bits of the index. scales: four words dddd cccbbbaaa… whose high nibbles are the float16 d.
@kernel
def _iq1_m(blocks: Any, out: Any, points: Any) -> None:
    for i in range(blocks.shape[0]):
        half = np.uint32(0)
        for k in range(4):
            half = np.uint32(half | ((read_u16(blocks, i, 48 + 2 * k) >> 12) << (4 * k)))
        d = half_to_float(half)
        for group in range(32):
            scales = read_u16(blocks, i, 48 + 2 * (group >> 3)) >> (3 * ((group >> 1) & 3))
            step = F32(d * F32(2 * (scales & 7) + 1))
            high = np.uint32(blocks[i, 32 + (group >> 1)]) >> (4 * (group & 1))
            index = np.uint32(blocks[i, group]) | ((high & 7) << 8)
            _shifted_point(out, i, group * 8, points, index, step, -DELTA if high & 8 else DELTA)


# IQ2_XXS: 66 bytes: d:2 qs:64      x = ± d · (scale + ½)/4 · point
# 8 bytes of qs for a part: four indices, then a word: scale (4 bits), four times 7 signs
@kernel
def _iq2_xxs(blocks: Any, out: Any, points: Any) -> None:
    for i in range(blocks.shape[0]):
        d = read_half(blocks, i, 0)
        for part in range(8):
            word = read_u32(blocks, i, 2 + 8 * part + 4)
            step = _half_step(d, word >> 28, F32(0.25))
            for k in range(4):
                index = blocks[i, 2 + 8 * part + k]
                _signed_point(out, i, part * 32 + k * 8, points, index, step, _eight_signs(word >> (7 * k)), 8)


# IQ2_XS: 74 bytes: d:2 qs:64 scales:8      x = ± d · (scale + ½)/4 · point, a scale of 4 bits for 16 elements
# A word of qs: 7 signs, 9 bits of index
@kernel
def _iq2_xs(blocks: Any, out: Any, points: Any) -> None:
    for i in range(blocks.shape[0]):
        d = read_half(blocks, i, 0)
        for group in range(32):
            scale = np.uint32(blocks[i, 66 + (group >> 2)]) >> (4 * ((group >> 1) & 1))
            step = _half_step(d, scale & 15, F32(0.25))
            word = read_u16(blocks, i, 2 + 2 * group)
            _signed_point(out, i, group * 8, points, word & 511, step, _eight_signs(word >> 9), 8)


# IQ2_S: 82 bytes: d:2 qs:32 signs:32 qh:8 scales:8     x = ± d · (scale + ½)/4 · point, a scale of 4 bits for 16 elements
# qh of a part: the high 2 bits of four indices into 1024 points
@kernel
def _iq2_s(blocks: Any, out: Any, points: Any) -> None:
    for i in range(blocks.shape[0]):
        d = read_half(blocks, i, 0)
        for group in range(32):
            scale = np.uint32(blocks[i, 74 + (group >> 2)]) >> (4 * ((group >> 1) & 1))
            step = _half_step(d, scale & 15, F32(0.25))
            high = (np.uint32(blocks[i, 66 + (group >> 2)]) >> (2 * (group & 3))) & 3
            index = np.uint32(blocks[i, 2 + group]) | (high << 8)
            _signed_point(out, i, group * 8, points, index, step, blocks[i, 34 + group], 8)


# IQ3_XXS: 98 bytes: d:2 qs:64 words:32     x = ± d · (scale + ½)/2 · point of 4
# The word of a part: scale (4 bits), four times 7 signs
@kernel
def _iq3_xxs(blocks: Any, out: Any, points: Any) -> None:
    for i in range(blocks.shape[0]):
        d = read_half(blocks, i, 0)
        for part in range(8):
            word = read_u32(blocks, i, 66 + 4 * part)
            step = _half_step(d, word >> 28, F32(0.5))
            for k in range(8):
                signs = _eight_signs(word >> (7 * (k >> 1))) >> (4 * (k & 1))
                _signed_point(out, i, part * 32 + k * 4, points, blocks[i, 2 + 8 * part + k], step, signs, 4)


# IQ3_S: 110 bytes: d:2 qs:64 qh:8 signs:32 scales:4        x = ± d · (2·scale + 1) · point of 4, a scale of 4 bits for a part
# Bit k of a part's qh: the high bit of its index k into 512 points
@kernel
def _iq3_s(blocks: Any, out: Any, points: Any) -> None:
    for i in range(blocks.shape[0]):
        d = read_half(blocks, i, 0)
        for part in range(8):
            scale = np.uint32(blocks[i, 106 + (part >> 1)]) >> (4 * (part & 1))
            step = F32(d * F32(2 * (scale & 15) + 1))
            for k in range(8):
                high = (np.uint32(blocks[i, 66 + part]) >> k) & 1
                index = np.uint32(blocks[i, 2 + 8 * part + k]) | (high << 8)
                signs = np.uint32(blocks[i, 74 + 4 * part + (k >> 1)]) >> (4 * (k & 1))
                _signed_point(out, i, part * 32 + k * 4, points, index, step, signs, 4)


# IQ4_NL: 32 elements, 18 bytes: d:2 qs:16      x = d · level; byte j: elements j (low nibble) and j + 16
@kernel
def decode_iq4_nl(blocks: Any, out: Any) -> None:
    for i in range(blocks.shape[0]):
        d = read_half(blocks, i, 0)
        for j in range(16):
            q = blocks[i, 2 + j]
            out[i, j] = d * LEVELS[q & 15]
            out[i, j + 16] = d * LEVELS[q >> 4]


# IQ4_XS: 136 bytes: d:2 scales_h:2 scales_l:4 qs:128       x = d · (scale − 32) · level
# Scale of a part: low 4 bits in a nibble of scales_l, high 2 bits in scales_h; qs of a part as in IQ4_NL
@kernel
def decode_iq4_xs(blocks: Any, out: Any) -> None:
    for i in range(blocks.shape[0]):
        d = read_half(blocks, i, 0)
        for part in range(8):
            low = (np.int32(blocks[i, 4 + (part >> 1)]) >> (4 * (part & 1))) & 15
            high = (np.int32(read_u16(blocks, i, 2)) >> (2 * part)) & 3
            step = F32(d * F32((low | (high << 4)) - 32))
            for j in range(16):
                q = blocks[i, 8 + 16 * part + j]
                out[i, part * 32 + j] = step * LEVELS[q & 15]
                out[i, part * 32 + j + 16] = step * LEVELS[q >> 4]


@inline
def _half_step(d: np.float32, scale: np.uint32, factor: np.float32) -> np.float32:
    """d · (½ + scale) · factor, one rounding each."""
    return F32(F32(d * F32(F32(0.5) + F32(scale))) * factor)


@inline
def _eight_signs(seven: np.uint32) -> np.uint32:
    """The low 7 bits, and as bit 7 what makes the number of set bits even."""
    signs = np.uint32(seven & 127)
    parity = signs ^ (signs >> 4)
    parity = parity ^ (parity >> 2)
    return signs | (((parity ^ (parity >> 1)) & 1) << 7)


@inline
def _signed_point(out: Any, i: int, at: int, points: Any, index: int, step: np.float32, signs: np.uint32, size: int) -> None:
    """out[i, at + j] = ± step · points[index, j] for j < size; minus where bit j of ``signs`` is set."""
    for j in range(size):
        value = step * points[index, j]
        out[i, at + j] = -value if signs & (1 << j) else value


@inline
def _shifted_point(out: Any, i: int, at: int, points: Any, index: int, step: np.float32, delta: np.float32) -> None:
    """out[i, at + j] = step · (points[index, j] + delta) for j < 8."""
    for j in range(8):
        out[i, at + j] = step * F32(points[index, j] + delta)
