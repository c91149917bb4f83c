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
    mean_square = x.double().square().mean(-1, keepdim=True)  # [...,1] in float64
    return x * (mean_square + eps).rsqrt().to(x.dtype) * weight


def linear(x: Tensor, w: Mapping[str, Tensor], name: str, *, scale_last: bool = False) -> Tensor:
    """x · Wᵀ · scale + bias, or (x · Wᵀ + bias) · scale if ``scale_last``, with scale and bias where ``w`` has them.

    x: [...,in], W = w[name.weight]: [out,in], scale: [1], bias: [out] → [...,out].  llama.cpp, whose tensors the scales are,
    applies them after the bias in the feed-forward and before it everywhere else (``build_lora_mm`` and ``build_ffn``).
    """
    y = F.linear(x, w[f"{name}.weight"])
    scale, bias = w.get(f"{name}.scale"), w.get(f"{name}.bias")
    if scale is not None and not scale_last:
        y = y * scale
    if bias is not None:
        y = y + bias
    return y * scale if scale is not None and scale_last else y


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up with silu(x) = x / (1 + e⁻ˣ)."""
    return F.silu(gate) * up


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, *, keep: bool = False) -> tuple[Tensor, Tensor | None]:
    """softmax(q·kᵀ·scale + mask)·v; query t of T sees the keys 0 … S−T+t.

    q: [B,T,H,D], k and v: [B,S,K,D], each key/value head serving H/K query heads → [B,T,H,D], and the probabilities
    [B,H,T,S] if ``keep``.  One key/value head at a time: the largest intermediate is [B,H/K,T,S].
    """
    T, S, n_head_kv = q.shape[1], k.shape[1], k.shape[2]
    hidden = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1)  # [T,S]
    outs, probs = [], []
    for group, keys, values in zip(q.chunk(n_head_kv, dim=2), k.unbind(2), v.unbind(2), strict=True):
        scores = torch.einsum("btgd,bsd->bgts", group, keys) * scale  # [B,G,T,S]
        p = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        outs.append(torch.einsum("bgts,bsd->btgd", p, values))
        if keep:
            probs.append(p)
    return torch.cat(outs, dim=2), torch.cat(probs, dim=1) if keep else None
