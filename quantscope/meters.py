"""What one batch of a walk is read off for: statistics of every tap, the logits against the original's, the next token.

A batch becomes a *record*, named arrays that can be stored, sent and put together again:

    taps      float64 [M,K,N]  one summary vector (tap_stats) per member and tap
    kl        float64 [M,C,P]  KL divergence from the original at each scored position     where there is an original
    same_top  bool    [M,C,P]  the same most probable token                                where there is an original
    log_p     float64 [M,C,P]  ln probability of the token that follows                    of a text
    top_ids   int32   [M,S,5]  the most probable tokens, −1 where there are no more         of the positions that are shown
    top_log_p float32 [M,S,5]  ln of their probabilities
    last      float   [M,V]    logits at the last position of the first chunk               of the first batch
    mass      float64 [1,C,P]  probability of the tokens that the base has kept             where the original is a base
    reached, rerouted          where experts are: ``routing.py``

C chunks, P scored positions each, M members, K taps in the order of ``tap_list``, V token ids; S of the first SHOWN scored positions of the
whole input are in this batch.  Where the original is a *base*, log-probabilities in a file, it comes before the members as row 0 of
everything, with nothing in taps and last: its weights are not here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantscope.logit_sums import LogitSums
from quantscope.model.taps import CHOSEN, EMBD, HEAD_TAPS, graph_order, stem_of, tap_names
from quantscope.model.wiring import OF_CHOSEN, model_taps
from quantscope.routing import RoutingMeter
from quantscope.tap_stats import empty, fold, measure, merge
from quantscope.top_tokens import TopTokens
from quantscope.weights import WeightProvider

Record: TypeAlias = dict[str, NDArray[Any]]

SHOWN = 400  # scored positions of an input, the first ones, whose most probable tokens are kept ...
N_TOP = 5  # ... and how many
UNMEASURED = ("kq_soft_max", CHOSEN)  # [B,H,T,S], too large to keep; numbers of experts: no signals with channels


def tap_list(weights: WeightProvider) -> tuple[str, ...]:
    """The taps that are measured, in graph order; those of USUAL_TAPS that an architecture lacks stay empty."""
    there = {EMBD, *model_taps(weights), *tap_names(weights.config.n_layer)} - set(HEAD_TAPS[1:])
    return tuple(sorted((tap for tap in there if stem_of(tap) not in UNMEASURED), key=graph_order))


class Base(Protocol):
    """Stored log-probabilities of the scored positions, which are counted from 0 in each chunk of the whole input."""

    def log_probs(self, chunk: NDArray[Any], position: NDArray[Any], ids: slice) -> Tensor:
        """ln p of these ids: [n] and [n] → float32 [n,v]; −∞ where it was not kept."""

    def log_p_of_labels(self, chunks: slice) -> NDArray[np.float64]:
        """ln p of the token that follows each scored position, [C,P]."""


class BatchMeter:
    """An Observer of one batch.

    ids: [C,T], ``chunk0`` is the number of the first row in the whole input.  weights: of any member, all have the same taps.  Positions
    first … last − 1 of each row are scored; logits come for first … T − 1.  labelled: the token after each scored position counts.
    has_reference: member 0 is the original.  base: what stands in for one that is no member.
    """

    def __init__(
        self,
        ids: Tensor,
        weights: WeightProvider,
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
        self.index = {name: k for k, name in enumerate(tap_list(weights))}
        self.routing = RoutingMeter(weights, self.n_rows)
        self.taps = self.index.keys() | self.routing.index.keys()
        self.summaries = empty((self.n_rows, len(self.index)))  # [M,K,N]
        self.n_positions = ids.shape[1] - first  # per chunk, that go through the head
        self.n_scored = last - first
        self.n_shown = min(max(SHOWN - chunk0 * self.n_scored, 0), len(ids) * self.n_scored)
        self.top = TopTokens(self.n_rows, self.n_shown, N_TOP)
        self.done: list[LogitSums] = []
        self.last_logits: list[list[NDArray[Any]]] = []  # per slice of the vocabulary, the logits [v] of each member

    def tap(self, member: int, name: str, ref: Tensor | None, x: Tensor, chunk: int) -> None:
        if name in self.routing.index:
            self.routing.add(self.lead + member, name, ref, x)
            return
        if stem_of(name) in OF_CHOSEN:
            ref = self.routing.beside(ref, x)
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
        reference = [] if self.base is None else [self._stored(self.base, start, first_id, members[0])]
        rows = [*reference, *members]
        self.done[-1].add(first_id, rows)
        self._keep_top(start, first_id, rows)
        if self.chunk0 == 0 and start <= P - 1 < start + n:
            self.last_logits.append([x[P - 1 - start].cpu().numpy() for x in members])

    def _keep_top(self, start: int, first_id: int, rows: Sequence[Tensor]) -> None:
        """The largest logits at those of these positions that are shown."""
        chunk, position = np.divmod(start + np.arange(len(rows[0])), self.n_positions)
        number = chunk * self.n_scored + position  # among the scored positions of the batch
        shown = np.flatnonzero((position < self.n_scored) & (number < self.n_shown))
        if len(shown):
            self.top.add(number[shown], shown, first_id, rows)

    def _stored(self, base: Base, start: int, first_id: int, beside: Tensor) -> Tensor:
        """The base's log-probabilities of the same positions and ids as a member's logits [n,v]; 0 at positions that are not scored."""
        chunk, position = np.divmod(start + np.arange(len(beside)), self.n_positions)
        scored = position < self.n_scored
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
        out: Record = {"taps": self.summaries, **self.routing.record()}
        if self.has_reference or self.base is not None:
            out["kl"], out["same_top"] = self._scored("kl"), self._scored("same_top")
        if self.labelled:
            out["log_p"] = self._scored("log_p")
        out["top_ids"], out["top_log_p"] = self.top.ids.astype(np.int32), self._top_log_p()
        if self.last_logits:
            own = np.stack([np.concatenate(parts) for parts in zip(*self.last_logits, strict=True)])  # [members,V]
            out["last"] = np.concatenate([np.full_like(own[:1], np.nan).repeat(self.lead, 0), own])
        if self.base is not None:
            out["log_p"][0] = self.base.log_p_of_labels(slice(self.chunk0, self.chunk0 + len(self.ids)))
            out["mass"] = self._scored("mass")
        return out

    @np.errstate(invalid="ignore", over="ignore")  # a broken variant has no distribution: NaN
    def _top_log_p(self) -> NDArray[np.float32]:
        """ln p of the largest logits, x − ln Σ eˣ; a base's are that already."""
        lse = self._scored("lse").reshape(self.n_rows, -1)[:, : self.n_shown]
        lse[: self.lead] = 0
        log_p: NDArray[np.float64] = self.top.logits - lse[:, :, None]
        return log_p.astype(np.float32)

    def _scored(self, what: str) -> NDArray[Any]:
        """One result of the LogitSums at the scored positions, [M,C,P]; [1,C,P] of one that all members share."""
        flat = torch.cat([getattr(sums, what).cpu() for sums in self.done], dim=-1)  # [M, C·P] or [C·P]
        shape = -1, len(self.ids), self.n_positions
        return flat.reshape(shape)[:, :, : self.n_scored].contiguous().numpy()


def join_batches(records: Sequence[Mapping[str, NDArray[Any]]]) -> Record:
    """The record of several batches in their order: positions one after the other, tap summaries merged from the first on."""
    by_position = [key for key in ("kl", "same_top", "log_p", "mass", "top_ids", "top_log_p") if key in records[0]]
    out: Record = {key: np.concatenate([r[key] for r in records], axis=1) for key in by_position}
    out |= {key: np.sum([r[key] for r in records], axis=0) for key in ("reached", "rerouted") if key in records[0]}
    out["taps"] = records[0]["taps"]
    for record in records[1:]:
        out["taps"] = merge(out["taps"], record["taps"])
    return out | {"last": records[0]["last"]} if "last" in records[0] else out


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
