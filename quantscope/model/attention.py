"""Attention: queries, keys and values of a layer's input, and what comes of them.

    q = turn(norm(Q·x)), k = turn(norm(K·x)), v = V·x        out = O · (softmax(q·kᵀ·scale + mask) · v)

Norm and turn are there where the model has them.  Keys and values may come from one narrow vector a token (``latent.py``); where they are
that vector, each head's matrix v_b multiplies what comes of it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantscope.arch.config import ModelConfig
from quantscope.model.arithmetic import EXACT, Arithmetic
from quantscope.model.latent import absorbs, latent_heads
from quantscope.model.ops import Scores
from quantscope.model.rope import RopeTables
from quantscope.model.taps import Tap, no_tap, wants


class KVCache:
    """Keys (after RoPE) and values of the positions so far, [B,S,K,D] a layer."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def n_past(self) -> int:
        """Positions held, S; 0 when empty."""
        return self.layers[0][0].shape[1] if self.layers else 0

    def append(self, i: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the new positions of layer i, [B,T,K,D] each, and return all of them."""
        if i in self.layers:
            k_past, v_past = self.layers[i]
            k, v = torch.cat([k_past, k], dim=1), torch.cat([v_past, v], dim=1)
        self.layers[i] = k, v
        return k, v


def attention(
    x: Tensor,
    w: Mapping[str, Tensor],
    i: int,
    config: ModelConfig,
    rope: RopeTables | None,
    tap: Tap = no_tap,
    cache: KVCache | None = None,
    m: Arithmetic = EXACT,
) -> Tensor:
    """Causal attention with grouped key/value heads: normed x [B,T,E] → [B,T,E]."""
    heads = latent_heads if config.latent else projected_heads
    q, k, v = heads(x, w, config, rope, tap, m)  # [B,T,H,D], [B,T,K,D], [B,T,K,Dv]; D and Dv of latent vectors: C+R and C, K = 1
    if cache is not None:
        k, v = cache.append(i, k, v)  # [B,S,K,D]
    q = tempered(q, k.shape[1], config)
    how = scores_of(w, i, config)
    if wants(tap, "kq_soft_max"):
        tap("kq_soft_max", m.attention_map(q, k, config.kq_scale, how))  # [B,H,T,S]
    mixed = gathered(m.attention(q, k, v, config.kq_scale, how), w, m)  # [B,T,H·Dv]
    tap("kqv_out", mixed)
    out = m.linear(mixed, w, "attn_output")  # [B,T,E]
    tap("attn_out", out)
    return out


def gathered(mixed: Tensor, w: Mapping[str, Tensor], m: Arithmetic) -> Tensor:
    """Weighted values as attn_output.weight multiplies them: [B,T,H,Dv], of latent vectors [B,T,H,C] → [B,T,H·Dv]."""
    return (m.by_head(mixed, w, "attn_v_b") if absorbs(w) else mixed).flatten(-2)


def scores_of(w: Mapping[str, Tensor], i: int, config: ModelConfig) -> Scores:
    """What layer i does to its scores besides scale and causal mask."""
    return Scores(config.window_of(i), config.score_softcap, config.alibi, w.get("attn_sinks.weight"))


def tempered(q: Tensor, n: int, config: ModelConfig) -> Tensor:
    """q [B,T,H,D] of the last T of n positions, longer from ``temperature_length`` on where the model does that."""
    if not config.temperature or n <= config.temperature_length:
        return q
    position = torch.arange(n - q.shape[1], n, device=q.device)
    return q * (1 + config.temperature * (1 + position // config.temperature_length).log())[:, None, None].to(q.dtype)


def projected_heads(
    x: Tensor, w: Mapping[str, Tensor], config: ModelConfig, rope: RopeTables | None, tap: Tap, m: Arithmetic
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B,T,H,D], k and v [B,T,K,D] of a layer's input x [B,T,E]: projected, normed, turned."""
    q, k, v = projected(x, w, config, tap, m)  # [B,T,H·D], [B,T,K·D] twice
    for name, z in (("Qcur_pre", q), ("Kcur_pre", k), ("Vcur", v)):
        tap(name, z)
    q, k, v = (z.reshape(*z.shape[:2], -1, config.head_dim) for z in (q, k, v))  # [B,T,H,D], [B,T,K,D] twice
    for step in ("norm", "turn") if config.block.qk_norm == "before" else ("turn", "norm"):
        if step == "turn" and rope is not None:
            q, k = m.rotate(q, rope, "q"), m.rotate(k, rope, "k")
            tap("Qcur", q.flatten(-2))
            tap("Kcur", k.flatten(-2))
        elif step == "norm" and "attn_q_norm.weight" in w:
            q, k = head_norm(q, w, "attn_q_norm", config, m), head_norm(k, w, "attn_k_norm", config, m)
            tap("Qcur_normed", q.flatten(-2))
            tap("Kcur_normed", k.flatten(-2))
    return q, k, v


def projected(x: Tensor, w: Mapping[str, Tensor], config: ModelConfig, tap: Tap, m: Arithmetic) -> tuple[Tensor, ...]:
    """q, k and v of x [B,T,E], from three matrices or from one: [B,T,H·D], [B,T,K·D], [B,T,K·D]."""
    if "attn_qkv.weight" in w:
        fused = cut(m.linear(x, w, "attn_qkv"), config.clamp_qkv)  # [B,T,(H+2K)·D]
        tap("wqkv", fused)
        return torch.split(fused, [config.axis(letter) for letter in "QKW"], dim=-1)
    return tuple(cut(m.linear(x, w, name), config.clamp_qkv) for name in ("attn_q", "attn_k", "attn_v"))


def cut(x: Tensor, limit: float) -> Tensor:
    """x within ± limit; all of x where there is none."""
    return x.clamp(-limit, limit) if limit else x


def head_norm(z: Tensor, w: Mapping[str, Tensor], name: str, config: ModelConfig, m: Arithmetic) -> Tensor:
    """The norm of q or k, [B,T,H,D]: of each head, or of all its heads together."""
    together = config.block.qk_norm_over == "all"
    x = m.norm(z.flatten(-2) if together else z, w, name, config.block.norm, config.norm_eps)
    return x.reshape(z.shape)
