"""Logits compared while they stream by: one pass over the vocabulary in slices, so that [n,V] logits of all members never exist.

With r the original's logits, x a member's, p = softmax(r), q = softmax(x), lse = ln Σ eˣ:

    KL(p ‖ q) = Σ p·(ln p − ln q) = Σ e^(r − m)·(r − x) / Σ e^(r − m)  −  (lse_r − lse_x)

An original whose log-probabilities come from a file, ln p = r, has lost those of the improbable tokens (r = −∞): the others are not
normalized again, and what is lost contributes nothing,  KL = Σ p·(r − x) + Σ p · lse_x.

m is the largest r so far; when it rises, the sums are scaled down (the online softmax of Milakov & Gimelshein 2018, arXiv:1805.02867).
All sums are float64: what is left of rounding is 10⁻¹⁵ of the logits' differences, far below what float32 logits carry.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantscope.logit_kernel import add_slice

TILE = 1 << 20  # logits that torch takes to float64 at a time: some 50 MB with all that is computed of them


class LogitSums:
    """n positions of M members, fed slice by slice of the vocabulary; the results are complete after the last slice.

    labels: int64 [n], the token that follows each position.  has_reference: member 0 is the original.  stored: its logits are
    log-probabilities from a file, whose rounding may make a divergence slightly negative.  A member's results depend on its
    own logits and the original's alone, bit for bit, and not on the number of threads.  Logits of −∞ are tokens of probability 0; NaN
    spreads to kl and log_p of its position.  On the CPU a numba kernel computes the sums, elsewhere torch.
    """

    def __init__(
        self,
        n: int,
        n_members: int,
        *,
        labels: Tensor | None,
        has_reference: bool,
        stored: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self.labels, self.has_reference, self.stored = labels, has_reference, stored
        shape = n_members, n
        self.largest = torch.full(shape, -torch.inf, dtype=torch.float64, device=device)  # m; NaN where a logit is NaN
        self.total = torch.zeros(shape, dtype=torch.float64, device=device)  # Σ e^(x − m)
        self.cross = torch.zeros(shape, dtype=torch.float64, device=device)  # Σ e^(r − m_r)·(r − x)
        self.label_logit = torch.full(shape, torch.nan, dtype=torch.float64, device=device)
        self.first_id = torch.zeros(shape, dtype=torch.int64, device=device)  # of the largest logit

    def add(self, v0: int, members: Sequence[Tensor]) -> None:
        """Logits [n,dv] of each member for the ids v0 … v0 + dv − 1; any float dtype.  Every id comes once, in rising order."""
        if self.labels is not None:
            for m, x in enumerate(members):
                self._label(m, x, v0)
        if members[0].device.type == "cpu":
            self._add_by_kernel(v0, members)
        else:
            self._add_by_torch(v0, members)

    def _label(self, m: int, x: Tensor, v0: int) -> None:
        assert self.labels is not None
        at = self.labels - v0
        inside = (at >= 0) & (at < x.shape[-1])
        value = x.gather(-1, at.clamp(0, x.shape[-1] - 1)[:, None])[:, 0].double()
        self.label_logit[m] = torch.where(inside, value, self.label_logit[m])

    def _add_by_kernel(self, v0: int, members: Sequence[Tensor]) -> None:
        add_slice(
            v0,
            [(x if x.dtype == torch.float64 else x.float()).detach().contiguous().numpy() for x in members],
            largest=self.largest.numpy(),
            total=self.total.numpy(),
            cross=self.cross.numpy(),
            top_id=self.first_id.numpy(),
            has_reference=self.has_reference,
        )

    def _add_by_torch(self, v0: int, members: Sequence[Tensor]) -> None:
        n, dv = members[0].shape
        step = max(1, TILE // dv)
        for a in range(0, n, step):
            rows = slice(a, min(a + step, n))
            r, weight, shrink = None, None, None
            for m, logits in enumerate(members):
                x = logits[rows].double()  # [t,dv]
                grown, e = self._exponentials(m, rows, x, v0)
                if self.has_reference and m == 0:
                    r, weight, shrink = x, e, grown
                elif r is not None and weight is not None and shrink is not None:
                    added = torch.where(weight == 0, 0.0, weight * (r - x)).sum(-1)  # p = 0 contributes nothing, whatever r − x
                    self.cross[m, rows] = torch.where(shrink == 0, 0.0, self.cross[m, rows] * shrink) + added

    def _exponentials(self, m: int, rows: slice, x: Tensor, v0: int) -> tuple[Tensor, Tensor]:
        """Include x [t,dv] in m, its id and Σ e^(x − m): by what factor the sums so far shrink, [t], and e^(x − m), [t,dv]."""
        before = self.largest[m, rows]
        value = x.amax(-1)
        largest = torch.maximum(before, value)  # NaN where either is
        first = (x == value[:, None]).to(torch.uint8).argmax(-1)
        self.first_id[m, rows] = torch.where(value > before, v0 + first, self.first_id[m, rows])  # of equal ones the earlier id
        shift = torch.where(largest == -torch.inf, 0.0, largest)  # as long as all were −∞
        grown, e = (before - shift).exp(), (x - shift[:, None]).exp_()
        self.total[m, rows] = self.total[m, rows] * grown + e.sum(-1)
        self.largest[m, rows] = largest
        return grown, e

    @property
    def lse(self) -> Tensor:
        """ln Σ eˣ of each member and position, float64 [M,n]."""
        return self.largest + self.total.log()

    @property
    def kl(self) -> Tensor:
        """KL(original ‖ member) [nats], float64 [M,n] ≥ 0 (rounding below zero is cut); the original's own row is 0."""
        lse = self.lse
        if self.stored:
            kl = self.cross * self.largest[0].exp() + self.mass * lse
        else:
            kl = (self.cross / self.total[0] - (lse[0] - lse)).clamp_(min=0)
        kl[0] = 0
        return kl

    @property
    def mass(self) -> Tensor:
        """Σ eʳ of a stored original, float64 [n]: 1 less the probability of the tokens it has lost."""
        return self.lse[0].exp()

    @property
    def top_id(self) -> Tensor:
        """The smallest id among the largest logits, int64 [M,n]; 0 where a logit is NaN, as ``metrics.first_argmax``."""
        return torch.where(self.largest.isnan(), 0, self.first_id)

    @property
    def same_top(self) -> Tensor:
        """Whether the largest logit is at the original's token, bool [M,n]."""
        return self.top_id == self.top_id[0]

    @property
    def log_p(self) -> Tensor:
        """ln q(label), float64 [M,n]."""
        return self.label_logit - self.lse
