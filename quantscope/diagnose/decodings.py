"""Wrong dequantizations, as engines have really had them.

    DECODINGS["k-scale-min"].wrong(raw, QTYPES["Q4_K"])     what an engine with that fault makes of these bytes

A fault changes the order of decoded elements, or what a field of a block means.  So each is made of the right decoder: elements are put in
another order, or the bytes of a field are changed before they are decoded.  Each row of ``DECODINGS`` says which types can have it.

Source: the bit layouts of ``dequantize_row_*`` in ggml-quants.c, drawn in ``quants/legacy.py``, ``k_quants.py``, ``i_quants.py`` and
``rare.py``; the faults of published ports of them (docs of RusTorch, October 2025: Q6_K elements in sequence).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantscope.errors import UnsupportedTypeError
from quantscope.qtypes import QTYPES, QuantType
from quantscope.quants import decode

Bytes: TypeAlias = NDArray[np.uint8]
Floats: TypeAlias = NDArray[np.float32]
Field: TypeAlias = slice  # bytes of a block

ONE, ZERO = 0x3C00, 0x0000  # float16: s eeeee mmmmmmmmmm

# First byte of the float16 scale of a block and, where it has one, of its float16 min (the mins' scale).  Not IQ1_M, whose scale is spread
# over four words.
SCALES: dict[str, tuple[int, ...]] = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q8_1": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ1_S": (0,),
    "IQ2_XXS": (0,),
    "IQ2_XS": (0,),
    "IQ2_S": (0,),
    "IQ3_XXS": (0,),
    "IQ3_S": (0,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
    "Q1_0": (0,),
    "Q2_0": (0,),
}
MINS = {name: slice(at[1], at[1] + 2) for name, at in SCALES.items() if len(at) == 2}
HIGH_BITS = {"Q5_0": slice(2, 6), "Q5_1": slice(4, 8), "Q5_K": slice(16, 48)}  # the fifth bits
K_SCALES = slice(4, 12)  # bits 7 and 6 of these bytes of Q4_K and Q5_K: the two high bits of scales and mins 4 … 7
WITH_MIN = {"Q4_0": "Q4_1", "Q5_0": "Q5_1"}  # the same layout with a float16 min behind the scale
Q6_K_SCALES = slice(192, 208)  # 16 signed bytes, one for 16 elements


@dataclass(frozen=True)
class Decoding:
    """One fault of a decoder.

    types: names of the types whose decoder can have it.  wrong: the bytes of whole blocks, uint8[n_blocks · type_size], and their type →
    float32[n_blocks · block_size] in the order of ``quants.decode``; the bytes are not changed.
    """

    name: str
    types: frozenset[str]
    wrong: Callable[[Bytes, QuantType], Floats]


def wrongly_decoded(raw: Bytes, qtype: QuantType, decoding: Decoding) -> Tensor:
    """What a decoder with this fault makes of the bytes of whole blocks: uint8[n_blocks · type_size] → float32[n_blocks · block_size].

    Raises UnsupportedTypeError where a decoder of this type cannot have the fault, BlockError when the bytes are no whole blocks.
    """
    if qtype.name not in decoding.types:
        raise UnsupportedTypeError(
            f"a decoder of {qtype} cannot have the fault {decoding.name}: expected one of {', '.join(sorted(decoding.types))}. The tensor "
            f"is stored in another type than the fault is about; `quantscope inspect FILE` lists the type of every tensor."
        )
    return torch.from_numpy(decoding.wrong(raw, qtype))


def _neighbours(parts: int, group: int, raw: Bytes, qtype: QuantType) -> Floats:
    """Element l of each of the equal parts of a group is written one behind the other: 0, group/parts, 2·group/parts, …, then 1, …"""
    x = decode(raw, qtype).reshape(-1, parts, group // parts)
    return np.ascontiguousarray(x.transpose(0, 2, 1)).reshape(-1)


def _half_block_order(raw: Bytes, qtype: QuantType) -> Floats:
    # byte j holds element j in its low and j + 16 in its high nibble; a fifth bit stays with its nibble
    return _neighbours(2, 32, raw, qtype)


def _cleared(field: dict[str, Field], raw: Bytes, qtype: QuantType) -> Floats:
    """A field of each block counts as zero."""
    blocks = _copied(raw, qtype)
    blocks[:, field[qtype.name]] = 0
    return decode(blocks.reshape(-1), qtype)


def _without_high_scale_bits(raw: Bytes, qtype: QuantType) -> Floats:
    # byte 0…3: H4 ssssss (scale 0…3)   byte 4…7: H4 mmmmmm (min 0…3)   byte 8…11: mmmm ssss (low 4 bits of min and scale 4…7)
    blocks = _copied(raw, qtype)
    blocks[:, K_SCALES] &= 0b0011_1111  # H4, the two high bits of scale and min 4…7, are lost
    return decode(blocks.reshape(-1), qtype)


def _without_offset(raw: Bytes, qtype: QuantType) -> Floats:
    """x = d · q: the nibbles of Q4_0 (Q5_0) are read as those of Q4_1 (Q5_1) whose min is zero."""
    blocks = raw.reshape(-1, qtype.type_size)
    no_min = np.zeros((len(blocks), 2), np.uint8)
    return decode(np.concatenate([blocks[:, :2], no_min, blocks[:, 2:]], axis=1).reshape(-1), QTYPES[WITH_MIN[qtype.name]])


def _q6_k_without_offset(raw: Bytes, qtype: QuantType) -> Floats:
    """x = (d · scale) · q, as d · (scale · (q − 32) + 32 · scale).

    d · scale and the sum have at most 24 bits: both ways there is one rounding, the last, of the same product.
    """
    steps = _with_scales(raw, qtype, (ONE,)).reshape(-1, 16, 16)  # scale · (q − 32), exact
    scales = raw.reshape(-1, qtype.type_size)[:, Q6_K_SCALES].view(np.int8)
    steps += np.float32(32) * scales[:, :, None]
    with np.errstate(invalid="ignore"):  # a damaged scale can be infinite
        return (steps.reshape(-1, 256) * _halves(raw, qtype, 0).astype(np.float32)).reshape(-1)


def _bf16_scales(raw: Bytes, qtype: QuantType) -> Floats:
    """The 16 bits of the scale (and of the min) are read as bfloat16, s eeeeeeee mmmmmmm, that is as the upper half of a float32.

    Such a value can be outside float16: the blocks are decoded with a scale of 1, which is exact, and multiplied with it.
    """
    n = len(SCALES[qtype.name])
    total = np.zeros((raw.size // qtype.type_size, qtype.block_size), np.float32)
    for k in range(n):
        unit = _with_scales(raw, qtype, tuple(ONE if k == j else ZERO for j in range(n))).reshape(total.shape)
        with np.errstate(over="ignore", invalid="ignore"):  # as in the engine, a damaged scale gives infinities
            total += unit * (_halves(raw, qtype, k).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return total.reshape(-1)


def _with_scales(raw: Bytes, qtype: QuantType, halves: tuple[int, ...]) -> Floats:
    """The blocks with the float16 bits ``halves`` as their scale (and min), decoded."""
    blocks = _copied(raw, qtype)
    for at, half in zip(SCALES[qtype.name], halves, strict=True):
        blocks[:, at : at + 2] = (half & 255, half >> 8)  # little endian
    return decode(blocks.reshape(-1), qtype)


def _halves(raw: Bytes, qtype: QuantType, k: int) -> NDArray[Any]:
    """float16[n_blocks, 1]: the scale (k = 0) or the min (k = 1) of each block."""
    at = SCALES[qtype.name][k]
    return np.ascontiguousarray(raw.reshape(-1, qtype.type_size)[:, at : at + 2]).view("<f2")


def _copied(raw: Bytes, qtype: QuantType) -> Bytes:
    return raw.reshape(-1, qtype.type_size).copy()


# fmt: off
_ROWS: tuple[tuple[str, frozenset[str], Callable[[Bytes, QuantType], Floats]], ...] = (
    ("nibble-order-q4_0", frozenset({"Q4_0", "Q4_1", "Q5_0", "Q5_1"}), _half_block_order),
    ("nibble-order-q4_k", frozenset({"Q4_K", "Q5_K"}),                 partial(_neighbours, 2, 64)),
    ("k-scale-min",       frozenset({"Q4_K", "Q5_K"}),                 _without_high_scale_bits),
    ("q6_k-order",        frozenset({"Q6_K"}),                         partial(_neighbours, 4, 128)),
    ("q6_k-offset",       frozenset({"Q6_K"}),                         _q6_k_without_offset),
    ("block-scale-bf16",  frozenset(SCALES),                           _bf16_scales),
    ("block-min-ignored", frozenset(MINS),                             partial(_cleared, MINS)),
    ("q5-high-bits",      frozenset(HIGH_BITS),                        partial(_cleared, HIGH_BITS)),
    ("q4_0-offset",       frozenset(WITH_MIN),                         _without_offset),
)
# fmt: on
DECODINGS: dict[str, Decoding] = {row[0]: Decoding(*row) for row in _ROWS}
