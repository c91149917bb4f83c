"""How the forward computes its operations: one object that holds all of them, so that an engine's rounding is another such object.

forward(ids, weights)                                float32 or float64, as the formulas say
forward(ids, weights, arithmetic=Ggml(kv="F16"))     with the roundings of ggml's CPU code (ggml_arithmetic.py)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from quantscope.arch.config import Activation, Norm, RopeConfig
from quantscope.model import ops, rope
from quantscope.model.ops import PLAIN, Scores, expert_matrix
from quantscope.model.rope import RopeTables
from quantscope.weights import LazyTensors, WeightProvider


class Arithmetic:
    """The operations of ``ops`` and ``rope``, with no rounding but that of the dtype.  A subclass replaces those that an engine rounds."""

    def embed(self, weights: WeightProvider, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of token_embd.weight: ids [B,T] → [B,T,E]."""
        return weights.rows("token_embd.weight", ids).to(dtype)

    def layer(self, weights: WeightProvider, i: int, dtype: torch.dtype) -> Mapping[str, Tensor]:
        """The tensors of layer i by local name, as ``linear`` wants them."""
        return cast(weights.layer(i), dtype)

    def top(self, weights: WeightProvider, dtype: torch.dtype) -> Mapping[str, Tensor]:
        """What the head needs, likewise."""
        return cast(weights.top(), dtype)

    def rope_tables(self, config: RopeConfig, positions: Tensor, factors: Tensor | None, dtype: torch.dtype) -> RopeTables:
        return rope.rope_tables(config, positions, factors, dtype)

    def rotate(self, x: Tensor, tables: RopeTables, which: Literal["q", "k"]) -> Tensor:
        return rope.rotate(x, tables)

    def rms_norm(self, x: Tensor, w: Mapping[str, Tensor], name: str, eps: float) -> Tensor:
        return ops.rms_norm(x, w.get(f"{name}.weight"), eps)

    def layer_norm(self, x: Tensor, w: Mapping[str, Tensor], name: str, eps: float) -> Tensor:
        return ops.layer_norm(x, w.get(f"{name}.weight"), w.get(f"{name}.bias"), eps)

    def norm(self, x: Tensor, w: Mapping[str, Tensor], name: str, kind: Norm, eps: float) -> Tensor:
        """The norm of a model: x [...,E] → [...,E]."""
        return self.rms_norm(x, w, name, eps) if kind == "rms" else self.layer_norm(x, w, name, eps)

    def linear(self, x: Tensor, w: Mapping[str, Tensor], name: str, *, scale_last: bool = False) -> Tensor:
        return ops.linear(x, w, name, scale_last=scale_last)

    def expert_linear(self, x: Tensor, w: Mapping[str, Tensor], name: str, e: int) -> Tensor:
        """The product with the matrix of one expert: [n,in] → [n,out]."""
        return ops.expert_linear(x, w, name, e)

    def by_head(self, x: Tensor, w: Mapping[str, Tensor], name: str) -> Tensor:
        """The products with a matrix of each head: [B,T,H,in] → [B,T,H,out]."""
        return ops.by_head(x, w, name)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float, how: Scores = PLAIN) -> Tensor:
        return ops.causal_attention(q, k, v, scale, how)

    def attention_map(self, q: Tensor, k: Tensor, scale: float, how: Scores = PLAIN) -> Tensor:
        return ops.attention_map(q, k, scale, how)

    def weighted_values(self, probs: Tensor, v: Tensor) -> Tensor:
        """The second half of ``attention``, from its first half: [B,H,T,S], [B,S,K,D] → [B,T,H,D]."""
        return ops.weighted_values(probs, v)

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        return ops.swiglu(gate, up)

    def activate(self, kind: Activation, gate: Tensor, up: Tensor | None) -> Tensor:
        """f(gate) · up, or f(gate) where the feed-forward has no gate."""
        return self.swiglu(gate, up) if kind == "silu" and up is not None else ops.activate(kind, gate, up)

    def residual(self, h: Tensor, x: Tensor, branch: Literal["attn", "ffn"]) -> Tensor:
        """h + x, x what a branch adds to the stream."""
        return h + x


EXACT = Arithmetic()


def cast(w: Mapping[str, Tensor], dtype: torch.dtype) -> Mapping[str, Tensor]:
    """The same tensors in another dtype, each converted when it is asked for."""
    return LazyTensors({name: name for name in w}, lambda name: w[name].to(dtype), lambda name, e: expert_matrix(w, name, e).to(dtype))
