"""The codes inside the blocks of a type: which bits of which bytes hold the code of each element, to read and to replace them.

    x[e] = offset[e] + step[e] · code[e]          step, offset: set by the scales of the block, which stay as they are

A code has a low part and, in some types, a high part elsewhere in the block; where both are is a row of ``LAYOUTS``.
Source: ``block_*`` in ggml-common.h and ``dequantize_row_*`` in ggml-quants.c.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from quantscope.errors import UnsupportedTypeError
from quantscope.qtypes import QTYPES, QuantType
from quantscope.quants import decode

Bytes: TypeAlias = NDArray[np.uint8]
Codes: TypeAlias = NDArray[np.uint8]
Place: TypeAlias = Callable[[NDArray[np.int64]], tuple[NDArray[np.int64], NDArray[np.int64]]]  # element → (byte of the block, shift)


@dataclass(frozen=True)
class Part:
    """Some bits of the code of every element."""

    bits: int
    place: Place


@dataclass(frozen=True)
class CodeLayout:
    """The low bits first.  flipped: bits in which the stored number differs from the code, so that codes count from 0."""

    block: int  # [elements]
    parts: tuple[Part, ...]
    flipped: int = 0

    @property
    def top(self) -> int:
        """The largest code."""
        return int((1 << sum(part.bits for part in self.parts)) - 1)

    @cached_property
    def places(self) -> tuple[tuple[NDArray[np.int64], NDArray[np.int64]], ...]:
        """(byte, shift) of every element, for each part."""
        e = np.arange(self.block)
        return tuple(part.place(e) for part in self.parts)


def _nibbles(at: int, stride: int) -> Part:
    """Low nibbles the first ``stride`` elements of 2·stride, high nibbles the others."""
    return Part(4, lambda e: (at + e // (2 * stride) * stride + e % stride, e // stride % 2 * 4))


def _pairs(at: int) -> Part:
    """Two bits; per 128 elements, byte l of 32 holds elements l, l+32, l+64, l+96 from the low bits up."""
    return Part(2, lambda e: (at + e // 128 * 32 + e % 32, e % 128 // 32 * 2))


def _bit_planes(at: int) -> Part:
    """One bit; bit k of byte l holds element 32·k + l."""
    return Part(1, lambda e: (at + e % 32, e // 32))


def _bit_row(at: int) -> Part:
    """One bit, 32 elements in a row."""
    return Part(1, lambda e: (at + e // 8, e % 8))


LAYOUTS: dict[str, CodeLayout] = {
    "Q4_0": CodeLayout(32, (_nibbles(2, 16),)),
    "Q4_1": CodeLayout(32, (_nibbles(4, 16),)),
    "Q5_0": CodeLayout(32, (_nibbles(6, 16), _bit_row(2))),
    "Q5_1": CodeLayout(32, (_nibbles(8, 16), _bit_row(4))),
    "Q8_0": CodeLayout(32, (Part(8, lambda e: (2 + e, 0 * e)),), flipped=0x80),
    "Q2_K": CodeLayout(256, (_pairs(16),)),
    "Q3_K": CodeLayout(256, (_pairs(32), _bit_planes(0))),
    "Q4_K": CodeLayout(256, (_nibbles(16, 32),)),
    "Q5_K": CodeLayout(256, (_nibbles(48, 32), _bit_planes(16))),
    "Q6_K": CodeLayout(256, (Part(4, lambda e: (e // 128 * 64 + e % 64, e % 128 // 64 * 4)), _pairs(128))),
}


def layout_of(qtype: QuantType) -> CodeLayout:
    """UnsupportedTypeError for a type without one code per element."""
    if qtype.name not in LAYOUTS:
        known = ", ".join(LAYOUTS)
        raise UnsupportedTypeError(f"type {qtype}: expected one whose codes can be replaced: {known}. Choose one of these, or leave it.")
    return LAYOUTS[qtype.name]


def codes(raw: Bytes, qtype: QuantType) -> Codes:
    """The code of every element, uint8 [n_blocks, block], 0 … top."""
    layout, blocks = layout_of(qtype), raw.reshape(-1, qtype.type_size)
    out, shift = np.zeros((len(blocks), layout.block), np.uint8), 0
    for part, (byte, by) in zip(layout.parts, layout.places, strict=True):
        out |= ((blocks[:, byte] >> by.astype(np.uint8)) & np.uint8((1 << part.bits) - 1)) << np.uint8(shift)
        shift += part.bits
    return out ^ np.uint8(layout.flipped)


def with_codes(raw: Bytes, new: Codes, qtype: QuantType) -> Bytes:
    """The same blocks with other codes, uint8 [n_blocks, block] each 0 … top → uint8 [n_bytes]."""
    layout, blocks = layout_of(qtype), raw.reshape(-1, qtype.type_size).copy()
    stored, shift = new.reshape(len(blocks), layout.block) ^ np.uint8(layout.flipped), 0
    for part, (byte, by) in zip(layout.parts, layout.places, strict=True):
        mask = np.uint8((1 << part.bits) - 1)
        for s in np.unique(by):  # elements of one shift have bytes of their own
            e = np.flatnonzero(by == s)
            kept = blocks[:, byte[e]] & ~np.uint8(int(mask) << int(s))
            blocks[:, byte[e]] = kept | (((stored[:, e] >> np.uint8(shift)) & mask) << np.uint8(s))
        shift += part.bits
    return blocks.reshape(-1)


def grid(raw: Bytes, qtype: QuantType) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(step, offset) of every element, float64 [n_blocks, block]: what codes 0 and top decode to, and the line between.

    Exact to the rounding of ggml's own decoding, which may multiply twice.
    """
    layout, n = layout_of(qtype), raw.size // qtype.type_size
    low, high = (
        decode(with_codes(raw, np.full((n, layout.block), c, np.uint8), qtype), qtype).reshape(n, layout.block).astype(np.float64)
        for c in (0, layout.top)
    )
    return (high - low) / layout.top, low


def supported() -> tuple[QuantType, ...]:
    """The types whose codes can be replaced."""
    return tuple(QTYPES[name] for name in LAYOUTS)
