"""The searches behind encoding with importance: what an error in a column costs, and the scale that costs least.

    v_i = a_i · √(σ² + x_i²)        a: importance of the column, σ²: mean square of the row, or (twice) of the super-block

Weights ``v`` then stand where the search without importance has its own (``k_fit.fit_affine``, ``fit_weighted`` below), and once more,
summed over a sub-block, where the scales of the sub-blocks are rounded (``fit_scales``).
Source: ``make_qx_quants`` with qw, ``make_qp_quants`` and ``quantize_row_*_impl`` in ggml-quants.c; bit-identical.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quantscope.quants.k_fit import TINY, signed_peak, symmetric_codes
from quantscope.quants.k_search import nearest_int
from quantscope.quants.kernel import inline
from quantscope.quants.simd import Lanes, f32, load, negative, square_root, store, to_f32, where

F32 = np.float32


@inline
def sum_of_squares(x: Any) -> np.float32:
    """Σx² of float32[n], one element after the other."""
    total = F32(0)
    for i in range(x.size):
        total = F32(total + F32(x[i] * x[i]))
    return total


@inline
def weigh(x: Any, importance: Any, mean_square: Any, weights: Any) -> Lanes:
    """weights = importance·√(mean_square + x²); returns their sum in every lane.  All float32[n, 16], mean_square: float32[1, 16]."""
    sum_w = f32(0)
    for i in range(x.shape[0]):
        xi = load(x, i)
        w = load(importance, i) * square_root(load(mean_square, 0) + xi * xi)
        store(weights, i, w)
        sum_w = sum_w + w
    return sum_w


@inline
def fit_weighted(x: Any, w: Any, codes: Any, half: int, steps: Any) -> Lanes:
    """argmin over s of Σ w·(s·l − x)², l ∈ −half … half − 1, the peak (x of greatest magnitude) on the negative side.

    As ``k_fit.fit_symmetric``, which has w = x²:  s = Σwxl/Σwl²,  (Σwxl)²/Σwl² the larger the better.
    x, w: float32[n, 16]; codes: float32[n, 16], receives l + half.  Returns s.  Both are 0 where max |x| < TINY.
    """
    peak, magnitude = signed_peak(x)
    kept_inverse = f32(-half) / peak
    sum_lx, sum_ll = _sums(x, w, kept_inverse, half)
    s = where(sum_ll != f32(0), sum_lx / sum_ll, f32(0))
    best = s * sum_lx
    for t in steps:
        inverse = negative(f32(t)) / peak
        sum_lx, sum_ll = _sums(x, w, inverse, half)
        better = sum_lx * sum_lx > best * sum_ll
        s = where(better, sum_lx / sum_ll, s)
        best = where(better, s * sum_lx, best)
        kept_inverse = where(better, inverse, kept_inverse)
    zero = magnitude < f32(TINY)
    for i in range(x.shape[0]):
        code = to_f32(symmetric_codes(load(x, i), kept_inverse, half)) + f32(half)
        store(codes, i, where(zero, f32(0), code))
    return where(zero, f32(0), s)


@inline
def _sums(x: Any, w: Any, inverse: Lanes, half: int) -> Any:
    """Σwxl and Σwl² for the codes of ``inverse``."""
    sum_lx = sum_ll = f32(0)
    for i in range(x.shape[0]):
        xi, wi = load(x, i), load(w, i)
        code = to_f32(symmetric_codes(xi, inverse, half))
        sum_lx = sum_lx + wi * xi * code
        sum_ll = sum_ll + wi * code * code
    return sum_lx, sum_ll


@inline
def fit_scales(scales: Any, weights: Any, top: int, codes: Any) -> np.float32:
    """argmin over d and l of Σ w·(d·l − scale)², l ≤ top: nine proposals for d, then up to five sweeps over the codes.

    scales, weights: float32[n]; codes: int64[n], receives l mod 256: a negative scale wraps, as in ggml.  Returns d = Σw·scale·l/Σw·l²,
    0 where no scale reaches TINY.  Source: ``make_qp_quants``.
    """
    largest = F32(0)
    for k in range(scales.size):
        largest = largest if largest > scales[k] else scales[k]  # C's macro MAX: a NaN is taken, then replaced
    if largest < F32(TINY):
        codes[:] = 0
        return F32(0)
    inverse = F32(top) / largest
    best = _error(scales, weights, inverse, 0x7FFFFFFF, 0xFF)
    for step in range(-4, 5):
        if step != 0:
            proposal = F32(F32(F32(0.1) * F32(step)) + F32(top)) / largest
            error = _error(scales, weights, proposal, top, -1)
            if error < best:
                best, inverse = error, proposal
    sum_lx = sum_ll = F32(0)
    for k in range(scales.size):
        code = min(top, nearest_int(inverse * scales[k]))
        codes[k] = code & 0xFF
        sum_lx = F32(sum_lx + F32(F32(weights[k] * scales[k]) * F32(code)))
        sum_ll = F32(sum_ll + F32(F32(weights[k] * F32(code)) * F32(code)))
    for _ in range(5):
        sum_lx, sum_ll, changed = _sweep(scales, weights, top, codes, sum_lx, sum_ll)
        if not changed:
            break
    return F32(sum_lx / sum_ll) if sum_ll > F32(0) else F32(0)


@inline
def _error(scales: Any, weights: Any, inverse: np.float32, top: int, mask: int) -> np.float32:
    """Σ w·(scale − l/inverse)² for l = min(top, round(inverse·scale)) & mask."""
    step = F32(1) / inverse
    error = F32(0)
    for k in range(scales.size):
        code = min(top, nearest_int(inverse * scales[k])) & mask
        difference = F32(scales[k] - F32(step * F32(code)))
        error = F32(error + F32(F32(weights[k] * difference) * difference))
    return error


@inline
def _sweep(scales: Any, weights: Any, top: int, codes: Any, sum_lx: np.float32, sum_ll: np.float32) -> Any:
    """Every code once to x/d with the d that the others want, where that explains more; the new sums, and whether a code changed."""
    changed = False
    for k in range(scales.size):
        x, w, code = scales[k], weights[k], F32(codes[k])
        lx = F32(sum_lx - F32(F32(w * x) * code))
        ll = F32(sum_ll - F32(F32(w * code) * code))
        if lx > F32(0) and ll > F32(0):
            new = min(top, nearest_int(F32(F32(x * ll) / lx)))
            if new != codes[k]:
                lx = F32(lx + F32(F32(w * x) * F32(new)))
                ll = F32(ll + F32(F32(w * F32(new)) * F32(new)))
                if F32(F32(lx * lx) * sum_ll) > F32(F32(sum_lx * sum_lx) * ll):
                    codes[k] = new & 0xFF
                    sum_lx, sum_ll = lx, ll
                    changed = True
    return sum_lx, sum_ll, changed
