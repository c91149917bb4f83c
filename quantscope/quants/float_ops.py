"""exp, SwiGLU, softmax and RoPE in float32, operation by operation as ggml's AVX2 code does them.

Source: ``ggml_v_expf``, ``ggml_v_silu`` in ggml-cpu/vec.h, ``ggml_vec_soft_max_f32`` in vec.cpp, ``rotate_pairs`` in ops.cpp.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from quantscope.quants.kernel import inline, kernel
from quantscope.quants.simd import Lanes, absolute, any_lane, bits_of, f32, i32, negative, of_bits, where
from quantscope.quants.simd_bytes import lane, load_f32, multiply_add, store_f32, swap_1, swap_2, swap_4
from quantscope.quants.tiles import Floats, by_rows

F32 = np.float32
ROUND = float.fromhex("0x1.8p23")  # adding it rounds to a whole number, which the low bits of the sum hold
LOG2_E, LN_2_HIGH, LN_2_LOW = float.fromhex("0x1.715476p+0"), float.fromhex("0x1.62e4p-1"), float.fromhex("0x1.7f7d1cp-20")
# exp(b) − 1 ≈ C₁·b + C₂·b² + … for |b| ≤ ln 2 / 2
C1, C2, C3 = float.fromhex("0x1.ffffecp-1"), float.fromhex("0x1.fffdb6p-2"), float.fromhex("0x1.555e66p-3")
C4, C5 = float.fromhex("0x1.573e2ep-5"), float.fromhex("0x1.0e4020p-7")
ONE_BITS, LARGE_BITS, SMALL_BITS = np.int32(0x3F800000), np.int32(0x7F000000), np.int32(0x82000000 - (1 << 32))


@inline
def exp(x: Lanes) -> Lanes:
    """eˣ = 2ⁿ · eᵇ, n the whole number nearest to x · log₂ e; 0 below −103.97, infinity above 88.38."""
    z = multiply_add(x, f32(LOG2_E), f32(ROUND))
    n = z - f32(ROUND)
    b = multiply_add(negative(n), f32(LN_2_LOW), multiply_add(negative(n), f32(LN_2_HIGH), x))
    e = bits_of(z) << i32(23)  # n in the exponent
    u = b * b
    j = multiply_add(multiply_add(f32(C5), b, f32(C4)), u, multiply_add(f32(C3), b, f32(C2)))
    j = multiply_add(j, u, f32(C1) * b)
    k = of_bits(e + i32(ONE_BITS))
    y = multiply_add(k, j, k)
    extreme = absolute(n) > f32(126.0)
    if any_lane(extreme):  # 2ⁿ in two factors, as its exponent does not fit
        g = where(n > f32(0.0), i32(0), i32(SMALL_BITS))
        s1, s2 = of_bits(g + i32(LARGE_BITS)), of_bits(e - g)
        y = where(extreme, multiply_add(s2, j, s2) * s1, y)
        y = where(absolute(n) > f32(192.0), s1 * s1, y)
    return y


def swiglu(gate: Floats, up: Floats) -> Floats:
    """gate / (1 + e^−gate) · up: float32 of one shape."""
    x, y = (np.pad(z.reshape(-1), (0, -z.size % 16)).reshape(-1, 16) for z in (gate, up))
    out = np.empty_like(x)
    by_rows(len(x), lambda a, b: _swiglu(x[a:b], y[a:b], out[a:b]))
    return out.reshape(-1)[: gate.size].reshape(gate.shape)


@kernel
def _swiglu(gate: Any, up: Any, out: Any) -> None:
    for i in range(0, gate.size, 16):
        x = load_f32(gate, i)
        store_f32(out, i, x / (f32(1.0) + exp(f32(0.0) - x)) * load_f32(up, i))


def softmax(scores: Floats, scale: float, n_past: int) -> None:
    """softmax(scale · scores) in place: float32 [n,T,S], S a multiple of 16; row t sees the scores 0 … n_past + t, the others become 0."""
    T = scores.shape[1]
    flat = scores.reshape(-1, scores.shape[2])
    by_rows(len(flat), lambda a, b: _softmax(flat[a:b], a, T, n_past, F32(scale)))


@kernel
def _softmax(scores: Any, first: int, T: int, n_past: int, scale: Any) -> None:
    """The sum is float64, of eight float32 numbers at a time."""
    for r in range(scores.shape[0]):
        seen = n_past + (first + r) % T + 1
        row = scores[r]
        greatest = F32(-np.inf)
        for s in range(seen):
            row[s] = F32(row[s] * scale)
            greatest = max(greatest, row[s])
        row[seen:] = F32(-np.inf)
        total = 0.0
        for s in range(0, seen, 16):
            y = exp(load_f32(row, s) - f32(greatest))
            store_f32(row, s, y)
            y = y + swap_4(y)
            y = y + swap_2(y)
            y = y + swap_1(y)
            total = (total + np.float64(lane(y, 0))) + np.float64(lane(y, 8))
        row[(seen + 15) // 16 * 16 :] = F32(0)
        factor = f32(F32(1.0 / total))
        for s in range(0, seen, 16):
            store_f32(row, s, load_f32(row, s) * factor)


def cos_sin(angles: Floats) -> tuple[Floats, Floats]:
    """cos and sin of float32 numbers, rounded as the C library's ``cosf`` and ``sinf`` round."""
    cos, sin = np.empty_like(angles), np.empty_like(angles)
    _cos_sin(angles.reshape(-1), cos.reshape(-1), sin.reshape(-1))
    return cos, sin


@kernel
def _cos_sin(angles: Any, cos: Any, sin: Any) -> None:
    for i in range(angles.size):
        cos[i], sin[i] = math.cos(angles[i]), math.sin(angles[i])
