"""The operations of a decoder layer as pure functions.  Results have the dtype of the input."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from quantscope.arch.config import Activation


@dataclass(frozen=True, eq=False)
class Scores:
    """What a layer does to its attention scores besides the scale and the causal mask.

    window: [tokens] a query sees itself and the window − 1 positions before it, 0: all of them.  softcap: c · tanh(score / c), 0: none.
    alibi: the largest bias of ALiBi, 0: none.  sinks: [H] a score of each head that no value goes with, None: there are none.
    """

    window: int = 0
    softcap: float = 0.0
    alibi: float = 0.0
    sinks: Tensor | None = None

    @property
    def plain(self) -> bool:
        return not (self.window or self.softcap or self.alibi or self.sinks is not None)


PLAIN = Scores()


@contextmanager
def exact_matmul() -> Iterator[None]:
    """Float32 products in float32 inside the block: no TF32 on CUDA, no bfloat16 on the CPU, whatever the program has set."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / √(mean(x²) + eps) · weight, over the last axis; a norm without a weight has None.

    x: [...,E], weight: [E]; the mean in float64, as ggml does, so that the order of summation does not show.
    """
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float64)  # [...,1] √Σx² in float64
    normed = x * (norm.square() / x.shape[-1] + eps).rsqrt().to(x.dtype)
    return normed if weight is None else normed * weight


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x − mean(x)) / √(mean((x − mean(x))²) + eps) · weight + bias, over the last axis; mean and variance in float64."""
    centred = x.double() - x.mean(-1, keepdim=True, dtype=torch.float64)
    normed = (centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)
    normed = normed if weight is None else normed * weight
    return normed if bias is None else normed + bias


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


OAI_ALPHA, OAI_LIMIT = 1.702, 7.0  # of gpt-oss
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": partial(F.gelu, approximate="tanh"),
    "gelu_erf": F.gelu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def activate(kind: Activation, x: Tensor, up: Tensor | None) -> Tensor:
    """f(x) · up, or f(x) where there is no gate: [...,F] each → [...,F].

    gelu(x) = x·Φ(x) in the form with tanh, gelu_erf in the exact one, relu2(x) = max(x, 0)²,
    swiglu_oai = a · sigmoid(1.702·a) · (1 + b), a = min(x, 7), b = up cut to ± 7
    """
    if kind == "swiglu_oai" and up is not None:
        a = x.clamp(max=OAI_LIMIT)
        return a * (OAI_ALPHA * a).sigmoid() * (1 + up.clamp(-OAI_LIMIT, OAI_LIMIT))
    made = ACTIVATIONS[kind](x)
    return made if up is None else made * up


def by_head(x: Tensor, w: Mapping[str, Tensor], name: str) -> Tensor:
    """x_h · W_hᵀ of every head h: x [B,T,H,in], W [H,out,in] → [B,T,H,out]."""
    return torch.einsum("bthi,hoi->btho", x, w[f"{name}.weight"])


def expert_matrix(w: Mapping[str, Tensor], name: str, e: int) -> Tensor:
    """Matrix e [out,in] of a stack [n_expert,out,in]; only that one is decoded where the weights can do so."""
    part = getattr(w, "part", None)
    return w[name][e] if part is None else part(name, e)


def expert_linear(x: Tensor, w: Mapping[str, Tensor], name: str, e: int) -> Tensor:
    """x · Wₑᵀ · scaleₑ + biasₑ of expert e: [n,in] → [n,out]."""
    return expert_scaled_and_shifted(F.linear(x, expert_matrix(w, f"{name}.weight", e)), w, name, e)


def expert_scaled_and_shifted(y: Tensor, w: Mapping[str, Tensor], name: str, e: int) -> Tensor:
    """The part of ``expert_linear`` after the product: · scaleₑ + biasₑ, where ``w`` has them."""
    scale, bias = w.get(f"{name}.scale"), w.get(f"{name}.bias")
    y = y if scale is None else y * scale[e]
    return y if bias is None else y + bias[e]


SMALLEST_SUM = 6.103515625e-5  # the smallest normal float16: what llama.cpp divides the weights of experts by at least


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, how: Scores = PLAIN) -> Tensor:
    """softmax(q·kᵀ·scale + mask)·v; query t of T sees the keys 0 … S−T+t, or the last ``how.window`` of them.

    q: [B,T,H,D], k and v: [B,S,K,D], each key/value head serving H/K query heads → [B,T,H,D].  torch's fused attention never holds
    the probabilities [B,H,T,S] and is up to three times as fast as the two products; who wants to see them asks ``attention_map``.
    """
    if how.softcap or how.alibi or how.sinks is not None:
        return weighted_values(attention_map(q, k, scale, how), v)
    T, S, G = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    seen = None if T == S and not how.window else ~hidden(T, S, how.window, q.device)  # torch's own causal mask counts from the first key
    q, k, v = (z.transpose(1, 2) for z in (q, k.repeat_interleave(G, 2), v.repeat_interleave(G, 2)))  # [B,H,T,D], [B,H,S,D] twice
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None, scale=scale).transpose(1, 2)


def attention_map(q: Tensor, k: Tensor, scale: float, how: Scores = PLAIN) -> Tensor:
    """The probabilities of ``causal_attention``, softmax(q·kᵀ·scale + mask): [B,T,H,D], [B,S,K,D] → [B,H,T,S].

    One key/value head at a time: the largest intermediate is [B,H/K,T,S].
    """
    G, n_head = q.shape[2] // k.shape[2], q.shape[2]
    probs = []
    for n, (group, keys) in enumerate(zip(q.chunk(k.shape[2], dim=2), k.unbind(2), strict=True)):
        scores = torch.einsum("btgd,bsd->bgts", group, keys) * scale  # [B,G,T,S]
        probs.append(probabilities(scores, how, slice(n * G, (n + 1) * G), n_head))
    return torch.cat(probs, dim=1)


def probabilities(scores: Tensor, how: Scores, heads: slice, n_head: int) -> Tensor:
    """The softmax of scaled scores [B,G,T,S] of these heads of n_head: soft cap, ALiBi, mask and sinks included."""
    T, S = scores.shape[-2:]
    scores = (scores if how.plain else biased(scores, how, heads, n_head)).masked_fill(hidden(T, S, how.window, scores.device), -torch.inf)
    return scores.softmax(-1) if how.sinks is None else with_sinks(scores, how.sinks[heads])


def biased(scores: Tensor, how: Scores, heads: slice, n_head: int) -> Tensor:
    """Soft cap and ALiBi on the scores [B,G,T,S] of these heads."""
    if how.softcap:
        scores = how.softcap * (scores / how.softcap).tanh()
    if how.alibi:
        T, S = scores.shape[-2:]
        distance = torch.arange(S, device=scores.device) - torch.arange(S - T, S, device=scores.device)[:, None]  # key − query, [T,S]
        slopes = alibi_slopes(n_head, how.alibi)[heads].to(scores.device, scores.dtype)  # [G]
        scores = scores + slopes[:, None, None] * distance
    return scores


def alibi_slopes(n_head: int, max_bias: float) -> Tensor:
    """Slope of each head, float64 [n_head]: 2^(−max_bias·(h+1)/n), n the power of two ≤ n_head; the heads from n on lie between.

    Source: "Train Short, Test Long", arXiv:2108.12409, and ``ggml_compute_forward_soft_max_f32`` for n_head that is no power of two.
    """
    n = 2 ** math.floor(math.log2(n_head))
    h = torch.arange(n_head, dtype=torch.float64)
    return torch.where(h < n, 2.0 ** (-max_bias / n * (h + 1)), 2.0 ** (-max_bias / 2 / n * (2 * (h - n) + 1)))


def with_sinks(scores: Tensor, sinks: Tensor) -> Tensor:
    """softmax over the keys and one more score a head: scores [B,G,T,S], sinks [G] → [B,G,T,S], whose rows sum to less than 1."""
    more = sinks[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat([scores, more], dim=-1).softmax(-1)[..., :-1]


def weighted_values(probs: Tensor, v: Tensor) -> Tensor:
    """Σₛ probs·v, the key/value head k serving the H/K query heads from k·H/K on: [B,H,T,S], [B,S,K,D] → [B,T,H,D]."""
    return torch.einsum("bhts,bshd->bthd", probs, v.repeat_interleave(probs.shape[1] // v.shape[2], 2))


def hidden(T: int, S: int, window: int, device: torch.device) -> Tensor:
    """True where query t must not look: keys after S−T+t, and with a window those up to S−T+t−window.  Bool [T,S]."""
    every = torch.ones(T, S, dtype=torch.bool, device=device)
    later = every.triu(S - T + 1)
    return later | every.tril(S - T - window) if window else later
