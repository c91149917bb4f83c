"""Bits of the K types: codes and sub-block scales into the bytes of a super-block.

``codes`` is uint8[256], one code per element in element order; ``block`` is uint8[type_size].  Source: ``quantize_row_*_K_ref`` and
``block_q*_K`` in ggml-common.h.
"""

from __future__ import annotations

from typing import Any

from quantscope.quants.kernel import inline


@inline
def pack_2_bits(codes: Any, shift: int, block: Any, at: int) -> None:
    """Bits shift, shift + 1 of 256 codes → 64 bytes; per 128 elements, byte l of 32 holds elements l, l+32, l+64, l+96.

    bit 7 6      5 4      3 2      1 0
        l+96     l+64     l+32     l
    """
    for half in range(2):
        for i in range(32):
            byte = 0
            for k in range(4):
                byte |= ((codes[128 * half + 32 * k + i] >> shift) & 3) << (2 * k)
            block[at + 32 * half + i] = byte


@inline
def pack_4_bits(codes: Any, block: Any, at: int, stride: int) -> None:
    """Four low bits of 256 codes → 128 bytes: low nibble element e, high nibble element e + ``stride``, then the next 2·stride elements.

    bit 7654       3210
        e+stride   e
    """
    for base in range(0, 256, 2 * stride):
        for i in range(stride):
            e = base + i
            block[at + base // 2 + i] = (codes[e] & 15) | ((codes[e + stride] & 15) << 4)


@inline
def pack_bit(codes: Any, bit: int, block: Any, at: int) -> None:
    """Bit ``bit`` of 256 codes → 32 bytes; bit k of byte i belongs to element 32·k + i."""
    for i in range(32):
        byte = 0
        for k in range(8):
            byte |= ((codes[32 * k + i] >> bit) & 1) << k
        block[at + i] = byte


@inline
def pack_scales_q3(codes: Any, block: Any, at: int) -> None:
    """Sixteen 6-bit scales → 12 bytes.

    byte 0 … 7    bit 7654 scale j+8, low 4    bit 3210 scale j, low 4
    byte 8 … 11   bit 76 j+12   54 j+8   32 j+4   10 j    (j = 0 … 3, high 2 bits)
    """
    for j in range(8):
        block[at + j] = (codes[j] & 15) | ((codes[j + 8] & 15) << 4)
    for j in range(4):
        byte = 0
        for k in range(4):
            byte |= (codes[j + 4 * k] >> 4) << (2 * k)
        block[at + 8 + j] = byte


@inline
def pack_scales_q4(scales: Any, mins: Any, first: int, block: Any, at: int) -> None:
    """Eight 6-bit scales and eight 6-bit minima → 12 bytes; j = 0 … 3.

    byte j        bit 76 scale j+4, high 2    bit 543210 scale j
    byte 4 + j    bit 76 min j+4, high 2      bit 543210 min j
    byte 8 + j    bit 7654 min j+4, low 4     bit 3210 scale j+4, low 4
    """
    for j in range(4):
        s, s4, m, m4 = scales[first + j], scales[first + j + 4], mins[first + j], mins[first + j + 4]
        block[at + j] = s | ((s4 >> 4) << 6)
        block[at + 4 + j] = m | ((m4 >> 4) << 6)
        block[at + 8 + j] = (s4 & 15) | ((m4 & 15) << 4)
