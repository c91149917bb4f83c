"""Multi-head latent attention: keys and values come from one narrow vector a token, which is all that a cache would have to hold.

    c = norm(kv_a·x),  k = [k_b·c | turn(the rest of kv_a·x)],  v = v_b·c,  q = [.. | turn(..)] of q_b·norm(q_a·x)

Here k and v are written out for every head.  llama.cpp multiplies k_b into q instead (q·(k_b·c) = (k_bᵀ·q)·c) and keeps c: the same scores.
Source: DeepSeek-V2, arXiv:2405.04434, section 2.1; src/models/deepseek2.cpp of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantscope.arch.config import ModelConfig
from quantscope.model.arithmetic import Arithmetic
from quantscope.model.rope import RopeTables
from quantscope.model.taps import Tap


def latent_heads(
    x: Tensor, w: Mapping[str, Tensor], config: ModelConfig, rope: RopeTables | None, tap: Tap, m: Arithmetic
) -> tuple[Tensor, Tensor, Tensor]:
    """q and k [B,T,H,D], v [B,T,H,Dv] of latent attention: of D channels the last ones turn, those of k being the same in every head."""
    assert config.latent is not None
    assert rope is not None
    R, kv_rank = config.rope.dim, config.latent.kv_rank
    if "attn_q_a.weight" in w:
        q = m.linear(m.norm(m.linear(x, w, "attn_q_a"), w, "attn_q_a_norm", "rms", config.norm_eps), w, "attn_q_b")
    else:
        q = m.linear(x, w, "attn_q")  # [B,T,H·D]
    tap("Qcur_pre", q)
    q = q.reshape(*q.shape[:2], config.n_head, -1)  # [B,T,H,D]
    c, k_turning = torch.split(m.linear(x, w, "attn_kv_a_mqa"), [kv_rank, R], dim=-1)  # [B,T,C], [B,T,R]
    c = m.norm(c, w, "attn_kv_a_norm", "rms", config.norm_eps)
    k_still, v = from_latent(c, w, config, m)  # [B,T,H,D−R], [B,T,H,Dv]
    k_turning = m.rotate(k_turning[:, :, None], rope, "k").expand(-1, -1, config.n_head, -1)  # [B,T,H,R]
    q = torch.cat([q[..., :-R], m.rotate(q[..., -R:], rope, "q")], dim=-1)
    k = torch.cat([k_still, k_turning], dim=-1)
    tap("Qcur", q.flatten(-2))
    tap("Kcur", k.flatten(-2))
    tap("Vcur", v.flatten(-2))
    return q, k, v


def from_latent(c: Tensor, w: Mapping[str, Tensor], config: ModelConfig, m: Arithmetic) -> tuple[Tensor, Tensor]:
    """The still channels of k [B,T,H,N] and v [B,T,H,Dv] from what the cache would hold, c [B,T,C]."""
    if "attn_kv_b.weight" in w:
        both = m.linear(c, w, "attn_kv_b").reshape(*c.shape[:2], config.n_head, -1)  # [B,T,H,N+Dv]
        N = both.shape[-1] - (config.value_dim or config.head_dim)
        return both[..., :N], both[..., N:]
    return m.by_head(c, w)
