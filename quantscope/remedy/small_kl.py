"""The KL divergence of nearly equal distributions, without the cancellation of log p − log q.

    KL(p‖q) = log Σ p·e^(−c) = log(1 + Σ p·(e^(−c) − 1 + c)),   d = z − z',  c = d − Σ p·d,  p = softmax(z)

z, z': logits of the original and of the other model.  A shift of all logits leaves c as it is, Σ p·c = 0, and every term of the last sum
is ≥ 0 and of second order: float32 is enough for divergences of 10⁻⁹ nats, where a difference of log-probabilities is all rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor


def small_kl(ref: Tensor, test: Tensor) -> Tensor:
    """KL divergence in nats of each position: logits [...,V] twice → [...]; float32 or float64 as they are."""
    p = torch.softmax(ref, -1)  # [...,V]
    c = ref - test  # [...,V]
    c -= torch.einsum("...v,...v->...", p, c)[..., None]
    excess = torch.expm1(-c).add_(c)  # [...,V], ≥ 0
    return torch.log1p(torch.einsum("...v,...v->...", p, excess).clamp_min_(0))
