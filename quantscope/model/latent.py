"""Multi-head latent attention: keys and values come from one narrow vector a token, which is all that a cache has to hold.

    c = norm(kv_a·x),  k = [k_b·c | turn(the rest of kv_a·x)],  v = v_b·c,  q = [.. | turn(..)] of q_b·norm(q_a·x)

A file with k_b and v_b in one matrix has k and v written out for every head.  One with a matrix of each head is made to do without:

    q·(k_b·c) = (k_bᵀ·q)·c          Σ p·(v_b·c) = v_b·(Σ p·c)

so k_bᵀ, which is what the file stores, is multiplied into q, all heads look at one key [c | turned] a token, whose first channels are the
value, and v_b multiplies what each head makes of them (``attention.py``).

Source: DeepSeek-V2, arXiv:2405.04434, section 2.1; src/models/deepseek2.cpp of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from quantscope.arch.config import ModelConfig
from quantscope.model.arithmetic import Arithmetic
from quantscope.model.rope import RopeTables
from quantscope.model.taps import Tap, wants


def latent_heads(
    x: Tensor, w: Mapping[str, Tensor], config: ModelConfig, rope: RopeTables | None, tap: Tap, m: Arithmetic
) -> tuple[Tensor, Tensor, Tensor]:
    """What attends: q and k [B,T,H,D], v [B,T,H,Dv]; with a matrix of each head q [B,T,H,C+R], k [B,T,1,C+R], v [B,T,1,C]."""
    q = queries(x, w, config, m)  # [B,T,H·D]
    tap("Qcur_pre", q)
    q = turned_queries(q, config, rope, m)  # [B,T,H,D]
    tap("Qcur", q.flatten(-2))
    latent = latent_keys(x, w, config, rope, m)  # [B,T,C+R]
    if absorbs(w):
        attends = absorbed(q, w, config, m), latent[:, :, None], latent_values(latent, config)
        tap("Qcur_latent", attends[0].flatten(-2))
        tap("Kcur_latent", latent)
    if not absorbs(w) or wants(tap, "Kcur") or wants(tap, "Vcur"):
        k, v = written_out(latent, w, config, m)
        tap("Kcur", k.flatten(-2))
        tap("Vcur", v.flatten(-2))
    return attends if absorbs(w) else (q, k, v)


def absorbs(w: Collection[str]) -> bool:
    """Whether a layer, by the local names of its tensors, has a matrix of each head."""
    return "attn_k_b.weight" in w


def queries(x: Tensor, w: Mapping[str, Tensor], config: ModelConfig, m: Arithmetic) -> Tensor:
    """q before it turns, from two matrices or from one: [B,T,E] → [B,T,H·D]."""
    if "attn_q_a.weight" not in w:
        return m.linear(x, w, "attn_q")
    return m.linear(m.norm(m.linear(x, w, "attn_q_a"), w, "attn_q_a_norm", "rms", config.norm_eps), w, "attn_q_b")


def turned_queries(q: Tensor, config: ModelConfig, rope: RopeTables | None, m: Arithmetic) -> Tensor:
    """The last R of D channels turn: [B,T,H·D] → [B,T,H,D]."""
    assert rope is not None
    q, R = q.reshape(*q.shape[:2], config.n_head, -1), config.rope.dim
    return torch.cat([q[..., :-R], m.rotate(q[..., -R:], rope, "q")], dim=-1)


def latent_keys(x: Tensor, w: Mapping[str, Tensor], config: ModelConfig, rope: RopeTables | None, m: Arithmetic) -> Tensor:
    """What a cache holds, [c | turned]: [B,T,E] → [B,T,C+R]."""
    assert rope is not None
    c, turning = torch.split(m.linear(x, w, "attn_kv_a_mqa"), [config.axis("c"), config.rope.dim], dim=-1)  # [B,T,C], [B,T,R]
    c = m.norm(c, w, "attn_kv_a_norm", "rms", config.norm_eps)
    return torch.cat([c, m.rotate(turning[:, :, None], rope, "k").squeeze(2)], dim=-1)


def latent_values(latent: Tensor, config: ModelConfig) -> Tensor:
    """The values of all heads are c itself: [B,T,C+R] → [B,T,1,C]."""
    return latent[:, :, None, : config.axis("c")]


def absorbed(q: Tensor, w: Mapping[str, Tensor], config: ModelConfig, m: Arithmetic) -> Tensor:
    """k_bᵀ multiplied into q: [B,T,H,D] → [B,T,H,C+R]."""
    R = config.rope.dim
    return torch.cat([m.by_head(q[..., :-R], w, "attn_k_b"), q[..., -R:]], dim=-1)


def written_out(latent: Tensor, w: Mapping[str, Tensor], config: ModelConfig, m: Arithmetic) -> tuple[Tensor, Tensor]:
    """Keys [B,T,H,D] and values [B,T,H,Dv] of every head: [B,T,C+R].  With a matrix of each head they are only looked at."""
    c, turned = torch.split(latent, [config.axis("c"), config.rope.dim], dim=-1)
    if absorbs(w):
        still = torch.einsum("btc,hcn->bthn", c, w["attn_k_b.weight"])
        v = torch.einsum("btc,hvc->bthv", c, w["attn_v_b.weight"])
    else:
        both = m.linear(c, w, "attn_kv_b").reshape(*c.shape[:2], config.n_head, -1)  # [B,T,H,N+Dv]
        still, v = torch.split(both, [config.axis("n"), config.axis("v")], dim=-1)
    return torch.cat([still, turned[:, :, None].expand(-1, -1, config.n_head, -1)], dim=-1), v
