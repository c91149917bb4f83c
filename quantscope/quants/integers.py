"""Blocks as ggml multiplies them: whole numbers and, apart from them, the scales.

    weight = d · code − dmin · minimum        code and minimum int16, d and dmin float32

The codes of a block are what its decoder gives when the block's scale is 1.  So a copy of the block gets 1 for its scale (4 or 8 where the
format has quarters or eighths of it) and 0 for its minimum, and the decoder of the type does the rest.  A code includes the scale of its
sub-block, where that is an integer; none exceeds 2¹², so that the sum of 256 products with 8-bit activations stays below 2²⁸.

Source: ``ggml_vec_dot_*`` in ggml-cpu/quants.c, the table ``type_traits_cpu`` in ggml-cpu.c.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from quantscope.qtypes import QuantType, qtype
from quantscope.quants import decode

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Take = Callable[[Bytes], Floats]  # blocks uint8 [n,type_size], changed in place → what was there, float32 [n,k]


@dataclass(frozen=True)
class Integers:
    """n blocks.  codes: int16 [n,block]; scales: float32 [n,units].

    The minima of the K types are int16 [n,16], one for 16 elements, with min_scales [n,1]; those of Q4_1 and Q5_1 are floats, one a block,
    and come as min_scales [n,1] alone: weight = d · code + min_scale.  shifts: of Q6_K, int16 [n,16], what was taken off the codes of 16
    elements so that they are signed.
    """

    codes: NDArray[np.int16]
    scales: Floats
    minima: NDArray[np.int16] | None = None
    min_scales: Floats | None = None
    shifts: NDArray[np.int16] | None = None


@dataclass(frozen=True)
class Layout:
    """How a type takes part in a product.

    activation: what activations are rounded to.  take_scale: takes the scales out of blocks and puts in what makes the values whole.
    min_at: byte of the float16 minimum, or of the scale of the minima.
    min_chains: how many chains the minima are added up in where rows are multiplied one by one.
    shift_at: 16 signed bytes from here on, times 32, are the shifts.
    interleaved: llama.cpp loads eight rows interleaved ("CPU_REPACK"), on a CPU with AVX2 and where the rows are a multiple of eight.
    """

    activation: str
    take_scale: Take
    min_at: int | None = None
    interleaved: bool = False
    shift_at: int | None = None
    min_chains: int = 1

    @property
    def has_integer_minima(self) -> bool:
        return self.min_at is not None and self.activation == "Q8_K"


def _half(at: int, parts: int = 1) -> Take:
    """A float16 in bytes ``at`` and ``at + 1``; ``parts`` takes its place, as the values are whole parts of the scale."""
    return lambda blocks: _take_half(blocks, at, parts) / np.float32(parts)


def _iq1_m(blocks: Bytes) -> Floats:
    """A float16 whose four nibbles are the high nibbles of the words from byte 48 on, the lowest first; 8 = 0x4800 takes its place."""
    high = blocks[:, 49:56:2]
    halves = ((high >> 4).astype(np.uint16) << np.array([0, 4, 8, 12], np.uint16)).sum(axis=1, dtype=np.uint16)
    high[:] = (high & 15) | np.array([0x00, 0x00, 0x80, 0x40], np.uint8)
    return halves.view(np.float16).astype(np.float32)[:, None] / np.float32(8)


def _mxfp4(blocks: Bytes) -> Floats:
    """2^(e − 128), e in byte 0; the codes are doubled values.  128 takes its place."""
    scales = np.ldexp(np.float32(1), blocks[:, :1].astype(np.int32) - 128)
    blocks[:, 0] = 128
    return scales.astype(np.float32)


def _nvfp4(blocks: Bytes) -> Floats:
    """Four scales of 16 elements, half of a UE4M3 each; 0x40 = 2 takes their place."""
    scales = _halves_of_ue4m3()[blocks[:, :4]]
    blocks[:, :4] = 0x40
    return scales


@cache
def _halves_of_ue4m3() -> Floats:
    """Half the value of every byte: what the decoder gives for the code 1."""
    blocks = np.full((64, 36), 0x11, np.uint8)
    blocks[:, :4] = np.arange(256, dtype=np.uint8).reshape(64, 4)
    return decode(blocks.reshape(-1), qtype("NVFP4"))[::16].copy()


# fmt: off
LAYOUTS: dict[str, Layout] = {
    "Q4_0":    Layout("Q8_0", _half(0), interleaved=True),
    "Q5_0":    Layout("Q8_0", _half(0)),
    "Q8_0":    Layout("Q8_0", _half(0)),
    "IQ4_NL":  Layout("Q8_0", _half(0), interleaved=True),
    "MXFP4":   Layout("Q8_0", _mxfp4, interleaved=True),
    "NVFP4":   Layout("Q8_0", _nvfp4),
    "Q1_0":    Layout("Q8_0", _half(0)),
    "Q2_0":    Layout("Q8_0", _half(0)),
    "Q4_1":    Layout("Q8_1", _half(0), min_at=2),
    "Q5_1":    Layout("Q8_1", _half(0), min_at=2),
    "Q2_K":    Layout("Q8_K", _half(80), min_at=82),
    "Q3_K":    Layout("Q8_K", _half(108)),
    "Q4_K":    Layout("Q8_K", _half(0), min_at=2, interleaved=True, min_chains=4),
    "Q5_K":    Layout("Q8_K", _half(0), min_at=2),
    "Q6_K":    Layout("Q8_K", _half(208), shift_at=192),
    "TQ1_0":   Layout("Q8_K", _half(52)),
    "TQ2_0":   Layout("Q8_K", _half(64)),
    "IQ1_S":   Layout("Q8_K", _half(0, parts=8)),
    "IQ1_M":   Layout("Q8_K", _iq1_m),
    "IQ2_XXS": Layout("Q8_K", _half(0, parts=8)),
    "IQ2_XS":  Layout("Q8_K", _half(0, parts=8)),
    "IQ2_S":   Layout("Q8_K", _half(0, parts=8)),
    "IQ3_XXS": Layout("Q8_K", _half(0, parts=4)),
    "IQ3_S":   Layout("Q8_K", _half(0)),
    "IQ4_XS":  Layout("Q8_K", _half(0)),
}
# fmt: on


def integers(blocks: Bytes, kind: QuantType) -> Integers:
    """Codes and scales of uint8 [n,type_size]; ``kind`` is a type of LAYOUTS."""
    layout, work = LAYOUTS[kind.name], blocks.copy()
    scales = layout.take_scale(work)
    if layout.min_at is None:
        at = layout.shift_at
        shifts = None if at is None else blocks[:, at : at + 16].view(np.int8) * np.int16(32)
        return Integers(_whole_numbers(work, kind), scales, shifts=shifts)
    min_scales = _take_half(work, layout.min_at, 0)
    codes = _whole_numbers(work, kind)
    if not layout.has_integer_minima:
        return Integers(codes, scales, min_scales=min_scales)
    _take_half(work, layout.min_at, -1)  # now the values are code + minimum
    return Integers(codes, scales, _whole_numbers(work, kind)[:, ::16] - codes[:, ::16], min_scales)


def _whole_numbers(blocks: Bytes, kind: QuantType) -> NDArray[np.int16]:
    """The decoded values, int16 [n,block]: whole numbers, now that the scales are."""
    values = torch.from_numpy(decode(blocks.reshape(-1), kind)).to(torch.int16)  # several times as fast as numpy's conversion
    whole: NDArray[np.int16] = values.numpy().reshape(len(blocks), kind.block_size)
    return whole


def _take_half(blocks: Bytes, at: int, value: float) -> Floats:
    """The float16 in bytes ``at`` and ``at + 1`` of each block, float32 [n,1]; ``value`` takes its place."""
    field = blocks[:, at : at + 2]
    taken = np.ascontiguousarray(field).view("<f2").astype(np.float32)
    field[:] = np.array([value], "<f2").view(np.uint8)
    return taken
