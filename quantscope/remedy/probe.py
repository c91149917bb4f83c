"""What the output distribution feels of a change of one matrix: inputs and gradients of a layer, and the KL divergence they predict.

    KL ≈ ½ E (Σₛ gₛ·ΔW xₛ)²         g: gradient of Σₜ log p(yₜ) at the matrix's output, yₜ drawn from the model's own p

The sum is over the positions s of a chunk of text, E over chunks and draws.  Written out, half the terms of the square are noise.  So the
positions' common input μ (the chunk's mean) is taken with all cross terms, and what is left of each input without:

    (Σₛ gₛ·ΔW μ)² + Σₛ (gₛ·ΔW (xₛ − μ))²

Both parts are matrix products for any ΔW once Σ g, μ and some rows of g and x − μ are kept.  n rows are drawn with the probabilities
πₛ ∝ ‖gₛ‖²·‖xₛ − μ‖² and divided by √(n πₛ), which leaves the sum what it is on average.

A stack of experts is one such matrix with rows of several kinds: each expert e has its own ΔWₑ, the mean μ of the inputs that it gets from
a chunk, and its part of both sums.  The choice of the experts is taken as it is.

Source: the Fisher information of a softmax, KL ≈ ½ δzᵀ (diag p − p pᵀ) δz; sampled labels as in Kunstner et al. 2019 (arXiv:1905.12558).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from quantscope.arch.config import ModelConfig
from quantscope.model.arithmetic import Arithmetic
from quantscope.model.forward import Ropes, layer
from quantscope.model.ops import expert_matrix, expert_scaled_and_shifted, scaled_and_shifted
from quantscope.model.taps import stem_of


class Product(NamedTuple):
    """What a matrix, or each of a stack of them, multiplies on B chunks of T tokens, and the gradient at what comes out.

    x: [n,in], g: [n,out]; chunk, expert: int64 [n], which chunk each row is of and which of n_expert matrices it goes through.
    """

    x: Tensor
    g: Tensor
    chunk: Tensor
    expert: Tensor
    n_chunk: int
    n_ctx: int
    n_expert: int = 1

    @classmethod
    def of(cls, x: Tensor, g: Tensor) -> Product:
        """Of one matrix, which every token goes through: [B,T,in], [B,T,out]."""
        n_chunk, n_ctx = x.shape[:2]
        chunk = torch.arange(n_chunk, device=x.device).repeat_interleave(n_ctx)
        return cls(x.flatten(0, 1), g.flatten(0, 1), chunk, torch.zeros_like(chunk), n_chunk, n_ctx)


class Products(Arithmetic):
    """The exact operations; keeps (x, x·Wᵀ) of every matrix by local name, "attn_q", and expert.  Also the tap that sees the choice."""

    def __init__(self) -> None:
        self.found: list[tuple[str, int, Tensor, Tensor]] = []
        self.chosen: Tensor | None = None  # int64 [B,T,n_used]

    def wants(self, name: str) -> bool:
        return stem_of(name) == "ffn_moe_topk"

    def __call__(self, name: str, x: Tensor, /) -> None:
        if self.wants(name):
            self.chosen = x

    def linear(self, x: Tensor, w: Mapping[str, Tensor], name: str, *, scale_last: bool = False) -> Tensor:
        y = F.linear(x, w[f"{name}.weight"])  # [B,T,out]
        self.found.append((name, 0, x.detach(), y))
        return scaled_and_shifted(y, w, name, scale_last=scale_last)

    def expert_linear(self, x: Tensor, w: Mapping[str, Tensor], name: str, e: int) -> Tensor:
        y = F.linear(x, expert_matrix(w, f"{name}.weight", e))  # [n,out]
        self.found.append((name, e, x.detach(), y))
        return expert_scaled_and_shifted(y, w, name, e)

    def products(self, grads: Sequence[Tensor], n_expert: int) -> dict[str, Product]:
        """By local name; grads: at each of ``found``."""
        made, parts = dict[str, Product](), dict[str, list[tuple[int, Tensor, Tensor]]]()
        for (name, e, x, _), g in zip(self.found, grads, strict=True):
            if x.ndim == 3:
                made[name] = Product.of(x, g)
            else:
                parts.setdefault(name, []).append((e, x, g))
        return made | {name: self._stacked(rows, n_expert) for name, rows in parts.items()}

    def _stacked(self, parts: Sequence[tuple[int, Tensor, Tensor]], n_expert: int) -> Product:
        """The experts' rows one after the other, each expert's in the order of the tokens that chose it."""
        assert self.chosen is not None
        n_chunk, n_ctx, _ = self.chosen.shape
        chunk = [(self.chosen == e).any(-1).flatten().nonzero()[:, 0] // n_ctx for e, _, _ in parts]
        expert = [torch.full_like(at, e) for at, (e, _, _) in zip(chunk, parts, strict=True)]
        x, g = torch.cat([x for _, x, _ in parts]), torch.cat([g for _, _, g in parts])
        return Product(x, g, torch.cat(chunk), torch.cat(expert), n_chunk, n_ctx, n_expert)


def back_through(
    h: Tensor, grad: Tensor, w: Mapping[str, Tensor], i: int, config: ModelConfig, rope: Ropes
) -> tuple[Tensor, dict[str, Product]]:
    """Layer i computed again and differentiated: its input h and the gradient at its output, [B,T,E] each.

    Returns the gradient at h, [B,T,E], and by local name ("attn_q") what each matrix multiplies and the gradient at its product.
    """
    seen = Products()
    with torch.enable_grad():
        h = h.detach().requires_grad_()
        out = layer(h, w, i, config, rope, seen, m=seen)
    at_h, *at_products = torch.autograd.grad(out, [h, *(y for *_, y in seen.found)], grad)
    return at_h, seen.products(at_products, config.experts.n_expert if config.experts else 1)


def from_head(x: Tensor, log_p: Callable[[Tensor], Tensor], draw: torch.Generator) -> Tensor:
    """The gradient of Σ log p(y) at x, labels y drawn from p.  log_p: x → log-probabilities [n,V]."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        log = log_p(x)
        labels = torch.multinomial(log.detach().exp().cpu(), 1, generator=draw).to(log.device)
        (grad,) = torch.autograd.grad(log.gather(-1, labels).sum(), x)
    return grad


@dataclass(frozen=True)
class Felt:
    """What a change of one matrix does to log p on the text: (Σ g)·ΔW μ of each chunk, float64 [C], and Σ (g·ΔW (x − μ))²."""

    common: Tensor
    own: float

    def __add__(self, other: Felt) -> Felt:
        return Felt(self.common + other.common, self.own + other.own)


@dataclass(frozen=True)
class Probe:
    """What is kept of a matrix, or of a stack of X of them, on a text of ``n_tokens``: see the head of this file.

    mean: μ [C,X,in]; total: Σ g [C,X,out]; reached: int64 [X] how many rows each has; x, g: the drawn rows of x − μ, [n,in], and of g,
    [n,out], the latter divided by √(n π); expert: int64 [n].
    """

    mean: Tensor
    total: Tensor
    reached: Tensor
    x: Tensor
    g: Tensor
    expert: Tensor
    n_tokens: int

    def kl(self, change: Tensor) -> float:
        """Predicted KL divergence in nats per token when ``change`` [out,in] is added to the matrix."""
        return self.kl_of(self.felt(change))

    def felt(self, change: Tensor, e: int = 0) -> Felt:
        """Of ``change`` [out,in] in matrix e alone; those of several are added up."""
        mine = self.expert == e
        common = (self.total[:, e] * (self.mean[:, e] @ change.T)).sum(-1)  # [C]
        own = (self.g[mine] * (self.x[mine] @ change.T)).sum(-1)  # [n of e]
        return Felt(common.double(), float(own.double().square().sum()))

    def nothing(self) -> Felt:
        """Of no change."""
        return Felt(self.mean.new_zeros(len(self.mean), dtype=torch.float64), 0.0)

    def kl_of(self, felt: Felt) -> float:
        """Predicted KL divergence in nats per token."""
        return float(felt.common.square().sum() + felt.own) / (2 * self.n_tokens)


def probe(p: Product, n: int, draw: torch.Generator) -> Probe:
    """Of a matrix's inputs and gradients on some chunks; n rows are drawn, or all taken where there are no more."""
    cells = p.n_chunk, p.n_expert
    at = p.chunk * p.n_expert + p.expert  # [rows] which of the C·X cells
    counts = torch.bincount(at, minlength=p.n_chunk * p.n_expert)  # [C·X]
    mean = _summed(p.x, at, len(counts)) / counts.clamp(min=1)[:, None]
    total = _summed(p.g, at, len(counts))
    x, g, expert = p.x - mean[at], p.g, p.expert
    if n < len(x):
        size = x.double().square().sum(-1) * g.double().square().sum(-1)  # [rows]
        share = size / size.sum() if float(size.sum()) > 0 else torch.full_like(size, 1 / len(x))
        rows = torch.multinomial(share, n, replacement=True, generator=draw)
        x, g, expert = x[rows], g[rows] / (n * share[rows]).sqrt().to(g.dtype)[:, None], expert[rows]
    return Probe(mean.reshape(*cells, -1), total.reshape(*cells, -1), counts.reshape(cells).sum(0), x, g, expert, p.n_chunk * p.n_ctx)


def _summed(x: Tensor, at: Tensor, n: int) -> Tensor:
    """Sums of the rows of x [rows,m] that go to each of n cells: [n,m]."""
    return x.new_zeros(n, x.shape[-1]).index_add_(0, at, x)


def joined(parts: Sequence[Probe]) -> Probe:
    """One probe of all chunks from those of some each."""

    def cat(field: str) -> Tensor:
        return torch.cat([getattr(p, field) for p in parts])

    reached, n_tokens = torch.stack([p.reached for p in parts]).sum(0), sum(p.n_tokens for p in parts)
    return Probe(cat("mean"), cat("total"), reached, cat("x"), cat("g"), cat("expert"), n_tokens)
