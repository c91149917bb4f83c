"""Activations as ggml's CPU code rounds them before a product with a block type: Q8_0, Q8_1 and Q8_K, as codes and scales.

    x ≈ d · code, |code| ≤ 127

The scale of 32 elements is rounded to float16 (Q8_0, Q8_1), that of 256 (Q8_K) is not.  Codes are rounded half to even, as the SIMD code of
every machine does; ``quantize_row_q8_0_ref``, which writes files, rounds half away from zero.
Source: ``quantize_row_q8_*`` in ggml-cpu/arch/x86/quants.c, ``quantize_row_q8_K_ref`` in ggml-quants.c.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantscope.quants.kernel import as_float, float_to_half, half_to_float, inline, kernel
from quantscope.quants.simd import Lanes, absolute, bits_of, f32
from quantscope.quants.simd_bytes import largest, load_f32, round_half_even, store_i16, to_i32, total
from quantscope.quants.tiles import ROW_STEP

F32 = np.float32


@dataclass(frozen=True)
class Activations:
    """Rounded activations of T rows, filled up with zeros to R = ⌈T/4⌉·4 rows.

    codes: int16 [R,K].  scales: float32 [R,n], one for K/n elements.  sums: Q8_1: d · Σ code of 32 elements, rounded to float16, as float32
    [R,K/32]; Q8_K: Σ code of 16 elements, int16 [R,K/16]; Q8_0 has none, [R,0].
    """

    n_rows: int
    codes: NDArray[np.int16]
    scales: NDArray[np.float32]
    sums: NDArray[Any]


def round_activations(x: NDArray[np.float32], kind: str) -> Activations:
    """x float32 [T,K] rounded to ``kind``: "Q8_0", "Q8_1" (K a multiple of 32) or "Q8_K" (of 256)."""
    n_rows, K = x.shape
    padded = -(-n_rows // ROW_STEP) * ROW_STEP
    codes = np.zeros((padded, K), np.int16)
    scales = np.zeros((padded, K // (256 if kind == "Q8_K" else 32)), np.float32)
    x = np.ascontiguousarray(x)
    if kind == "Q8_K":
        sums: NDArray[Any] = np.zeros((padded, K // 16), np.int16)
        _round_q8_k(x, codes, scales[:n_rows].reshape(-1), sums)
    else:
        sums = np.zeros((padded, K // 32 if kind == "Q8_1" else 0), np.float32)
        _round_q8(x, codes, scales[:n_rows].reshape(-1), sums.reshape(-1))
    return Activations(n_rows, codes, scales, sums)


@kernel
def _round_q8(x: Any, codes: Any, scales: Any, sums: Any) -> None:
    """d = peak / 127, code = x · (127 / peak) of 32 elements; d is stored as float16, the codes come from the unrounded peak."""
    for i in range(scales.size):
        low, high = load_f32(x, i * 32), load_f32(x, i * 32 + 16)
        peak = as_float(np.uint32(max(_peak(low), _peak(high))))
        d = F32(peak / F32(127))
        inverse = f32(F32(127) / peak) if peak > F32(0) else f32(0.0)
        low_codes, high_codes = to_i32(round_half_even(low * inverse)), to_i32(round_half_even(high * inverse))
        store_i16(codes, i * 32, low_codes)
        store_i16(codes, i * 32 + 16, high_codes)
        scales[i] = half_to_float(float_to_half(d))
        if sums.size:
            sums[i] = half_to_float(float_to_half(F32(d * F32(total(low_codes + high_codes)))))


@kernel
def _round_q8_k(x: Any, codes: Any, scales: Any, sums: Any) -> None:
    """code = x · (127 / peak), d = 1 / (127 / peak) of 256 elements.

    ggml's codes and scale have the opposite sign where the element of greatest magnitude is positive; every product is the same.
    """
    out = sums.reshape(-1)
    for i in range(scales.size):
        peak = np.int32(0)
        for j in range(0, 256, 16):
            peak = max(peak, _peak(load_f32(x, i * 256 + j)))
        if peak == 0:
            continue  # codes, scale and sums are zeros
        inverse = F32(F32(127) / as_float(np.uint32(peak)))
        for j in range(0, 256, 16):
            q = to_i32(round_half_even(load_f32(x, i * 256 + j) * f32(inverse)))
            store_i16(codes, i * 256 + j, q)
            out[(i * 256 + j) >> 4] = np.int16(total(q))
        scales[i] = F32(F32(1) / inverse)


@inline
def _peak(v: Lanes) -> np.int32:
    """The bits of the greatest magnitude of 16 numbers: bits order magnitudes."""
    return np.int32(largest(bits_of(absolute(v))))
