"""What a study reads off the walk: layer tables, logits against the original, the next token.  Each is an Observer's part."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from quantscope.metrics import first_argmax, kl_nats, log_prob, mean_and_se, rank, top1_agree
from quantscope.model.taps import EMBD
from quantscope.moments import TapSums
from quantscope.results import Generated, LayerRow, LogitStats


class LayerMeter:
    """RMS and mean of every layer's output and SwiGLU product, and the output's error against the original's."""

    def __init__(self, n_layer: int, n_members: int, positions: Literal["all", "last"] = "all") -> None:
        self.n_layer, self.positions = n_layer, positions
        self.taps = frozenset([EMBD]) | {f"{name}-{i}" for name in ("l_out", "ffn_swiglu") for i in range(n_layer)}
        self.sums = [{name: TapSums() for name in self.taps} for _ in range(n_members)]

    def tap(self, member: int, name: str, ref: Tensor | None, x: Tensor) -> None:
        if self.positions == "last":
            x, ref = x[:, -1:], None if ref is None else ref[:, -1:]
        self.sums[member][name].add(ref, x)

    def rows(self, member: int, *, compared: bool) -> tuple[LayerRow, ...]:
        """The table of one member; ``compared``: with the errors against the original."""
        sums = self.sums[member]
        outs = [sums[f"l_out-{i}"] for i in range(self.n_layer)]
        rows = []
        for i, out in enumerate(outs):
            swiglu = sums[f"ffn_swiglu-{i}"]
            before = outs[i - 1] if i else sums[EMBD]
            rows.append(
                LayerRow(
                    layer=i,
                    input_rms=before.rms,
                    output_rms=out.rms,
                    mean=out.mean,
                    swiglu_rms=swiglu.rms,
                    swiglu_mean=swiglu.mean,
                    nmse=out.nmse if compared else None,
                    sqnr_db=out.sqnr_db if compared else None,
                    cos_sim=out.cos_sim if compared else None,
                )
            )
        return tuple(rows)


@dataclass
class _PerPosition:
    """One value per scored position of one member, float64."""

    kl: list[Tensor] = field(default_factory=list)
    same_top: list[Tensor] = field(default_factory=list)
    log_p: list[Tensor] = field(default_factory=list)  # of the token that follows


class LogitMeter:
    """KL divergence, same top token and perplexity over the positions first … last − 1 of each chunk.

    ids: [B,T], whose token t + 1 is the one that follows position t; ``labelled`` False leaves out what needs it.
    """

    def __init__(self, n_members: int, *, first: int, last: int, has_reference: bool, labelled: bool) -> None:
        self.first, self.last, self.has_reference, self.labelled = first, last, has_reference, labelled
        self.values = [_PerPosition() for _ in range(n_members)]

    def logits(self, ids: Tensor, chunk: int, start: int, members: Sequence[Tensor]) -> None:
        """Include a slice: logits [n,V] of each member at positions start … start + n − 1."""
        a, b = max(self.first, start), min(self.last, start + len(members[0]))
        if a >= b:
            return
        part = [x[a - start : b - start] for x in members]
        labels = ids[chunk, a + 1 : b + 1] if self.labelled else None
        for m, (x, values) in enumerate(zip(part, self.values, strict=True)):
            if self.has_reference and m:
                values.kl.append(kl_nats(part[0], x).cpu())
                values.same_top.append(top1_agree(part[0], x).double().cpu())
            if labels is not None:
                values.log_p.append(log_prob(x, labels.to(x.device)).cpu())

    def stats(self, member: int) -> LogitStats:
        """Means with their standard errors, taking positions as independent (as llama-perplexity does)."""
        v, ref = self.values[member], self.values[0]
        n = sum(map(len, v.kl)) or sum(map(len, v.log_p)) or sum(map(len, self.values[-1].kl))
        out: dict[str, float | None] = {}
        if v.kl:
            kl = torch.cat(v.kl)
            out["kl_nats"], out["kl_nats_se"] = mean_and_se(kl)
            out["kl_nats_median"], out["kl_nats_p99"] = (float(q) for q in np.quantile(kl.numpy(), (0.5, 0.99)))
            out["kl_nats_max"] = float(kl.max())
            out["top1_agree"], out["top1_agree_se"] = mean_and_se(torch.cat(v.same_top))
        if v.log_p:
            log_p = torch.cat(v.log_p)
            nll, se = mean_and_se(-log_p)
            out["ppl"] = math.exp(nll)
            out["ppl_se"] = math.exp(nll) * se  # the error of exp(x), to first order
            if self.has_reference and member:
                ref_log_p = torch.cat(ref.log_p)
                out["ln_ppl_ratio"], out["ln_ppl_ratio_se"] = mean_and_se(ref_log_p - log_p)
                out["rms_dp"] = float((log_p.exp() - ref_log_p.exp()).square().mean().sqrt())
        return LogitStats(n_positions=n, **out)


class NextToken:
    """The greedy next token of each member after the last position of the first chunk."""

    def __init__(self) -> None:
        self.last: list[Tensor] = []

    def logits(self, chunk: int, members: Sequence[Tensor]) -> None:
        """Include a slice of the first chunk; the last one given counts."""
        if chunk == 0:
            self.last = [x[-1].double().cpu() for x in members]

    def generated(self, member: int, text: dict[int, str], *, has_reference: bool) -> Generated:
        """``text``: the text of each chosen id."""
        own = self.last[member]
        best = first_argmax(own)
        i = int(best)
        return Generated(
            text=text[i],
            id=i,
            logit=float(own[i]),
            rank=int(rank(own, best)),
            rank_in_original=int(rank(self.last[0], best)) if has_reference else None,
            prob=float(own.softmax(-1)[i]),
        )

    def ids(self) -> list[int]:
        return [int(first_argmax(x)) for x in self.last]


class Meters:
    """The parts of one walk as one Observer; ``ids`` is the batch that walks, set anew for each."""

    def __init__(self, layers: LayerMeter | None, logit: LogitMeter, next_token: NextToken) -> None:
        self.layers, self.logit, self.next_token = layers, logit, next_token
        self.taps = layers.taps if layers else frozenset[str]()
        self.ids = torch.empty(0)
        self.first_batch = True

    def batch(self, ids: Tensor, index: int) -> None:
        self.ids, self.first_batch = ids, index == 0

    def tap(self, member: int, name: str, ref: Tensor | None, x: Tensor) -> None:
        if self.layers:
            self.layers.tap(member, name, ref, x)

    def logits(self, chunk: int, start: int, members: Sequence[Tensor]) -> None:
        if self.first_batch:
            self.next_token.logits(chunk, members)
        self.logit.logits(self.ids, chunk, start, members)
