"""How the inner loops are compiled, and the two conversions between float16 and float32 that they all share.

No fastmath: LLVM then neither fuses a·b + c into one rounding nor reorders a sum, and the result is that of ggml's C code, which
its build compiles as plain IEEE float32 in source order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

Function = Callable[..., Any]


def kernel(function: Function) -> Function:
    """Compile at the first call, release the GIL, keep the machine code on disk for the next process."""
    try:
        compiled: Function = numba.njit(function, nogil=True, error_model="numpy", cache=True)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written: compile in every process
        compiled = numba.njit(function, nogil=True, error_model="numpy")
    return compiled


def inline(function: Function) -> Function:
    """A part of kernels: compiled into each kernel that calls it, and kept on disk with it."""
    compiled: Function = numba.njit(function, error_model="numpy")
    return compiled


@inline
def as_float(bits: np.uint32) -> np.float32:
    """The float32 with these bits."""
    return np.uint32(bits).view(np.float32)


@inline
def as_bits(value: np.float32) -> np.uint32:
    """The bits of a float32."""
    return np.float32(value).view(np.uint32)


@inline
def half_to_float(half: np.uint32) -> np.float32:
    """The value of a float16's bits, exact, subnormals included; NaNs keep their payload and become quiet.

    half: 0 … 65535.  Source: IEEE 754-2008, binary16 and binary32.
    """
    # binary16: s eeeee mmmmmmmmmm (bias 15)          binary32: s eeeeeeee mmmmmmmmmmmmmmmmmmmmmmm (bias 127)
    magnitude = np.uint32(half & np.uint32(0x7FFF))
    sign = np.uint32((half & np.uint32(0x8000)) << np.uint32(16))
    bits = np.uint32((magnitude << np.uint32(13)) + np.uint32((127 - 15) << 23))
    if magnitude >= np.uint32(0x7C00):  # infinity or NaN: exponent 31 → 255
        bits = np.uint32(bits + np.uint32((127 - 15) << 23))
        if magnitude > np.uint32(0x7C00):
            bits = np.uint32(bits | np.uint32(1 << 22))
    if magnitude < np.uint32(0x0400):  # subnormal: m · 2⁻²⁴
        bits = as_bits(np.float32(magnitude) * np.float32(2.0**-24))
    return as_float(bits | sign)


@inline
def float_to_half(value: np.float32) -> np.uint32:
    """The float16 nearest to ``value``, ties to even, as bits 0 … 65535; infinity from 65520 on, every NaN → 0x7E00.

    Source: IEEE 754-2008, roundTiesToEven; the NaN is ggml's.
    """
    bits = as_bits(value)
    sign = np.uint32((bits >> np.uint32(16)) & np.uint32(0x8000))
    magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
    # normal: rebias the exponent, add half of the 13 bits that fall off (and the last kept bit, for ties), cut
    rebiased = np.uint32(magnitude - np.uint32((127 - 15) << 23))
    half = np.uint32((rebiased + np.uint32(0x0FFF) + ((rebiased >> np.uint32(13)) & np.uint32(1))) >> np.uint32(13))
    if magnitude < np.uint32((127 - 14) << 23):  # below 2⁻¹⁴: a multiple of 2⁻²⁴, which is the last bit of 0.5 … 1
        half = np.uint32(as_bits(as_float(magnitude) + np.float32(0.5)) - np.uint32(126 << 23))
    if magnitude >= np.uint32(0x477FF000):  # 65520, half way to 65536
        half = np.uint32(0x7C00)
    if magnitude > np.uint32(0x7F800000):
        half = np.uint32(0x7E00)
    return np.uint32(half | sign)


@inline
def read_u16(blocks: Any, i: int, at: int) -> np.uint32:
    """Bytes ``at`` and ``at + 1`` of block i, little-endian."""
    return np.uint32(np.uint32(blocks[i, at]) | np.uint32(np.uint32(blocks[i, at + 1]) << np.uint32(8)))


@inline
def read_u32(blocks: Any, i: int, at: int) -> np.uint32:
    """Four bytes of block i from ``at`` on, little-endian."""
    return np.uint32(read_u16(blocks, i, at) | np.uint32(read_u16(blocks, i, at + 2) << np.uint32(16)))


@inline
def read_half(blocks: Any, i: int, at: int) -> np.float32:
    """The float16 in bytes ``at`` and ``at + 1`` of block i."""
    return half_to_float(read_u16(blocks, i, at))


@inline
def write_u16(out: Any, i: int, at: int, word: np.uint32) -> None:
    """The low 16 bits of ``word`` into bytes ``at`` and ``at + 1`` of block i, little-endian."""
    out[i, at] = np.uint8(word & np.uint32(0xFF))
    out[i, at + 1] = np.uint8((word >> np.uint32(8)) & np.uint32(0xFF))


@inline
def write_u32(out: Any, i: int, at: int, word: np.uint32) -> None:
    """``word`` into four bytes of block i from ``at`` on, little-endian."""
    write_u16(out, i, at, word)
    write_u16(out, i, at + 2, word >> np.uint32(16))


@inline
def write_half(out: Any, i: int, at: int, value: np.float32) -> None:
    """``value`` as float16 into bytes ``at`` and ``at + 1`` of block i."""
    write_u16(out, i, at, float_to_half(value))


@kernel
def all_finite(bits: Any) -> bool:
    """True where no float32 among ``bits`` (uint32[n]) is NaN or infinite: an exponent of all ones makes the greatest magnitudes."""
    greatest = np.uint32(0)
    for i in range(bits.size):
        magnitude = np.uint32(bits[i] & np.uint32(0x7FFFFFFF))
        greatest = np.uint32(max(greatest, magnitude))
    return bool(greatest < np.uint32(0x7F800000))
