"""What one batch of a walk is read off for: statistics of every tap, the logits against the original's, the next token.

A batch becomes a *record*, named arrays that can be stored, sent and put together again:

    taps      float64 [M,K,N]  one summary vector (tap_stats) per member and tap
    kl        float64 [M,C,P]  KL divergence from the original at each scored position     where there is an original
    same_top  bool    [M,C,P]  the same most probable token                                where there is an original
    log_p     float64 [M,C,P]  ln probability of the token that follows                    of a text
    next      float64 [M,5]    the token after the first chunk: NEXT_FIELDS                 of the first batch
    choices   float64 [M,K,6]  the most probable tokens there: CHOICE_FIELDS                of the first batch
    likely    float64 [M,S,L,2]  id and probability of the most probable tokens            of its first S scored positions, likewise
    mass      float64 [1,C,P]  probability of the tokens that the base has kept             where the original is a base

C chunks, P scored positions each, M members, K taps in the order of ``tap_list``.  Where the original is a *base*, log-probabilities in a
file, it comes before the members as row 0 of everything, with nothing in taps and next: its weights are not here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantscope.arch.config import ModelConfig
from quantscope.logit_sums import LogitSums
from quantscope.metrics import first_argmax, rank
from quantscope.model.taps import EMBD, HEAD_TAPS, LAYER_TAPS
from quantscope.tap_stats import empty, fold, measure, merge

Record: TypeAlias = dict[str, NDArray[Any]]

NEXT_FIELDS = ("id", "logit", "rank", "rank_in_original", "prob")
CHOICE_FIELDS = ("id", "logit", "prob", "original_logit", "original_prob", "original_rank")  # the member's own k-th; of the original's k-th
N_CHOICES = 20
SHOWN = 400  # scored positions whose most probable tokens are kept, to be read one by one
N_LIKELY = 5
OF_THE_FIRST = ("next", "choices", "likely")  # batch alone
UNMEASURED = ("kq_soft_max",)  # [B,H,T,S]: too large to keep, and no signal with channels


def tap_list(config: ModelConfig) -> tuple[str, ...]:
    """The taps that are measured, in graph order; those an architecture lacks stay empty."""
    names = [name for name in LAYER_TAPS if name not in UNMEASURED]
    return (EMBD, *(f"{name}-{i}" for i in range(config.n_layer) for name in names), HEAD_TAPS[0])


class Base(Protocol):
    """Stored log-probabilities of the scored positions, which are counted from 0 in each chunk of the whole input."""

    def log_probs(self, chunk: NDArray[Any], position: NDArray[Any], ids: slice) -> Tensor:
        """ln p of these ids: [n] and [n] → float32 [n,v]; −∞ where it was not kept."""

    def log_p_of_labels(self, chunks: slice) -> NDArray[np.float64]:
        """ln p of the token that follows each scored position, [C,P]."""


class BatchMeter:
    """An Observer of one batch.

    ids: [C,T], ``chunk0`` is the number of the first row in the whole input.  Positions first … last − 1 of each row are scored; logits
    come for first … T − 1.  labelled: the token after each scored position counts.  has_reference: member 0 is the original.  base: what
    stands in for one that is no member.
    """

    def __init__(
        self,
        ids: Tensor,
        taps: Sequence[str],
        n_members: int,
        *,
        chunk0: int,
        first: int,
        last: int,
        has_reference: bool,
        labelled: bool,
        positions: Literal["all", "last"] = "all",
        base: Base | None = None,
    ) -> None:
        self.ids, self.chunk0, self.first, self.last, self.positions = ids, chunk0, first, last, positions
        self.base, self.lead = base, int(base is not None)  # rows before the members'
        self.n_rows, self.has_reference, self.labelled = self.lead + n_members, has_reference, labelled
        self.index = {name: k for k, name in enumerate(taps)}
        self.taps = self.index.keys()
        self.summaries = empty((self.n_rows, len(taps)))  # [M,K,N]
        self.n_positions = ids.shape[1] - first  # per chunk, that go through the head
        self.done: list[LogitSums] = []
        self.next: list[list[Tensor]] = []  # per slice of the vocabulary, the logits [v] of each member
        self.likely: list[tuple[LogitSums, Tensor, Likely]] = []  # per slice of positions; which of it

    def tap(self, member: int, name: str, ref: Tensor | None, x: Tensor, chunk: int) -> None:
        position0 = 0
        if self.positions == "last":
            position0 = x.shape[1] - 1
            x, ref = x[:, -1:], None if ref is None else ref[:, -1:]
        vectors = measure(ref, x, chunk0=self.chunk0 + chunk, position0=position0)  # [b,N]
        at = self.lead + member, self.index[name]
        self.summaries[at] = merge(self.summaries[at], fold(vectors))

    def logits(self, start: int, first_id: int, members: Sequence[Tensor]) -> None:
        n, P = len(members[0]), self.n_positions
        if first_id == 0:
            labels = self._following()[start : start + n].to(members[0].device) if self.labelled else None
            compares, stored = self.has_reference or self.base is not None, self.base is not None
            sums = LogitSums(n, self.n_rows, labels=labels, has_reference=compares, stored=stored, device=members[0].device)
            self.done.append(sums)
            shown = self._shown(start, n)
            if len(shown):
                self.likely.append((sums, shown, Likely(self.n_rows, len(shown))))
        reference = [] if self.base is None else [self._stored(self.base, start, first_id, members[0])]
        self.done[-1].add(first_id, [*reference, *members])
        if self.likely and self.likely[-1][0] is self.done[-1]:
            _, shown, likely = self.likely[-1]
            likely.add(first_id, [x[shown.to(x.device)].cpu() for x in (*reference, *members)])
        if self.chunk0 == 0 and start <= P - 1 < start + n:
            self.next.append([x[P - 1 - start].double().cpu() for x in members])

    def _shown(self, start: int, n: int) -> Tensor:
        """Which of n positions from ``start`` on are among the first SHOWN scored ones of the whole input, int64 [k]."""
        chunk, position = np.divmod(start + np.arange(n), self.n_positions)
        n_scored = self.last - self.first
        shown = (self.chunk0 == 0) & (position < n_scored) & (chunk * n_scored + position < SHOWN)
        return torch.from_numpy(np.flatnonzero(shown))

    def _stored(self, base: Base, start: int, first_id: int, beside: Tensor) -> Tensor:
        """The base's log-probabilities of the same positions and ids as a member's logits [n,v]; 0 at positions that are not scored."""
        chunk, position = np.divmod(start + np.arange(len(beside)), self.n_positions)
        scored = position < self.last - self.first
        out = torch.zeros(beside.shape)
        ids = slice(first_id, first_id + beside.shape[-1])
        out[torch.from_numpy(scored)] = base.log_probs(self.chunk0 + chunk[scored], position[scored], ids)
        return out.to(beside.device)

    def _following(self) -> Tensor:
        """The token after each position that goes through the head, [C·P]; the last of a chunk has none and is not scored."""
        after = torch.cat([self.ids[:, self.first + 1 :], self.ids[:, :1]], dim=1)  # [C,P]
        return after.flatten()

    def record(self) -> Record:
        """Everything measured; the walk is over."""
        out: Record = {"taps": self.summaries}
        if self.has_reference or self.base is not None:
            out["kl"], out["same_top"] = self._scored("kl"), self._scored("same_top")
        if self.labelled:
            out["log_p"] = self._scored("log_p")
        if self.next:
            logits = [torch.cat(parts) for parts in zip(*self.next, strict=True)]
            for key, rows in (("next", _next_tokens(logits, self.has_reference)), ("choices", _choices(logits, self.has_reference))):
                out[key] = np.concatenate([np.full((self.lead, *rows.shape[1:]), np.nan), rows])
        if self.likely:
            out["likely"] = np.concatenate([likely.table(sums.lse[:, shown].cpu()) for sums, shown, likely in self.likely], axis=1)
        if self.base is not None:
            out["log_p"][0] = self.base.log_p_of_labels(slice(self.chunk0, self.chunk0 + len(self.ids)))
            out["mass"] = self._scored("mass")
        return out

    def _scored(self, what: str) -> NDArray[Any]:
        """One result of the LogitSums at the scored positions, [M,C,P]; [1,C,P] of one that all members share."""
        flat = torch.cat([getattr(sums, what).cpu() for sums in self.done], dim=-1)  # [M, C·P] or [C·P]
        shape = -1, len(self.ids), self.n_positions
        return flat.reshape(shape)[:, :, : self.last - self.first].contiguous().numpy()


def _next_tokens(logits: Sequence[Tensor], has_reference: bool) -> NDArray[np.float64]:
    """NEXT_FIELDS of each member's greedy token from its logits [V]; the rank in the original is 0 where there is none."""
    rows = []
    for own in logits:
        best = first_argmax(own)
        there = int(rank(logits[0], best)) if has_reference else 0
        rows.append([float(best), float(own[best]), float(rank(own, best)), float(there), float(own.softmax(-1)[best])])
    return np.array(rows, np.float64)


def _choices(logits: Sequence[Tensor], has_reference: bool) -> NDArray[np.float64]:
    """CHOICE_FIELDS of each member's most probable tokens from its logits [V], [M,K,6]; NaN where there is no original, and beyond V."""
    out = np.full((len(logits), N_CHOICES, len(CHOICE_FIELDS)), np.nan)
    k = min(N_CHOICES, len(logits[0]))
    there = logits[0].topk(k).indices if has_reference else None
    for row, own in zip(out, logits, strict=True):
        probs = own.softmax(-1)
        values, ids = own.topk(k)
        row[:k, :3] = torch.stack([ids.double(), values, probs[ids]], dim=1)
        if there is not None:
            ranks = torch.tensor([float(rank(own, i)) for i in there], dtype=torch.float64)
            row[:k, 3:] = torch.stack([own[there], probs[there], ranks], dim=1)
    return out


class Likely:
    """The largest logits of n positions of M members, fed slice by slice of the vocabulary."""

    def __init__(self, n_members: int, n: int) -> None:
        self.values = torch.full((n_members, n, N_LIKELY), -torch.inf, dtype=torch.float64)
        self.ids = torch.zeros(n_members, n, N_LIKELY, dtype=torch.int64)

    def add(self, v0: int, members: Sequence[Tensor]) -> None:
        """Logits [n,dv] of each member for the ids v0 … v0 + dv − 1."""
        for m, x in enumerate(members):
            new, at = x.double().topk(min(N_LIKELY, x.shape[-1]))
            values, ids = torch.cat([self.values[m], new], dim=-1), torch.cat([self.ids[m], v0 + at], dim=-1)
            self.values[m], best = values.topk(N_LIKELY)
            self.ids[m] = ids.gather(-1, best)

    def table(self, lse: Tensor) -> NDArray[np.float64]:
        """Id and probability, most probable first: float64 [M,n,N_LIKELY,2].  lse: ln Σ eˣ over the whole vocabulary, [M,n]."""
        probs = (self.values - lse[..., None]).exp()
        return torch.stack([self.ids.double(), probs], dim=-1).numpy()


def join_batches(records: Sequence[Mapping[str, NDArray[Any]]]) -> Record:
    """The record of several batches in their order: positions one after the other, tap summaries merged from the first on."""
    by_position = [key for key in ("kl", "same_top", "log_p", "mass") if key in records[0]]
    out: Record = {key: np.concatenate([r[key] for r in records], axis=1) for key in by_position}
    out["taps"] = records[0]["taps"]
    for record in records[1:]:
        out["taps"] = merge(out["taps"], record["taps"])
    return out | {key: records[0][key] for key in OF_THE_FIRST if key in records[0]}


def join_groups(records: Sequence[Mapping[str, NDArray[Any]]], *, has_reference: bool) -> Record:
    """The record of all members from those of groups, each of which had the original in its first row (where there is one).

    Raises ArithmeticError when the groups' originals differ: the groups did not run on the same numbers.
    """
    first, *others = records
    out: Record = {}
    for key, array in first.items():
        parts = [array]
        for other in others:
            if has_reference and array[:1].tobytes() != other[key][:1].tobytes():
                raise ArithmeticError(f"the original's {key!r} differs between two groups of variants, expected the same bits")
            parts.append(other[key][1:] if has_reference else other[key])
        out[key] = np.concatenate(parts)
    return out
