"""The reference forward: a transformer decoder, as the paper writes it.

    h = embed(ids)      per layer: h = h + attention(norm(h)), h = h + ffn(norm(h))      logits = head(norm(h))

Each stage is a pure function of the hidden state and that stage's weights, so several variants of a model can walk together
while one layer's weights are in memory.  What an architecture adds (biases, q/k norms, experts, a window) is present in the layer's
weights or in the config, or it is not: nothing here asks for the architecture's name.  Activations have the dtype of the weights.
How an operation is computed is the business of ``arithmetic.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from quantscope.arch.config import ModelConfig
from quantscope.errors import PromptError
from quantscope.model.arithmetic import EXACT, Arithmetic
from quantscope.model.attention import KVCache, attention
from quantscope.model.feed_forward import feed_forward
from quantscope.model.ops import exact_matmul
from quantscope.model.rope import RopeTables
from quantscope.model.taps import Tap, at_layer, no_tap
from quantscope.weights import WeightProvider

__all__ = ["KVCache", "Ropes", "check_ids", "embed", "embedded", "forward", "head", "layer", "logits", "output_norm", "tables"]


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
        h = embed(ids, weights, tap, dtype=dtype, positions=torch.arange(n_past, n_past + ids.shape[1]), arithmetic=arithmetic)
        ropes = tables(h, weights, dtype=dtype, n_past=n_past, arithmetic=arithmetic)
        for i in range(config.n_layer):
            h = layer(h, arithmetic.layer(weights, i, dtype), i, config, ropes, tap, cache, arithmetic)
        return head(h, arithmetic.top(weights, dtype), config, tap, arithmetic)


def embed(
    ids: Tensor,
    weights: WeightProvider,
    tap: Tap = no_tap,
    *,
    dtype: torch.dtype = torch.float32,
    positions: Tensor | None = None,
    arithmetic: Arithmetic = EXACT,
) -> Tensor:
    """The input of the first layer: rows of token_embd.weight for the ids [B,T], scaled, with positions, normed → [B,T,E].

    positions: int64 [T]; None: from 0 on.
    """
    h = embedded(arithmetic.embed(weights, ids, dtype), weights, positions=positions, arithmetic=arithmetic)
    tap("embd", h)
    return h


def embedded(rows: Tensor, weights: WeightProvider, *, positions: Tensor | None = None, arithmetic: Arithmetic = EXACT) -> Tensor:
    """What ``embed`` makes of rows of token_embd.weight, whichever they are: [B,T,E] → [B,T,E]."""
    config, names, h = weights.config, weights.top_names(), rows
    if config.embedding_scale != 1:
        h = h * config.embedding_scale
    if "position_embd.weight" in names:
        at = torch.arange(rows.shape[1]) if positions is None else positions
        h = h + weights.rows("position_embd.weight", at).to(rows.dtype)  # [T,E]
    if "token_embd_norm.weight" in names:
        h = arithmetic.norm(h, arithmetic.top(weights, rows.dtype), "token_embd_norm", config.block.norm, config.norm_eps)
    return h


class Ropes(NamedTuple):
    """The RoPE tables of a run: of the layers that see everything, and of those with a window; None where nothing turns."""

    everywhere: RopeTables | None
    windowed: RopeTables | None

    def of(self, config: ModelConfig, i: int) -> RopeTables | None:
        """The tables of layer i."""
        if config.rope_of(i) is None:
            return None
        return self.windowed if config.window_of(i) else self.everywhere


def tables(
    h: Tensor, weights: WeightProvider, *, dtype: torch.dtype = torch.float32, n_past: int = 0, arithmetic: Arithmetic = EXACT
) -> Ropes:
    """RoPE tables of the positions n_past … n_past + T − 1 of h [B,T,E], on its device."""
    config = weights.config
    if config.rope.dim == 0:
        return Ropes(None, None)
    positions = torch.arange(n_past, n_past + h.shape[1], device=h.device)
    everywhere = arithmetic.rope_tables(config.rope, positions, weights.rope_factors(n_past + h.shape[1]), dtype)
    own = config.window_rope
    return Ropes(everywhere, everywhere if own is None else arithmetic.rope_tables(own, positions, None, dtype))


def layer(
    h: Tensor,
    w: Mapping[str, Tensor],
    i: int,
    config: ModelConfig,
    ropes: Ropes,
    tap: Tap = no_tap,
    cache: KVCache | None = None,
    m: Arithmetic = EXACT,
) -> Tensor:
    """One decoder layer: h [B,T,E], w the weights of layer i by local name ("attn_q.weight") → [B,T,E]."""
    tap, b = at_layer(tap, i), config.block
    x = normed(h, w, b.attn_norm, "attn_norm", config, tap, m)
    y = normed(h, w, "attn_norm_2", "attn_norm_2", config, tap, m) if "attn_norm_2.weight" in w else x
    attended = branch(attention(y, w, i, config, ropes.of(config, i), tap, cache, m), w, b.attn_post_norm, "attn_post_norm", config, tap, m)
    if b.parallel:
        x = normed(h, w, b.ffn_norm, "ffn_norm", config, tap, m) if b.ffn_norm else x
    else:
        h = m.residual(h, attended, "attn")  # [B,T,E]
        tap("ffn_inp", h)
        x = normed(h, w, b.ffn_norm, "ffn_norm", config, tap, m)
    added = branch(feed_forward(x, w, config, tap, m), w, b.ffn_post_norm, "ffn_post_norm", config, tap, m)
    h = m.residual(h, attended + added if b.parallel else added, "ffn")  # [B,T,E]
    tap("l_out", h)
    return h


def normed(h: Tensor, w: Mapping[str, Tensor], name: str, stem: str, config: ModelConfig, tap: Tap, m: Arithmetic) -> Tensor:
    """norm(h) [B,T,E], shown as the tap ``stem``; h itself where the norm has no name."""
    if not name:
        return h
    x = m.norm(h, w, name, config.block.norm, config.norm_eps)
    tap(stem, x)
    return x


def branch(x: Tensor, w: Mapping[str, Tensor], norm: str, stem: str, config: ModelConfig, tap: Tap, m: Arithmetic) -> Tensor:
    """What a branch adds to the stream: x [B,T,E], normed and scaled where the model does that."""
    x = normed(x, w, norm, stem, config, tap, m)
    return x if config.residual_scale == 1 else x * config.residual_scale


def head(h: Tensor, w: Mapping[str, Tensor], config: ModelConfig, tap: Tap = no_tap, m: Arithmetic = EXACT) -> Tensor:
    """Logits: h [B,T,E] → [B,T,V]; w holds "output_norm.weight" and "output.weight" (token_embd.weight where tied)."""
    x = output_norm(h, w, config, tap, m)  # [B,T,E]
    y = logits(x, w, config, m)  # [B,T,V]
    tap("result_output", y)
    return y


def logits(x: Tensor, w: Mapping[str, Tensor], config: ModelConfig, m: Arithmetic = EXACT) -> Tensor:
    """The output matrix, scaled and capped where the model does that: normed x [...,E] → [...,V]."""
    y = m.linear(x, w, "output")
    if config.logit_scale != 1:
        y = y * config.logit_scale
    return config.logit_softcap * (y / config.logit_softcap).tanh() if config.logit_softcap else y


def output_norm(h: Tensor, w: Mapping[str, Tensor], config: ModelConfig, tap: Tap = no_tap, m: Arithmetic = EXACT) -> Tensor:
    """The norm before the output matrix: h [B,T,E] → [B,T,E]."""
    x = m.norm(h, w, "output_norm", config.block.norm, config.norm_eps)  # [B,T,E]
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
