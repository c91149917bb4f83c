"""The searches behind the K types on torch tensors: scale (and offset) of all sub-blocks at once.

``x: float32 [size, N]``: element i of N sub-blocks in row i, as in ``k_fit.py``, whose functions these are, operation for operation;
formulas and sources are there.  What can be computed for all elements is one operation on [size, N]; only sums go row by row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantscope.quants.torch_exact import nan_as_zero, nearest, quotient, signed_peak, square_root, sum_in_order

TINY = 1e-15  # sub-blocks with max |x| below this count as zero


def fit_affine(x: Tensor, w: Tensor, top: int, steps: Sequence[float], use_magnitude: bool) -> tuple[Tensor, Tensor, Tensor]:
    """argmin over s, m ≤ 0 of Σ w·(s·l + m − x)², or Σ w·|s·l + m − x| with ``use_magnitude``; l ∈ 0 … top.

    x, w: [size, N].  Returns s and m, [N], and l, [size, N], all float32.
    """
    m, highest = x.amin(0).clamp_(max=0), x.amax(0)
    sum_w = sum_in_order(w)
    sum_wx = sum_in_order(w * x)
    inverse = quotient(top, highest - m)  # infinite where all x are one number ≤ 0: then s and all D are 0, and no proposal is kept
    s = quotient(1, inverse)
    error = _affine_error(x, w, affine_codes(x, inverse, m, top), s, m, use_magnitude)
    kept_inverse, kept_origin = inverse, m
    for t in steps:
        inverse = quotient(t, highest - m)
        codes = affine_codes(x, inverse, m, top)
        sum_wl, sum_wll, sum_wlx = _affine_sums(x, w, codes)
        D = sum_w * sum_wll - sum_wl * sum_wl
        new_s = (sum_w * sum_wlx - sum_wx * sum_wl) / D
        new_m = (sum_wll * sum_wx - sum_wl * sum_wlx) / D
        positive = new_m > 0
        new_s = torch.where(positive, sum_wlx / sum_wll, new_s)
        new_m = torch.where(positive, 0.0, new_m)
        new_error = _affine_error(x, w, codes, new_s, new_m, use_magnitude)
        better = (D > 0) & (new_error < error)
        error = torch.where(better, new_error, error)
        kept_inverse, kept_origin = torch.where(better, inverse, kept_inverse), torch.where(better, m, kept_origin)
        s, m = torch.where(better, new_s, s), torch.where(better, new_m, m)
    return s, m, affine_codes(x, kept_inverse, kept_origin, top)


def fit_symmetric(x: Tensor, half: int, steps: Sequence[float]) -> tuple[Tensor, Tensor]:
    """argmin over s of Σ x²·(s·l − x)², l ∈ −half … half − 1, the peak (x of greatest magnitude) on the negative side.

    x: [size, N].  Returns s, [N], and l + half, [size, N], float32; both are 0 where max |x| < TINY.
    """
    peak = signed_peak(x, 0)
    kept_inverse = quotient(-half, peak)
    sum_lx, sum_ll = _symmetric_sums(x, symmetric_codes(x, kept_inverse, half))
    s = sum_lx / sum_ll  # NaN where all x are 0
    best = s * sum_lx
    for t in steps:
        inverse = quotient(-t, peak)
        sum_lx, sum_ll = _symmetric_sums(x, symmetric_codes(x, inverse, half))
        better = sum_lx * sum_lx > best * sum_ll
        s = torch.where(better, sum_lx / sum_ll, s)
        best = torch.where(better, s * sum_lx, best)
        kept_inverse = torch.where(better, inverse, kept_inverse)
    zero = peak.abs() < TINY
    codes = symmetric_codes(x, kept_inverse, half) + half
    return torch.where(zero, 0.0, s), torch.where(zero, 0.0, codes)


def fit_by_coordinate(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """As ``fit_symmetric``, improving one code at a time in five sweeps."""
    peak = signed_peak(x, 0)
    codes = symmetric_codes(x, quotient(-half, peak), half)
    sum_lx, sum_ll = _symmetric_sums(x, codes)
    for i in [*range(len(x))] * 5:
        code = codes[i]
        w = x[i] * x[i]
        new_lx = sum_lx - w * x[i] * code
        new_ll = sum_ll - w * code * code
        usable = new_lx > 0
        new = nearest(x[i] * new_ll / new_lx).clamp_(-half, half - 1).float()
        new_lx = new_lx + w * x[i] * new
        new_ll = new_ll + w * new * new
        better = (new_ll > 0) & (new_lx * new_lx * sum_ll > sum_lx * sum_lx * new_ll)
        accept = usable & (new != code) & better
        codes[i] = torch.where(accept, new, code)
        sum_lx, sum_ll = torch.where(accept, new_lx, sum_lx), torch.where(accept, new_ll, sum_ll)
    zero = peak.abs() < TINY
    s = torch.where(sum_ll > 0, sum_lx / sum_ll, 0.0)
    return torch.where(zero, 0.0, s), torch.where(zero, 0.0, codes + half)


def affine_codes(x: Tensor, inverse: Tensor, origin: Tensor, top: int) -> Tensor:
    """clamp(round(inverse·(x − origin)), 0, top)."""
    return nearest(inverse * (x - origin)).clamp_(0, top).float()


def symmetric_codes(x: Tensor, inverse: Tensor, half: int) -> Tensor:
    """clamp(round(inverse·x), −half, half − 1)."""
    return nearest(inverse * x).clamp_(-half, half - 1).float()


def recode_affine(x: Tensor, d: Tensor, dmin: Tensor, top: int, codes: Tensor) -> Tensor:
    """clamp(round((x + dmin)/d), 0, top); ``codes`` where d is 0."""
    return torch.where(d == 0, codes, nearest((x + dmin) / d).clamp_(0, top).float())


def recode_symmetric(x: Tensor, d: Tensor, half: int, codes: Tensor) -> Tensor:
    """half + clamp(round(x/d), −half, half − 1); ``codes`` where d is 0."""
    return torch.where(d == 0, codes, nearest(x / d).clamp_(-half, half - 1).float() + half)


def code_scales_affine(scales: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """round(top/max·scale) mod 256, uint8 [..., k], and d = max/top, float16 [...]; scales: [..., k], zeros where none is above 0."""
    largest = torch.where(scales > 0, scales, 0.0).amax(-1)  # not the NaNs
    inverse = quotient(top, largest)[..., None]  # infinite where that is 0: then every product is NaN or −∞, whose low byte is 0
    return nearest(inverse * scales).to(torch.uint8), quotient(largest, top).half()


def code_scales_symmetric(scales: Tensor, half: int, offset: int) -> tuple[Tensor, Tensor]:
    """clamp(round(−half/peak·scale), −half, half − 1) + offset mod 256, uint8 [n, k], and d = −peak/half, float16 [n, 1].

    scales: [n, k]; both are 0 where all of them are.
    """
    peak = signed_peak(nan_as_zero(scales), 1)[:, None]
    inverse = quotient(-half, peak)
    codes = nearest(inverse * scales).clamp_(-half, half - 1) + offset
    zero = peak == 0
    return codes.to(torch.uint8).masked_fill_(zero, 0), quotient(1, inverse).masked_fill_(zero, 0).half()


def magnitudes(x: Tensor) -> Tensor:
    """Weights of Q2_K: |x|."""
    return x.abs()


def rms_and_magnitudes(x: Tensor) -> Tensor:
    """Weights of Q4_K and Q5_K: √(Σx²/size) + |x|, the sum over the elements of a sub-block."""
    return square_root(quotient(sum_in_order(x * x), len(x))) + x.abs()


def _affine_sums(x: Tensor, w: Tensor, codes: Tensor) -> Tensor:
    """Σwl, Σwl² and Σwlx, [3, N]."""
    wl = w * codes
    return sum_in_order(torch.stack([wl, wl * codes, wl * x], 1))


def _affine_error(x: Tensor, w: Tensor, codes: Tensor, s: Tensor, m: Tensor, use_magnitude: bool) -> Tensor:
    """Σ w·(s·l + m − x)² or Σ w·|s·l + m − x|."""
    difference = s * codes + m - x
    return sum_in_order(w * (difference.abs() if use_magnitude else difference * difference))


def _symmetric_sums(x: Tensor, codes: Tensor) -> Tensor:
    """Σx³l and Σx²l², [2, N]."""
    w = x * x
    return sum_in_order(torch.stack([w * x * codes, w * codes * codes], 1))
