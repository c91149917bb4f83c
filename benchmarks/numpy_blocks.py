"""Blocks → float32 written from the bit layouts, with the mistakes that engines make in them as parameters.

    WRONG[cause, type](blocks uint8 [n, bytes of a block])  →  float32 [n, elements of a block]

With its defaults each function is right.  Source of the layouts: the ``block_*`` structs of ggml-common.h and ``dequantize_row_*`` in
ggml-quants.c.  Where elements are put in a wrong order, each keeps its own scale and high bit: only its place is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

Array: TypeAlias = Any  # a numpy array: what its operators return is typed too loosely to say more
Decoder: TypeAlias = Callable[[Array], Array]
ScalesAndMins: TypeAlias = Callable[[Array], tuple[Array, Array]]

F32 = np.float32
NIBBLE_SHIFTS = np.array([0, 4], np.uint8)


def f16(raw: Array) -> Array:
    """Two bytes → float32 [n,1], as the file means them."""
    return np.ascontiguousarray(raw).view(np.float16).astype(F32)


def bf16(raw: Array) -> Array:
    """The same two bytes as the upper half of a float32."""
    return (np.ascontiguousarray(raw).view(np.uint16).astype(np.uint32) << 16).view(F32)


def nibbles(qs: Array, neighbours: bool) -> Array:
    """[n,b] → [n,2b]: all low nibbles, then all high ones; or low and high of each byte beside one another."""
    both = (qs[:, None, :] >> NIBBLE_SHIFTS[:, None]) & 15  # [n,2,b]
    return _placed(both, neighbours)


def _placed(parts: Array, neighbours: bool) -> Array:
    """[n,parts,m] → [n,parts·m]: one part after the other, or element by element from all parts."""
    return (parts.swapaxes(1, 2) if neighbours else parts).reshape(len(parts), -1)


def fifth_bits(qh: Array, neighbours: bool, seen: bool) -> Array:
    """qh:4 → [n,32], 16 or 0: bit j belongs to element j."""
    bits = np.unpackbits(qh, axis=1, bitorder="little")  # [n,32]
    return _placed(bits.reshape(-1, 2, 16), neighbours).astype(F32) * (16 if seen else 0)


def q4_0(b: Array, half: Decoder = f16, neighbours: bool = False, offset: int = 8) -> Array:
    """d:2 qs:16, d · (q − 8)."""
    return half(b[:, :2]) * (nibbles(b[:, 2:], neighbours).astype(F32) - offset)


def q4_1(b: Array, half: Decoder = f16, neighbours: bool = False, minimum: bool = True) -> Array:
    """d:2 m:2 qs:16, d · q + m."""
    return half(b[:, :2]) * nibbles(b[:, 4:], neighbours).astype(F32) + half(b[:, 2:4]) * minimum


def q5_0(b: Array, half: Decoder = f16, neighbours: bool = False, high: bool = True, offset: int = 16) -> Array:
    """d:2 qh:4 qs:16, d · (q − 16)."""
    q = nibbles(b[:, 6:], neighbours) + fifth_bits(b[:, 2:6], neighbours, high)
    return half(b[:, :2]) * (q - offset)


def q5_1(b: Array, half: Decoder = f16, neighbours: bool = False, high: bool = True, minimum: bool = True) -> Array:
    """d:2 m:2 qh:4 qs:16, d · q + m."""
    q = nibbles(b[:, 8:], neighbours) + fifth_bits(b[:, 4:8], neighbours, high)
    return half(b[:, :2]) * q + half(b[:, 2:4]) * minimum


def q8_0(b: Array, half: Decoder = f16) -> Array:
    """d:2 qs:32, d · q."""
    return half(b[:, :2]) * b[:, 2:].view(np.int8).astype(F32)


def q2_k(b: Array, half: Decoder = f16, minimum: bool = True) -> Array:
    """scales:16 qs:64 d:2 dmin:2, d · (scale & 15) · q − dmin · (scale >> 4): 16 sub-blocks of 16."""
    scales, qs, d, dmin = b[:, :16], b[:, 16:80], half(b[:, 80:82]), half(b[:, 82:84])
    q = (qs.reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3  # [n,2,4,32]
    y = (d * (scales & 15))[..., None] * q.reshape(-1, 16, 16).astype(F32) - (dmin * (scales >> 4) * minimum)[..., None]
    return y.reshape(-1, 256)


def q3_k(b: Array, half: Decoder = f16) -> Array:
    """hmask:32 qs:64 scales:12 d:2.  The package decodes it with d = 1 (0x3C00), to be multiplied here."""
    unit = np.concatenate([b[:, :108], np.broadcast_to(np.array([0x00, 0x3C], np.uint8), (len(b), 2))], axis=1)
    return half(b[:, 108:110]) * dequantize(unit, GGMLQuantizationType.Q3_K)


def six_bits(s: Array) -> tuple[Array, Array]:
    """scales:12 → scales and mins of the eight sub-blocks, [n,8] each.

    s[0:4]: top two bits of sc4-7 | sc0-3    s[4:8]: top two bits of m4-7 | m0-3    s[8:12]: low four bits of m4-7 | of sc4-7
    """
    top = (s[:, :8] >> 6) << 4
    scales = np.concatenate([s[:, :4] & 63, (s[:, 8:] & 15) | top[:, :4]], axis=1)
    return scales, np.concatenate([s[:, 4:8] & 63, (s[:, 8:] >> 4) | top[:, 4:]], axis=1)


def four_of_six_bits(s: Array) -> tuple[Array, Array]:
    """``six_bits`` without the top two bits of sub-blocks 4-7."""
    scales, mins = six_bits(s)
    low = np.array([63] * 4 + [15] * 4, np.uint8)
    return scales & low, mins & low


def q4_k(b: Array, half: Decoder = f16, neighbours: bool = False, minimum: bool = True, unpack: ScalesAndMins = six_bits) -> Array:
    """d:2 dmin:2 scales:12 qs:128, d · scale · q − dmin · min: each 32 bytes are two sub-blocks, low nibbles and high nibbles."""
    q = nibbles(b[:, 16:].reshape(-1, 32), False).reshape(-1, 8, 32)  # [n,8,32]
    y = _scaled(b, q.astype(F32), half, minimum, unpack)
    return _placed(y.reshape(-1, 2, 32), neighbours).reshape(-1, 256)


def q5_k(
    b: Array,
    half: Decoder = f16,
    neighbours: bool = False,
    high: bool = True,
    minimum: bool = True,
    unpack: ScalesAndMins = six_bits,
) -> Array:
    """d:2 dmin:2 scales:12 qh:32 qs:128, as Q4_K with bit s of qh[l] as the fifth bit of element l in sub-block s."""
    q = nibbles(b[:, 48:].reshape(-1, 32), False).reshape(-1, 8, 32)  # [n,8,32]
    fifth = (b[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & 1  # [n,8,32]
    y = _scaled(b, q.astype(F32) + 16 * F32(high) * fifth, half, minimum, unpack)
    return _placed(y.reshape(-1, 2, 32), neighbours).reshape(-1, 256)


def _scaled(b: Array, q: Array, half: Decoder, minimum: bool, unpack: ScalesAndMins) -> Array:
    scales, mins = unpack(b[:, 4:16])
    return (half(b[:, :2]) * scales)[..., None] * q - (half(b[:, 2:4]) * mins * F32(minimum))[..., None]  # [n,8,32]


def q6_k(b: Array, half: Decoder = f16, sequence: bool = False, offset: int = 32) -> Array:
    """ql:128 qh:64 scales:16 d:2, d · scale · (q − 32).

    In each half of 128: q = nibble | two bits of qh[l] << 4, for l, l+32 (low nibbles of ql), l+64, l+96 (high nibbles).
    """
    low = nibbles(b[:, :128].reshape(-1, 64), False).reshape(-1, 2, 4, 32)  # [n,2,4,32]
    top = (b[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3  # [n,2,4,32]
    scales = half(b[:, 208:210]) * b[:, 192:208].view(np.int8)  # [n,16]
    y = (low | (top << 4)).reshape(-1, 16, 16).astype(F32) - offset
    return _placed((y * scales[..., None]).reshape(-1, 4, 32), sequence).reshape(-1, 256)


RIGHT: dict[str, Decoder] = {
    "Q4_0": q4_0, "Q4_1": q4_1, "Q5_0": q5_0, "Q5_1": q5_1, "Q8_0": q8_0,
    "Q2_K": q2_k, "Q3_K": q3_k, "Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k,
}  # fmt: skip
# cause → (the types that can have it, the parameter)
MISTAKES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "nibble-order-q4_0": (("Q4_0", "Q4_1", "Q5_0", "Q5_1"), {"neighbours": True}),
    "nibble-order-q4_k": (("Q4_K", "Q5_K"), {"neighbours": True}),
    "k-scale-min": (("Q4_K", "Q5_K"), {"unpack": four_of_six_bits}),
    "q6_k-order": (("Q6_K",), {"sequence": True}),
    "q6_k-offset": (("Q6_K",), {"offset": 0}),
    "block-scale-bf16": (tuple(RIGHT), {"half": bf16}),
    "block-min-ignored": (("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K"), {"minimum": False}),
    "q5-high-bits": (("Q5_0", "Q5_1", "Q5_K"), {"high": False}),
    "q4_0-offset": (("Q4_0", "Q5_0"), {"offset": 0}),
}
WRONG: dict[tuple[str, str], Decoder] = {
    (cause, name): partial(RIGHT[name], **mistake) for cause, (names, mistake) in MISTAKES.items() for name in names
}


def decode_rows(rows: Array, type_name: str, decoder: Decoder) -> Array:
    """The rows of a tensor as the reader gives them, uint8 [...,bytes] → float32 [...,elements]."""
    n_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]][1]
    return decoder(rows.reshape(-1, n_bytes)).astype(F32, copy=False).reshape(*rows.shape[:-1], -1)


def mistakes_of(type_name: str) -> Iterator[str]:
    """The causes that a file with this type can have."""
    return (cause for cause, name in WRONG if name == type_name)
