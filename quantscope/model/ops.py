"""The operations of a decoder layer as pure functions.  Results have the dtype of the input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor


@contextmanager
def exact_matmul() -> Iterator[None]:
    """Float32 products in float32 inside the block: no TF32 on CUDA, no bfloat16 on the CPU, whatever the program has set."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean(x²) + eps) · weight, over the last axis.

    x: [...,E], weight: [E]; the mean in float64, as ggml does, so that the order of summation does not show.
    """
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float64)  # [...,1] √Σx² in float64
    return x * (norm.square() / x.shape[-1] + eps).rsqrt().to(x.dtype) * weight


def linear(x: Tensor, w: Mapping[str, Tensor], name: str, *, scale_last: bool = False) -> Tensor:
    """x · Wᵀ · scale + bias, or (x · Wᵀ + bias) · scale if ``scale_last``, with scale and bias where ``w`` has them.

    x: [...,in], W = w[name.weight]: [out,in], scale: [1], bias: [out] → [...,out].  llama.cpp, whose tensors the scales are,
    applies them after the bias in the feed-forward and before it everywhere else (``build_lora_mm`` and ``build_ffn``).
    """
    return scaled_and_shifted(F.linear(x, w[f"{name}.weight"]), w, name, scale_last=scale_last)


def scaled_and_shifted(y: Tensor, w: Mapping[str, Tensor], name: str, *, scale_last: bool = False) -> Tensor:
    """The part of ``linear`` after the product y: [...,out] → [...,out]."""
    scale, bias = w.get(f"{name}.scale"), w.get(f"{name}.bias")
    if scale is not None and not scale_last:
        y = y * scale
    if bias is not None:
        y = y + bias
    return y * scale if scale is not None and scale_last else y


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up with silu(x) = x / (1 + e⁻ˣ)."""
    return F.silu(gate).mul_(up)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(q·kᵀ·scale + mask)·v; query t of T sees the keys 0 … S−T+t.

    q: [B,T,H,D], k and v: [B,S,K,D], each key/value head serving H/K query heads → [B,T,H,D].  torch's fused attention never holds
    the probabilities [B,H,T,S] and is up to three times as fast as the two products; who wants to see them asks ``attention_map``.
    """
    T, S, G = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    seen = None if T == S else ~_future(T, S, q.device)  # torch's own causal mask counts from the first key
    q, k, v = (z.transpose(1, 2) for z in (q, k.repeat_interleave(G, 2), v.repeat_interleave(G, 2)))  # [B,H,T,D], [B,H,S,D] twice
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None, scale=scale).transpose(1, 2)


def attention_map(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """The probabilities of ``causal_attention``, softmax(q·kᵀ·scale + mask): [B,T,H,D], [B,S,K,D] → [B,H,T,S].

    One key/value head at a time: the largest intermediate is [B,H/K,T,S].
    """
    future = _future(q.shape[1], k.shape[1], q.device)
    probs = []
    for group, keys in zip(q.chunk(k.shape[2], dim=2), k.unbind(2), strict=True):
        scores = torch.einsum("btgd,bsd->bgts", group, keys) * scale  # [B,G,T,S]
        probs.append(scores.masked_fill(future, -torch.inf).softmax(-1))
    return torch.cat(probs, dim=1)


def weighted_values(probs: Tensor, v: Tensor) -> Tensor:
    """Σₛ probs·v, the key/value head k serving the H/K query heads from k·H/K on: [B,H,T,S], [B,S,K,D] → [B,T,H,D]."""
    return torch.einsum("bhts,bshd->bthd", probs, v.repeat_interleave(probs.shape[1] // v.shape[2], 2))


def _future(T: int, S: int, device: torch.device) -> Tensor:
    """True where query t must not look: keys after S−T+t.  Bool [T,S]."""
    return torch.ones(T, S, dtype=torch.bool, device=device).triu(S - T + 1)
