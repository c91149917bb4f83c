"""Operations as a faulty engine computes them: an arithmetic with some of its operations replaced, and an attention with a setting wrong.

Altered(m, swiglu=lambda m, gate, up: m.swiglu(up, gate))      the operation gets the arithmetic it replaces, then its own arguments
attending(m, causal=everything)                                softmaxₛ(q·kᵀ·scale, masked)·v with another mask, scale, axis or sharing
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from quantscope.arch.config import Activation, RopeConfig
from quantscope.model.arithmetic import Arithmetic
from quantscope.model.ops import PLAIN, Scores, biased, with_sinks
from quantscope.model.rope import RopeTables
from quantscope.weights import WeightProvider

Sees = Callable[[Tensor, Tensor], Tensor]  # (positions of queries [T,1], of keys [1,S]) → bool [T,S]


class Altered(Arithmetic):
    """Another arithmetic with operations replaced, by the names of its methods."""

    def __init__(self, inner: Arithmetic, **operations: Callable[..., Any]) -> None:
        self.inner, self._operations = inner, operations

    def _do(self, operation: str, *args: Any, **more: Any) -> Any:
        replaced = self._operations.get(operation)
        return getattr(self.inner, operation)(*args, **more) if replaced is None else replaced(self.inner, *args, **more)

    def embed(self, weights: WeightProvider, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return self.inner.embed(weights, ids, dtype)

    def layer(self, weights: WeightProvider, i: int, dtype: torch.dtype) -> Mapping[str, Tensor]:
        return self.inner.layer(weights, i, dtype)

    def top(self, weights: WeightProvider, dtype: torch.dtype) -> Mapping[str, Tensor]:
        return self.inner.top(weights, dtype)

    def rope_tables(self, config: RopeConfig, positions: Tensor, factors: Tensor | None, dtype: torch.dtype) -> Any:
        return self._do("rope_tables", config, positions, factors, dtype)

    def rotate(self, x: Tensor, tables: Any, which: Literal["q", "k"]) -> Tensor:
        return self._do("rotate", x, tables, which)  # type: ignore[no-any-return]

    def rms_norm(self, x: Tensor, w: Mapping[str, Tensor], name: str, eps: float) -> Tensor:
        return self._do("rms_norm", x, w, name, eps)  # type: ignore[no-any-return]

    def layer_norm(self, x: Tensor, w: Mapping[str, Tensor], name: str, eps: float) -> Tensor:
        return self.inner.layer_norm(x, w, name, eps)

    def expert_linear(self, x: Tensor, w: Mapping[str, Tensor], name: str, e: int) -> Tensor:
        return self.inner.expert_linear(x, w, name, e)

    def by_head(self, x: Tensor, w: Mapping[str, Tensor], name: str) -> Tensor:
        return self.inner.by_head(x, w, name)

    def activate(self, kind: Activation, gate: Tensor, up: Tensor | None) -> Tensor:
        return self.swiglu(gate, up) if kind == "silu" and up is not None else self.inner.activate(kind, gate, up)

    def linear(self, x: Tensor, w: Mapping[str, Tensor], name: str, *, scale_last: bool = False) -> Tensor:
        return self._do("linear", x, w, name, scale_last=scale_last)  # type: ignore[no-any-return]

    def attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float, how: Scores = PLAIN) -> Tensor:
        return self._do("attention", q, k, v, scale, how)  # type: ignore[no-any-return]

    def attention_map(self, q: Tensor, k: Tensor, scale: float, how: Scores = PLAIN) -> Tensor:
        return self._do("attention_map", q, k, scale, how)  # type: ignore[no-any-return]

    def weighted_values(self, probs: Tensor, v: Tensor) -> Tensor:
        return self._do("weighted_values", probs, v)  # type: ignore[no-any-return]

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        return self._do("swiglu", gate, up)  # type: ignore[no-any-return]

    def residual(self, h: Tensor, x: Tensor, branch: Literal["attn", "ffn"]) -> Tensor:
        return self._do("residual", h, x, branch)  # type: ignore[no-any-return]


# ---- rotation ------------------------------------------------------------------------------------------------------------------------


class QK(NamedTuple):
    """Tables of q and of k; None: not turned."""

    q: RopeTables | None
    k: RopeTables | None


def turning(
    inner: Arithmetic,
    *,
    config: Callable[[RopeConfig], RopeConfig] = lambda c: c,
    positions: Callable[[Tensor], Tensor] = lambda p: p,
    tables: Callable[[RopeTables], RopeTables] = lambda t: t,
    factors: bool = True,
    only: Literal["q", "k"] | None = None,
    never: Literal["q", "k", "qk", ""] = "",
) -> Arithmetic:
    """An arithmetic with another rotation.  only: the change is made to q or to k alone.  never: what is not turned at all."""

    def made(m: Arithmetic, c: RopeConfig, p: Tensor, f: Tensor | None, dtype: torch.dtype) -> QK:
        right = _of_each(m.rope_tables(c, p, f, dtype))
        wrong = _of_each(m.rope_tables(config(c), positions(p), f if factors else None, dtype))
        return QK(*(chosen(which, a, b) for which, a, b in zip("qk", right, wrong, strict=True)))

    def chosen(which: str, right: RopeTables | None, wrong: RopeTables | None) -> RopeTables | None:
        if which in never:
            return None
        if only not in (None, which):
            return right
        return None if wrong is None else tables(wrong)

    def turned(m: Arithmetic, x: Tensor, given: Any, which: Literal["q", "k"]) -> Tensor:
        own = _of_each(given)["qk".index(which)]
        return x if own is None else m.rotate(x, own, which)

    return Altered(inner, rope_tables=made, rotate=turned)


def _of_each(tables: RopeTables | QK) -> QK:
    """Tables of q and k, which are the same where nothing has told them apart."""
    return tables if isinstance(tables, QK) else QK(tables, tables)


# ---- attention -----------------------------------------------------------------------------------------------------------------------


def causal(query: Tensor, key: Tensor) -> Tensor:
    return key <= query


@dataclass(frozen=True)
class Attending:
    """sees: which keys a query sees.  factor: of the scale.  axis: of the softmax over [B,H,T,S].  tiled: query head h uses the key/value
    head h mod K.  parts: heads a head is taken for.
    """

    sees: Sees = causal
    factor: float = 1.0
    axis: int = -1
    tiled: bool = False
    parts: int = 1


def attending(inner: Arithmetic, **settings: Any) -> Arithmetic:
    """The arithmetic with some settings of the attention wrong, those that were wrong before kept."""
    before, base = (inner.settings, inner.inner) if isinstance(inner, _Attention) else (Attending(), inner)
    return _Attention(base, replace(before, **settings))


class _Attention(Altered):
    """Attention with wrong settings."""

    def __init__(self, inner: Arithmetic, settings: Attending) -> None:
        super().__init__(inner)
        self.settings = settings

    def attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float, how: Scores = PLAIN) -> Tensor:
        if replace(self.settings, factor=1.0) == Attending():
            return self.inner.attention(q, k, v, scale * self.settings.factor, how)
        return self.weighted_values(self.attention_map(q, k, scale, how), v)

    def attention_map(self, q: Tensor, k: Tensor, scale: float, how: Scores = PLAIN) -> Tensor:
        s, T, S = self.settings, q.shape[1], k.shape[1]
        q, k = self._parted(q), self._shared(self._parted(k), q.shape[2])  # [B,T,H,D], [B,S,H,D]
        scores = torch.einsum("bthd,bshd->bhts", q, k) * (scale * s.factor)
        at = torch.arange(S, device=q.device)
        query, key = at[S - T :, None], at[None]
        unseen = ~s.sees(query, key) | (key <= query - how.window if how.window else False)
        scores = biased(scores, how, slice(None), scores.shape[1]).masked_fill(unseen, -torch.inf)
        if how.sinks is not None and s.axis == -1:
            return with_sinks(scores, how.sinks.repeat_interleave(s.parts))
        return scores.softmax(s.axis).nan_to_num(0.0)  # over an axis with nothing to see

    def weighted_values(self, probs: Tensor, v: Tensor) -> Tensor:
        if self.settings.parts == 1 and not self.settings.tiled:
            return self.inner.weighted_values(probs, v)
        n_head = probs.shape[1] // self.settings.parts
        mixed = torch.einsum("bhts,bshd->bthd", probs, self._shared(self._parted(v), n_head))
        return mixed.reshape(*mixed.shape[:2], n_head, -1)  # [B,T,H,D]

    def _parted(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], x.shape[2] * self.settings.parts, -1)

    def _shared(self, x: Tensor, n_head: int) -> Tensor:
        """[B,S,K·parts,D] → [B,S,H·parts,D]."""
        G = n_head * self.settings.parts // x.shape[2]
        return x.repeat(1, 1, G, 1) if self.settings.tiled else x.repeat_interleave(G, 2)
