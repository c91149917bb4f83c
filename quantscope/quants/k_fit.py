"""The searches behind the K types: scale (and offset) of a sub-block, sixteen sub-blocks side by side.

Every function here takes ``x: float32[n, 16]``, element i of sixteen sub-blocks in row i, and follows ggml's scalar order of operations
in every lane, so the results are the same bits (see ``simd.py``).  Branches of the scalar program become masks; lanes that would have
left early go on computing and are masked out.  All arithmetic is float32.  Source: ``make_qkx2_quants``, ``make_qx_quants`` and
``make_q3_quants`` in ggml-quants.c, without importance matrix.
"""

from __future__ import annotations

from typing import Any

from quantscope.quants.kernel import inline
from quantscope.quants.simd import Lanes, absolute, any_lane, bits_of, f32, i32, load, negative, store, to_f32, where

TINY = 1e-15  # sub-blocks with max |x| below this count as zero


@inline
def nearest(v: Lanes) -> Lanes:
    """The integer nearest to v, ties to even, for |v| ≤ 2²² − 1; int32.

    Adding 1.5·2²³ shifts the integer into the low mantissa bits, and the float unit rounds:

        bit  31 30......23 22....................0
             s  exponent   2²² + round(v)

    Outside that range (and for NaN) the result is these bits all the same, and ggml clamps it, so they must not become "infinity → top".
    """
    return (bits_of(v + f32(12582912.0)) & i32(0x7FFFFF)) - i32(0x400000)


@inline
def clamped(v: Lanes, low: int, high: int) -> Lanes:
    v = where(v < i32(low), i32(low), v)
    return where(v > i32(high), i32(high), v)


@inline
def affine_codes(x: Lanes, inverse: Lanes, origin: Lanes, top: int) -> Lanes:
    """clamp(round(inverse·(x − origin)), 0, top); int32."""
    return clamped(nearest(inverse * (x - origin)), 0, top)


@inline
def symmetric_codes(x: Lanes, inverse: Lanes, half: int) -> Lanes:
    """clamp(round(inverse·x), −half, half − 1); int32."""
    return clamped(nearest(inverse * x), -half, half - 1)


@inline
def fit_affine(x: Any, w: Any, codes: Any, top: int, steps: Any, use_magnitude: bool) -> Any:
    """argmin over s, m ≤ 0 of Σ w·(s·l + m − x)², or Σ w·|s·l + m − x| with ``use_magnitude``; l ∈ 0 … top.

    Every step t of ``steps`` proposes the codes l = clamp(round(t/(max x − m)·(x − m)), 0, top), for which weighted least squares gives
    (sums over the sub-block, W = Σw, D = W·Σwl² − (Σwl)²)

        s = (W·Σwlx − Σwx·Σwl)/D        m = (Σwl²·Σwx − Σwl·Σwlx)/D        or, where that m > 0:  m = 0, s = Σwlx/Σwl²

    A proposal with a smaller error is kept, and the next step then starts from its m.
    x, w: float32[n, 16]; codes: float32[n, 16], receives l.  Returns s (0 where all x are one number ≤ 0) and m.
    Source: ``make_qkx2_quants``.
    """
    n = x.shape[0]
    m, highest, sum_w, sum_wx = _range_and_sums(x, w)
    m = where(m > f32(0), f32(0), m)
    inverse = f32(top) / (highest - m)  # infinite where all x are one number ≤ 0: then s and all D are 0, and no proposal is kept
    s = f32(1) / inverse
    for i in range(n):
        store(codes, i, to_f32(affine_codes(load(x, i), inverse, m, top)))
    error = _affine_error(x, w, codes, s, m, use_magnitude)
    kept_inverse, kept_origin = inverse, m
    for t in steps:
        inverse = f32(t) / (highest - m)
        sum_wl, sum_wll, sum_wlx = _propose(x, w, codes, inverse, m, top)
        D = sum_w * sum_wll - sum_wl * sum_wl
        new_s = (sum_w * sum_wlx - sum_wx * sum_wl) / D
        new_m = (sum_wll * sum_wx - sum_wl * sum_wlx) / D
        positive = new_m > f32(0)
        new_s = where(positive, sum_wlx / sum_wll, new_s)
        new_m = where(positive, f32(0), new_m)
        new_error = _affine_error(x, w, codes, new_s, new_m, use_magnitude)
        better = (D > f32(0)) & (new_error < error)  # noqa: SIM300 (not a constant)
        error = where(better, new_error, error)
        kept_inverse, kept_origin = where(better, inverse, kept_inverse), where(better, m, kept_origin)
        s, m = where(better, new_s, s), where(better, new_m, m)
    for i in range(n):
        store(codes, i, to_f32(affine_codes(load(x, i), kept_inverse, kept_origin, top)))
    return s, m


@inline
def _range_and_sums(x: Any, w: Any) -> Any:
    """min x, max x, Σw, Σwx."""
    lowest = highest = load(x, 0)
    sum_w = load(w, 0)
    sum_wx = sum_w * lowest
    for i in range(1, x.shape[0]):
        xi, wi = load(x, i), load(w, i)
        lowest = where(xi < lowest, xi, lowest)
        highest = where(xi > highest, xi, highest)
        sum_w = sum_w + wi
        sum_wx = sum_wx + wi * xi
    return lowest, highest, sum_w, sum_wx


@inline
def _propose(x: Any, w: Any, codes: Any, inverse: Lanes, origin: Lanes, top: int) -> Any:
    """Writes the codes l; returns Σwl, Σwl², Σwlx."""
    sum_wl = sum_wll = sum_wlx = f32(0)
    for i in range(x.shape[0]):
        xi = load(x, i)
        code = to_f32(affine_codes(xi, inverse, origin, top))
        store(codes, i, code)
        wl = load(w, i) * code
        sum_wl = sum_wl + wl
        sum_wll = sum_wll + wl * code
        sum_wlx = sum_wlx + wl * xi
    return sum_wl, sum_wll, sum_wlx


@inline
def _affine_error(x: Any, w: Any, codes: Any, s: Lanes, m: Lanes, use_magnitude: bool) -> Lanes:
    """Σ w·(s·l + m − x)² or Σ w·|s·l + m − x|."""
    error = f32(0)
    for i in range(x.shape[0]):
        difference = s * load(codes, i) + m - load(x, i)
        error = error + load(w, i) * (absolute(difference) if use_magnitude else difference * difference)
    return error


@inline
def signed_peak(x: Any) -> Any:
    """The first x of greatest magnitude, and that magnitude."""
    peak = magnitude = f32(0)
    for i in range(x.shape[0]):
        xi = load(x, i)
        larger = absolute(xi) > magnitude
        magnitude = where(larger, absolute(xi), magnitude)
        peak = where(larger, xi, peak)
    return peak, magnitude


@inline
def fit_symmetric(x: Any, codes: Any, half: int, steps: Any) -> Lanes:
    """argmin over s of Σ x²·(s·l − x)², l ∈ −half … half − 1, the peak (x of greatest magnitude) on the negative side.

    Codes l = clamp(round(−t/peak·x), −half, half − 1) for t = half, then for every t of ``steps``; for given codes the best scale and
    the part of Σx⁴ it explains are

        s = Σx³l/Σx²l²        (Σx³l)²/Σx²l²    the larger the better, compared without dividing

    x: float32[n, 16]; codes: float32[n, 16], receives l + half.  Returns s.  Both are 0 where max |x| < TINY.
    Source: ``make_qx_quants`` with rmse_type = 1.
    """
    peak, magnitude = signed_peak(x)
    kept_inverse = f32(-half) / peak
    sum_lx, sum_ll = _symmetric_sums(x, kept_inverse, half)
    s = sum_lx / sum_ll  # NaN in lanes of zeros
    best = s * sum_lx
    for t in steps:
        inverse = negative(f32(t)) / peak
        sum_lx, sum_ll = _symmetric_sums(x, inverse, half)
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
def _symmetric_sums(x: Any, inverse: Lanes, half: int) -> Any:
    """Σx³l and Σx²l² for the codes of ``inverse``."""
    sum_lx = sum_ll = f32(0)
    for i in range(x.shape[0]):
        xi = load(x, i)
        code = to_f32(symmetric_codes(xi, inverse, half))
        w = xi * xi
        sum_lx = sum_lx + w * xi * code
        sum_ll = sum_ll + w * code * code
    return sum_lx, sum_ll


@inline
def fit_by_coordinate(x: Any, codes: Any, half: int) -> Lanes:
    """argmin over s and l of Σ x²·(s·l − x)², l ∈ −half … half − 1, one code at a time.

    Starts from l = clamp(round(−half/peak·x)); then up to five sweeps try, for one element after the other,

        l' = clamp(round(x·(Σx²l² − its share)/(Σx³l − its share)))        i.e. x/s with the scale the other elements want

    and keep l' where (Σx³l)²/Σx²l² grows.  A lane in which a sweep changes nothing stays as it is, so all stop together.
    x: float32[n, 16]; codes: float32[n, 16], receives l + half.  Returns s = Σx³l/Σx²l².  Both are 0 where max |x| < TINY.
    Source: ``make_q3_quants`` with do_rmse.
    """
    peak, magnitude = signed_peak(x)
    inverse = f32(-half) / peak
    sum_lx = sum_ll = f32(0)
    for i in range(x.shape[0]):
        xi = load(x, i)
        code = to_f32(symmetric_codes(xi, inverse, half))
        store(codes, i, code)
        w = xi * xi
        sum_lx = sum_lx + w * xi * code
        sum_ll = sum_ll + w * code * code
    for _ in range(5):
        sum_lx, sum_ll, changed = _sweep(x, codes, half, sum_lx, sum_ll)
        if not changed:
            break
    zero = magnitude < f32(TINY)
    for i in range(x.shape[0]):
        store(codes, i, where(zero, f32(0), load(codes, i) + f32(half)))
    s = where(sum_ll > f32(0), sum_lx / sum_ll, f32(0))
    return where(zero, f32(0), s)


@inline
def _sweep(x: Any, codes: Any, half: int, sum_lx: Lanes, sum_ll: Lanes) -> Any:
    """One pass of ``fit_by_coordinate``; returns the new sums and whether any code changed in any lane."""
    changed = False
    for i in range(x.shape[0]):
        xi, code = load(x, i), load(codes, i)
        w = xi * xi
        new_lx = sum_lx - w * xi * code
        new_ll = sum_ll - w * code * code
        usable = new_lx > f32(0)
        new = to_f32(clamped(nearest(xi * new_ll / new_lx), -half, half - 1))
        new_lx = new_lx + w * xi * new
        new_ll = new_ll + w * new * new
        better = (new_ll > f32(0)) & (new_lx * new_lx * sum_ll > sum_lx * sum_lx * new_ll)
        accept = usable & (new != code) & better
        store(codes, i, where(accept, new, code))
        sum_lx = where(accept, new_lx, sum_lx)
        sum_ll = where(accept, new_ll, sum_ll)
        changed = changed or any_lane(accept)
    return sum_lx, sum_ll, changed
