"""What best gives a product's outputs from other inputs than it was trained on: closed forms over sums of the inputs' products.

    y = W·x in the original,  ŷ = Ŵ·x̂ + b in the corrected model;  sums over tokens:  A = Σ x·xᵀ,  C = Σ x·x̂ᵀ,  H = Σ x̂·x̂ᵀ

    target      W* = W·(C + λI)·(H + λI)⁻¹                       which W gives y from x̂
    bias        b* = mean(W·x − Ŵ·x̂)                             which constant is missing
    gain        (ŴᵀŴ ∘ H)·g = diag(Ŵᵀ·W·C)                       which factors g of the channels of x̂, the norm weight's change
    error       Σ‖y − ŷ‖² = tr(W·A·Wᵀ) − 2·tr(W·C·Ŵᵀ) + tr(Ŵ·H·Ŵᵀ) − 2·bᵀ(W·Σx − Ŵ·Σx̂) + n·‖b‖²

Sources: targets from the original's activations: QEP (Arai and Ichikawa 2025, arXiv:2504.09629), GPTAQ (arXiv:2504.02692); bias: Nagel et
al. 2019 (arXiv:1906.04721); norm weights: norm tweaking (Li et al. 2023, arXiv:2309.02784), here by least squares instead of gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

RIDGE = 0.05  # λ: of the mean of the diagonal

Product: TypeAlias = tuple[Tensor, Tensor]  # (W, Ŵ), float64 [out,in]


@dataclass
class Sums:
    """Over the n inputs of a product in both models: A, C, H [in,in] and Σx, Σx̂ [in], all float64."""

    original: Tensor
    mixed: Tensor
    own: Tensor
    mean: Tensor
    own_mean: Tensor
    n: int

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> Sums:
        """x: inputs in the original, y: in the corrected model, [T,in] each."""
        x, y = x.double(), y.double()
        return cls(x.T @ x, x.T @ y, y.T @ y, x.sum(0), y.sum(0), len(x))

    def __iadd__(self, other: Sums) -> Sums:
        for name in ("original", "mixed", "own", "mean", "own_mean"):
            getattr(self, name).add_(getattr(other, name))
        self.n += other.n
        return self

    def scaled(self, x: Tensor, y: Tensor) -> Sums:
        """The sums of inputs whose channels are multiplied by x [in] in the original and by y [in] in the corrected model."""
        return Sums(
            self.original * x[:, None] * x,
            self.mixed * x[:, None] * y,
            self.own * y[:, None] * y,
            self.mean * x,
            self.own_mean * y,
            self.n,
        )

    @property
    def importance(self) -> Tensor:
        """mean x² of each channel in the original, float64 [in]."""
        return self.original.diagonal() / self.n


def target(w: Tensor, s: Sums) -> Tensor:
    """W*, float64 [out,in]."""
    ridge = _ridge(s.own)
    found: Tensor = torch.linalg.solve(s.own + ridge, (w @ (s.mixed + ridge)).T).T  # H is symmetric
    return found


def bias(product: Product, s: Sums) -> Tensor:
    """b*, float64 [out]."""
    w, v = product
    return (w @ s.mean - v @ s.own_mean) / s.n


def gain(products: Sequence[Product], s: Sums) -> Tensor:
    """g, float64 [in], of all products that read the same inputs; the ridge draws it to 1."""
    normal, right = torch.zeros_like(s.own), torch.zeros_like(s.own_mean)
    for w, v in products:
        normal += (v.T @ v) * s.own
        right += (v * (w @ s.mixed - v @ s.own)).sum(0)
    step: Tensor = torch.linalg.solve(normal + _ridge(normal), right)
    return 1 + step


def product_error(products: Sequence[Product], s: Sums, b: Tensor | None = None) -> float:
    """Σ‖W·x − Ŵ·x̂ − b‖², summed over the products and the inputs."""
    total = 0.0
    for w, v in products:
        total += float(((w @ s.original) * w).sum() - 2 * ((w @ s.mixed) * v).sum() + ((v @ s.own) * v).sum())
        if b is not None:
            total += float(s.n * b @ b - 2 * b @ (w @ s.mean - v @ s.own_mean))
    return total


def _ridge(gram: Tensor) -> Tensor:
    return RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
