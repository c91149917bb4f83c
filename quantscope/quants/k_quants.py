"""Decoding the K formats: super-blocks of 256 elements whose sub-blocks of 16 or 32 have their own small integer scale.

Each kernel states its super-block as ``field:bytes``.  Sub-block scales are multiplied with the super-block's float16 scale first, then
with the element: two roundings, in that order, as ggml does.  Source: ``dequantize_row_q*_K`` in ggml-quants.c; bit-identical.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quantscope.quants.kernel import inline, kernel, read_half
from quantscope.quants.simd import f32, i32, to_f32
from quantscope.quants.simd_bytes import load_u8, store_f32

F32 = np.float32


# Q2_K: 256 elements, 84 bytes: scales:16 qs:64 d:2 dmin:2
# x = (d · scale) · q − (dmin · min); 16 elements share a byte: min (4 bits), scale (4 bits).
# Byte l of qs's first half holds, from the low bits up, elements l, 32 + l, 64 + l, 96 + l; the second half the same from element 128 on.
@kernel
def decode_q2_k(blocks: Any, out: Any) -> None:
    for i in range(blocks.shape[0]):
        d, dmin = read_half(blocks, i, 80), read_half(blocks, i, 82)
        for sub in range(16):  # sub = 8 · half + 2 · pair of bits + half of the 32 bytes
            scale = blocks[i, sub]
            q = load_u8(blocks, i * 84 + 16 + (sub >> 3) * 32 + (sub & 1) * 16)
            steps = to_f32((q >> i32(sub & 6)) & i32(3))
            store_f32(out, i * 256 + sub * 16, steps * f32(d * F32(scale & 15)) - f32(dmin * F32(scale >> 4)))


# Q3_K: 256 elements, 110 bytes: hmask:32 qs:64 scales:12 d:2
# x = (d · (scale − 32)) · (q − 4); 16 elements share a scale of 6 bits.
# qs as in Q2_K; bit 2 of element 32·k + l is bit k of hmask byte l.
# scales: byte s < 8 holds the low 4 bits of scales s and s + 8; byte 8 + s%4 the high 2 bits of scales s%4, 4 + s%4, 8 + s%4, 12 + s%4.
@kernel
def decode_q3_k(blocks: Any, out: Any) -> None:
    for i in range(blocks.shape[0]):
        d = read_half(blocks, i, 108)
        for sub in range(16):
            low = (np.int32(blocks[i, 96 + (sub & 7)]) >> (4 * (sub >> 3))) & 15
            high = (np.int32(blocks[i, 104 + (sub & 3)]) >> (2 * (sub >> 2))) & 3
            q = load_u8(blocks, i * 110 + 32 + (sub >> 3) * 32 + (sub & 1) * 16)
            bit = load_u8(blocks, i * 110 + (sub & 1) * 16) >> i32(sub >> 1)
            steps = to_f32((((q >> i32(sub & 6)) & i32(3)) | ((bit & i32(1)) << i32(2))) - i32(4))
            store_f32(out, i * 256 + sub * 16, steps * f32(d * F32((low | (high << 4)) - 32)))


@inline
def scale_min_k4(blocks: Any, i: int, sub: int) -> tuple[np.float32, np.float32]:
    """Scale and min of sub-block 0 … 7, 0 … 63 each, from the 12 bytes behind d and dmin of Q4_K and Q5_K."""
    # byte 0…3: H4 ssssss (scale 0…3)   byte 4…7: H4 mmmmmm (min 0…3)   byte 8…11: mmmm ssss (low 4 bits of min and scale 4…7)
    # H4: the two high bits of scale 4…7 (in byte 0…3) and of min 4…7 (in byte 4…7)
    if sub < 4:
        return F32(blocks[i, 4 + sub] & 63), F32(blocks[i, 8 + sub] & 63)
    low = blocks[i, 8 + sub]
    scale = (low & 15) | ((blocks[i, sub] >> 6) << 4)
    minimum = (low >> 4) | ((blocks[i, 4 + sub] >> 6) << 4)
    return F32(scale), F32(minimum)


# Q4_K: 256 elements, 144 bytes: d:2 dmin:2 scales:12 qs:128
# x = (d · scale) · q − (dmin · min); 32 elements share a scale and a min of 6 bits each.
# Bytes 32·p … 32·p + 31 of qs hold sub-block 2·p in the low and 2·p + 1 in the high nibbles.
@kernel
def decode_q4_k(blocks: Any, out: Any) -> None:
    for i in range(blocks.shape[0]):
        d, dmin = read_half(blocks, i, 0), read_half(blocks, i, 2)
        for sub in range(8):
            scale, minimum = scale_min_k4(blocks, i, sub)
            step, offset = f32(d * scale), f32(dmin * minimum)
            for k in range(0, 32, 16):
                q = load_u8(blocks, i * 144 + 16 + (sub >> 1) * 32 + k) >> i32(4 * (sub & 1))
                store_f32(out, i * 256 + sub * 32 + k, to_f32(q & i32(15)) * step - offset)


# Q5_K: 256 elements, 176 bytes: d:2 dmin:2 scales:12 qh:32 qs:128
# As Q4_K; bit 4 of element 32·sub + l is bit sub of qh byte l.
@kernel
def decode_q5_k(blocks: Any, out: Any) -> None:
    for i in range(blocks.shape[0]):
        d, dmin = read_half(blocks, i, 0), read_half(blocks, i, 2)
        for sub in range(8):
            scale, minimum = scale_min_k4(blocks, i, sub)
            step, offset = f32(d * scale), f32(dmin * minimum)
            for k in range(0, 32, 16):
                q = load_u8(blocks, i * 176 + 48 + (sub >> 1) * 32 + k) >> i32(4 * (sub & 1))
                bit = load_u8(blocks, i * 176 + 16 + k) >> i32(sub)
                store_f32(out, i * 256 + sub * 32 + k, to_f32((q & i32(15)) | ((bit & i32(1)) << i32(4))) * step - offset)


# Q6_K: 256 elements, 210 bytes: ql:128 qh:64 scales:16 d:2
# x = (d · scale) · (q − 32); 16 elements share a scale, a signed byte.
# Each half of 128 elements has four quarters of 32. Element l of a quarter: its low 4 bits are in byte 32·(quarter % 2) + l of ql's half,
# in the low nibble for quarters 0 and 1; its high 2 bits are bits 2·quarter and 2·quarter + 1 of byte l of qh's half.
@kernel
def decode_q6_k(blocks: Any, out: Any) -> None:
    for i in range(blocks.shape[0]):
        d = read_half(blocks, i, 208)
        for sub in range(16):  # sub = 8 · half + 2 · quarter + half of the 32 bytes
            half, quarter, k = sub >> 3, (sub >> 1) & 3, (sub & 1) * 16
            low = load_u8(blocks, i * 210 + half * 64 + (quarter & 1) * 32 + k) >> i32(4 * (quarter >> 1))
            high = load_u8(blocks, i * 210 + 128 + half * 32 + k) >> i32(2 * quarter)
            step = f32(d * F32(np.int8(blocks[i, 192 + sub])))
            store_f32(out, i * 256 + sub * 16, to_f32(((low & i32(15)) | ((high & i32(3)) << i32(4))) - i32(32)) * step)
