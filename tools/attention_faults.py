"""Faults of the attention, for the figures on what one token and one repeated token can show: each an arithmetic or a cache of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from quantscope.arch.config import RopeConfig
from quantscope.model import ops, rope
from quantscope.model.arithmetic import Arithmetic
from quantscope.model.forward import KVCache
from quantscope.model.ops import PLAIN, Scores
from quantscope.model.rope import RopeTables


class OtherRope(Arithmetic):
    """RoPE of another config, or at other positions."""

    def __init__(self, change: Callable[[RopeConfig], RopeConfig] = lambda c: c, at: Callable[[Tensor], Tensor] = lambda p: p) -> None:
        self.change, self.at = change, at

    def rope_tables(self, config: RopeConfig, positions: Tensor, factors: Tensor | None, dtype: torch.dtype) -> RopeTables:
        return rope.rope_tables(self.change(config), self.at(positions), factors, dtype)


class OtherScale(Arithmetic):
    def attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float, how: Scores = PLAIN) -> Tensor:
        return ops.causal_attention(q, k, v, 1.0)


class ByHand(Arithmetic):
    """Attention written out, [B,H,T,S] scores given to ``mix``."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float, how: Scores = PLAIN) -> Tensor:
        G, T, S = q.shape[2] // k.shape[2], q.shape[1], k.shape[1]
        q, k, v = (z.transpose(1, 2) for z in (q, k.repeat_interleave(G, 2), v.repeat_interleave(G, 2)))  # [B,H,T,D]
        future = torch.ones(T, S, dtype=torch.bool).triu(S - T + 1)
        return (self.mix(q @ k.mT * scale, future) @ v).transpose(1, 2)

    def mix(self, scores: Tensor, future: Tensor) -> Tensor:
        return scores.masked_fill(future, -torch.inf).softmax(-1)


class NoMask(ByHand):
    def mix(self, scores: Tensor, future: Tensor) -> Tensor:
        return scores.softmax(-1)


class OverQueries(ByHand):
    def mix(self, scores: Tensor, future: Tensor) -> Tensor:
        return scores.masked_fill(future, -torch.inf).softmax(-2)


class OtherWeight(Arithmetic):
    """The rows of one matrix in reverse order: what any wrong matrix of q or k does."""

    def __init__(self, name: str) -> None:
        self.name = name

    def linear(self, x: Tensor, w: Mapping[str, Tensor], name: str, *, scale_last: bool = False) -> Tensor:
        y = ops.linear(x, w, name, scale_last=scale_last)
        return y.flip(-1) if name == self.name else y


def interchanged(c: RopeConfig) -> RopeConfig:
    return replace(c, layout="half" if c.layout == "interleaved" else "interleaved")


BLIND: dict[str, Arithmetic] = {
    "wrong q weights": OtherWeight("attn_q"),
    "wrong k weights": OtherWeight("attn_k"),
    "RoPE missing": OtherRope(at=torch.zeros_like),  # it turns nothing at position 0
    "RoPE layout": OtherRope(interchanged),
    "RoPE theta": OtherRope(lambda c: replace(c, theta=500000.0)),
    "RoPE offset": OtherRope(at=lambda p: p + 1),
    "scale missing": OtherScale(),
    "mask missing": NoMask(),
    "softmax over queries": OverQueries(),
}
SEEN: dict[str, Arithmetic] = {"wrong v weights": OtherWeight("attn_v"), "wrong gate weights": OtherWeight("ffn_gate")}


class ZeroCache(KVCache):
    """Earlier cells are there and empty: the cache was lost."""

    def append(self, i: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k, v = super().append(i, k, v)
        zero = torch.zeros_like(k[:, :-1])
        return torch.cat([zero, k[:, -1:]], dim=1), torch.cat([zero, v[:, -1:]], dim=1)


class StaleCache(KVCache):
    """A step sees itself only."""

    def append(self, i: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k, v = super().append(i, k, v)
        return k[:, -1:], v[:, -1:]
