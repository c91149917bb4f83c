"""Float32 operations on torch tensors that give the same bits on every device, in the order in which ggml's C code computes.

One torch operation is one rounding only for +, −, · and tensor / tensor; what is not, has its function here:

    number / tensor         torch multiplies with the reciprocal                            quotient
    tensor / number         so does it on CUDA                                              quotient
    √x                      torch's on the CPU is off by one last bit in a tenth or more    square_root
    a sum along an axis     any order, on CUDA another one than on the CPU                  sum_in_order
    NaN                     its bits differ between CPU and CUDA                            nearest
    min and max             of zeros of both signs either one                               first_of

Each operation is a kernel of its own, so that no compiler can contract ``a * b + c`` into one rounding; torch's operations of three
operands (addcmul, lerp ...) do, and are not used.
"""

from __future__ import annotations

import torch
from torch import Tensor


def quotient(a: Tensor | float, b: Tensor | float) -> Tensor:
    """a / b, rounded once; one of them is a tensor.  A number must be a float32."""
    if not isinstance(a, Tensor):
        assert isinstance(b, Tensor)
        return b.new_full((), a) / b
    return a / (b if isinstance(b, Tensor) else a.new_full((), b))


def square_root(x: Tensor) -> Tensor:
    """√x, rounded once: in float64, then to float32.  No root of a float32 is within 2⁻⁵¹ of half way between two of them."""
    return x.double().sqrt().float()


def sum_in_order(terms: Tensor) -> Tensor:
    """(((0 + t₀) + t₁) + t₂) …: float32 [n, ...] → [...]."""
    total = torch.zeros_like(terms[0])
    for term in terms.unbind():
        total += term
    return total


def nan_as_zero(v: Tensor) -> Tensor:
    """NaN → 0; infinities stay."""
    return v.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)


def nearest(v: Tensor) -> Tensor:
    """The integer nearest to v, ties to even, for |v| ≤ 2²² − 1; NaN → 0; float32 → int32.

    Adding 1.5·2²³ shifts the integer into the low mantissa bits, and the float unit rounds:

        bit  31 30......23 22....................0
             s  exponent   2²² + round(v)

    Outside that range the result is these bits all the same: ggml clamps them, and infinity becomes the smallest code.
    """
    shifted = nan_as_zero(v).add_(12582912.0)
    return shifted.view(torch.int32).bitwise_and(0x7FFFFF).sub_(0x400000)


def round_half_away(v: Tensor) -> Tensor:
    """C's ``roundf``: the integer nearest to v, halves away from zero; float32."""
    whole = v.trunc()
    rest = v - whole  # exact
    return whole + (rest >= 0.5).float() - (rest <= -0.5).float()


def first_of(x: Tensor, wanted: Tensor, dim: int) -> Tensor:
    """Along ``dim``, the first x that is ``wanted`` (bool, one at least); without that axis."""
    at = wanted.to(torch.uint8).argmax(dim, keepdim=True)  # of equal ones the first
    return x.gather(dim, at).squeeze(dim)


def signed_peak(x: Tensor, dim: int) -> Tensor:
    """Along ``dim``, the first x of greatest magnitude, with its sign; +0 where all are zero.  x: no NaN."""
    magnitude = x.abs()
    return first_of(x, magnitude == magnitude.amax(dim, keepdim=True), dim) + 0.0  # −0 + 0 = +0
