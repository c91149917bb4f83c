"""What the output distribution feels of a change of one matrix: inputs and gradients of a layer, and the KL divergence they predict.

    KL ≈ ½ E (Σₛ gₛ·ΔW xₛ)²         g: gradient of Σₜ log p(yₜ) at the matrix's output, yₜ drawn from the model's own p

The sum is over the positions s of a chunk of text, E over chunks and draws.  Written out, half the terms of the square are noise.  So the
positions' common input μ (the chunk's mean) is taken with all cross terms, and what is left of each input without:

    (Σₛ gₛ·ΔW μ)² + Σₛ (gₛ·ΔW (xₛ − μ))²

Both parts are matrix products for any ΔW once Σ g, μ and some rows of g and x − μ are kept.  n rows are drawn with the probabilities
πₛ ∝ ‖gₛ‖²·‖xₛ − μ‖² and divided by √(n πₛ), which leaves the sum what it is on average.

Source: the Fisher information of a softmax, KL ≈ ½ δzᵀ (diag p − p pᵀ) δz; sampled labels as in Kunstner et al. 2019 (arXiv:1905.12558).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from quantscope.arch.config import ModelConfig
from quantscope.model.arithmetic import Arithmetic
from quantscope.model.forward import Ropes, layer
from quantscope.model.ops import scaled_and_shifted


class Products(Arithmetic):
    """The exact operations; keeps (x, x·Wᵀ) of every matrix by local name, "attn_q"."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[Tensor, Tensor]] = {}

    def linear(self, x: Tensor, w: Mapping[str, Tensor], name: str, *, scale_last: bool = False) -> Tensor:
        y = F.linear(x, w[f"{name}.weight"])  # [B,T,out]
        self.found[name] = x.detach(), y
        return scaled_and_shifted(y, w, name, scale_last=scale_last)


def back_through(
    h: Tensor, grad: Tensor, w: Mapping[str, Tensor], i: int, config: ModelConfig, rope: Ropes
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Layer i computed again and differentiated: its input h and the gradient at its output, [B,T,E] each.

    Returns the gradient at h, [B,T,E], and by local name ("attn_q") what each matrix multiplies and the gradient at its product,
    [B,T,in] and [B,T,out].
    """
    products = Products()
    with torch.enable_grad():
        h = h.detach().requires_grad_()
        out = layer(h, w, i, config, rope, m=products)
    at_h, *at_products = torch.autograd.grad(out, [h, *(y for _, y in products.found.values())], grad)
    return at_h, {name: (x, g) for (name, (x, _)), g in zip(products.found.items(), at_products, strict=True)}


def from_head(x: Tensor, log_p: Callable[[Tensor], Tensor], draw: torch.Generator) -> Tensor:
    """The gradient of Σ log p(y) at x, labels y drawn from p.  log_p: x → log-probabilities [n,V]."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        log = log_p(x)
        labels = torch.multinomial(log.detach().exp().cpu(), 1, generator=draw).to(log.device)
        (grad,) = torch.autograd.grad(log.gather(-1, labels).sum(), x)
    return grad


@dataclass(frozen=True)
class Probe:
    """What is kept of a matrix on a text of ``n_tokens``: see the head of this file.

    mean: μ [C,in]; total: Σ g [C,out]; x, g: the drawn rows of x − μ, [n,in], and of g, [n,out], the latter divided by √(n π).
    """

    mean: Tensor
    total: Tensor
    x: Tensor
    g: Tensor
    n_tokens: int

    def kl(self, change: Tensor) -> float:
        """Predicted KL divergence in nats per token when ``change`` [out,in] is added to the matrix."""
        common = (self.total * (self.mean @ change.T)).sum(-1)  # [C]
        own = (self.g * (self.x @ change.T)).sum(-1)  # [n]
        return float(common.double().square().sum() + own.double().square().sum()) / (2 * self.n_tokens)


def probe(x: Tensor, g: Tensor, n: int, draw: torch.Generator) -> Probe:
    """Of the inputs x [C,T,in] and gradients g [C,T,out] of some chunks; n rows are drawn, or all taken where there are no more."""
    mean, total, n_tokens = x.mean(1), g.sum(1), x.shape[0] * x.shape[1]
    x, g = (x - mean[:, None]).flatten(0, 1), g.flatten(0, 1)  # [C·T,in], [C·T,out]
    if n < n_tokens:
        size = x.double().square().sum(-1) * g.double().square().sum(-1)  # [C·T]
        share = size / size.sum() if float(size.sum()) > 0 else torch.full_like(size, 1 / n_tokens)
        rows = torch.multinomial(share, n, replacement=True, generator=draw)
        x, g = x[rows], g[rows] / (n * share[rows]).sqrt().to(g.dtype)[:, None]
    return Probe(mean, total, x, g, n_tokens)


def joined(parts: Sequence[Probe]) -> Probe:
    """One probe of all chunks from those of some each."""
    return Probe(
        mean=torch.cat([p.mean for p in parts]),
        total=torch.cat([p.total for p in parts]),
        x=torch.cat([p.x for p in parts]),
        g=torch.cat([p.g for p in parts]),
        n_tokens=sum(p.n_tokens for p in parts),
    )
