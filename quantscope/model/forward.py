"""The reference forward: a transformer decoder, as the paper writes it.

    h = embed(ids)      per layer: h = h + attention(norm(h)), h = h + ffn(norm(h))      logits = head(norm(h))

Each stage is a pure function of the hidden state and that stage's weights, so several variants of a model can walk together
while one layer's weights are in memory.  What an architecture adds (biases, scales, q/k norms) is present in the layer's
weights or it is not: nothing here asks for the architecture's name.  Activations have the dtype of the weights.  How an operation is
computed is the business of ``arithmetic.py``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantscope.arch.config import ModelConfig
from quantscope.errors import PromptError
from quantscope.model.arithmetic import EXACT, Arithmetic
from quantscope.model.ops import exact_matmul
from quantscope.model.rope import RopeTables
from quantscope.model.taps import Tap, at_layer, no_tap, wants
from quantscope.weights import WeightProvider


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


@torch.no_grad()
def forward(
    ids: Tensor,
    weights: WeightProvider,
    tap: Tap = no_tap,
    *,
    dtype: torch.dtype = torch.float32,
    cache: KVCache | None = None,
    arithmetic: Arithmetic = EXACT,
) -> Tensor:
    """Logits of every position: ids [B,T] int64 → [B,T,V].

    dtype: of weights and activations, float32 or float64.  cache: filled by earlier calls; ids continue after its positions.
    arithmetic: how the operations are computed; that of ggml is float32 on the CPU.
    Raises PromptError for an empty or too long prompt and for ids that are no token's.
    """
    config, n_past = weights.config, cache.n_past if cache else 0
    check_ids(ids, config, n_past)
    with exact_matmul():
        h = embed(ids, weights, tap, dtype=dtype, arithmetic=arithmetic)
        rope = tables(h, weights, dtype=dtype, n_past=n_past, arithmetic=arithmetic)
        for i in range(config.n_layer):
            h = layer(h, arithmetic.layer(weights, i, dtype), i, config, rope, tap, cache, arithmetic)
        return head(h, arithmetic.top(weights, dtype), config, tap, arithmetic)


def embed(
    ids: Tensor, weights: WeightProvider, tap: Tap = no_tap, *, dtype: torch.dtype = torch.float32, arithmetic: Arithmetic = EXACT
) -> Tensor:
    """Rows of token_embd.weight: ids [B,T] → [B,T,E]."""
    h = arithmetic.embed(weights, ids, dtype)  # [B,T,E]
    tap("embd", h)
    return h


def tables(
    h: Tensor, weights: WeightProvider, *, dtype: torch.dtype = torch.float32, n_past: int = 0, arithmetic: Arithmetic = EXACT
) -> RopeTables:
    """RoPE tables of the positions n_past … n_past + T − 1 of h [B,T,E], on its device; the same for every layer."""
    positions = torch.arange(n_past, n_past + h.shape[1], device=h.device)
    return arithmetic.rope_tables(weights.config.rope, positions, weights.rope_factors(), dtype)


def layer(
    h: Tensor,
    w: Mapping[str, Tensor],
    i: int,
    config: ModelConfig,
    rope: RopeTables,
    tap: Tap = no_tap,
    cache: KVCache | None = None,
    m: Arithmetic = EXACT,
) -> Tensor:
    """One decoder layer: h [B,T,E], w the weights of layer i by local name ("attn_q.weight") → [B,T,E]."""
    tap = at_layer(tap, i)
    h = m.residual(h, attention(m.rms_norm(h, w, "attn_norm", config.norm_eps), w, i, config, rope, tap, cache, m), "attn")  # [B,T,E]
    tap("ffn_inp", h)
    h = m.residual(h, ffn(m.rms_norm(h, w, "ffn_norm", config.norm_eps), w, tap, m), "ffn")  # [B,T,E]
    tap("l_out", h)
    return h


def attention(
    x: Tensor,
    w: Mapping[str, Tensor],
    i: int,
    config: ModelConfig,
    rope: RopeTables,
    tap: Tap = no_tap,
    cache: KVCache | None = None,
    m: Arithmetic = EXACT,
) -> Tensor:
    """Causal attention with grouped key/value heads: normed x [B,T,E] → [B,T,E]."""
    tap("attn_norm", x)
    q, k, v = (m.linear(x, w, name) for name in ("attn_q", "attn_k", "attn_v"))  # [B,T,H·D], [B,T,K·D] twice
    for name, projected in (("Qcur_pre", q), ("Kcur_pre", k), ("Vcur", v)):
        tap(name, projected)
    q, k, v = (z.reshape(*z.shape[:2], -1, config.head_dim) for z in (q, k, v))  # [B,T,H,D], [B,T,K,D] twice
    if "attn_q_norm.weight" in w:
        q, k = m.rms_norm(q, w, "attn_q_norm", config.norm_eps), m.rms_norm(k, w, "attn_k_norm", config.norm_eps)
        tap("Qcur_normed", q.flatten(-2))
        tap("Kcur_normed", k.flatten(-2))
    q, k = m.rotate(q, rope, "q"), m.rotate(k, rope, "k")
    tap("Qcur", q.flatten(-2))
    tap("Kcur", k.flatten(-2))
    if cache is not None:
        k, v = cache.append(i, k, v)  # [B,S,K,D]
    if wants(tap, "kq_soft_max"):
        tap("kq_soft_max", m.attention_map(q, k, config.kq_scale))  # [B,H,T,S]
    mixed = m.attention(q, k, v, config.kq_scale).flatten(-2)  # [B,T,H·D]
    tap("kqv_out", mixed)
    out = m.linear(mixed, w, "attn_output")  # [B,T,E]
    tap("attn_out", out)
    return out


def ffn(x: Tensor, w: Mapping[str, Tensor], tap: Tap = no_tap, m: Arithmetic = EXACT) -> Tensor:
    """down(silu(gate(x)) · up(x)): normed x [B,T,E] → [B,T,E]."""
    tap("ffn_norm", x)
    gate, up = (m.linear(x, w, name, scale_last=True) for name in ("ffn_gate", "ffn_up"))  # [B,T,F] each
    tap("ffn_gate", gate)
    tap("ffn_up", up)
    act = m.swiglu(gate, up)  # [B,T,F]
    tap("ffn_swiglu", act)
    out = m.linear(act, w, "ffn_down", scale_last=True)  # [B,T,E]
    tap("ffn_out", out)
    return out


def head(h: Tensor, w: Mapping[str, Tensor], config: ModelConfig, tap: Tap = no_tap, m: Arithmetic = EXACT) -> Tensor:
    """Logits: h [B,T,E] → [B,T,V]; w holds "output_norm.weight" and "output.weight" (token_embd.weight where tied)."""
    x = output_norm(h, w, config, tap, m)  # [B,T,E]
    logits = m.linear(x, w, "output")  # [B,T,V]
    tap("result_output", logits)
    return logits


def output_norm(h: Tensor, w: Mapping[str, Tensor], config: ModelConfig, tap: Tap = no_tap, m: Arithmetic = EXACT) -> Tensor:
    """The norm before the output matrix: h [B,T,E] → [B,T,E]."""
    x = m.rms_norm(h, w, "output_norm", config.norm_eps)  # [B,T,E]
    tap("result_norm", x)
    return x


def check_ids(ids: Tensor, config: ModelConfig, n_past: int = 0) -> None:
    """Raise PromptError unless 1 ≤ T, n_past + T ≤ n_ctx and 0 ≤ id < n_vocab."""
    if ids.numel() == 0:
        raise PromptError("the prompt is empty, expected at least one token. Give one with `--prompt TEXT` or `--tokens 1,2,3`.")
    n = n_past + ids.shape[1]
    if n > config.n_ctx:
        raise PromptError(
            f"the prompt has {n} tokens, expected at most {config.n_ctx}, the context the model was trained for. "
            f"Shorten it, or split a text into chunks with `--text FILE --ctx {config.n_ctx}`."
        )
    outside = ids[(ids < 0) | (ids >= config.n_vocab)]
    if outside.numel():
        raise PromptError(
            f"token id {int(outside[0])} is no token of this model, expected 0 to {config.n_vocab - 1}. "
            f"The ids come from another model's tokenizer: give the text with `--prompt TEXT`."
        )
