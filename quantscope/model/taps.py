"""Where the forward can be observed: tap names, in graph order, and what a tap is.

Names are llama.cpp's callback names, the layer as suffix.  ``kq_soft_max`` is [B,H,T,S] (S = T + cached positions), every other
tap is [B,T,channels]; the channels of q, k and v run over heads, then over the head's channels in GGUF's (canonical) order.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Protocol

from torch import Tensor

CHOSEN = "ffn_moe_topk"
EMBD = "embd"  # [B,T,E] token embeddings, the input of layer 0

# In the order of the graph, once a layer; `blk` i appends "-i".
LAYER_TAPS = (
    "attn_norm",  # [B,T,E] normed input of the attention
    "attn_norm_2",  # [B,T,E] only where the attention's norm is not that of the feed-forward beside it (falcon 40B)
    "wqkv",  # [B,T,H·D+2K·D] only where q, k and v are one product
    "Qcur_pre",  # [B,T,H·D] q as projected (scale and bias included)
    "Kcur_pre",  # [B,T,K·D]
    "Vcur",  # [B,T,K·D]
    "Qcur_normed",  # [B,T,H·D] only where the architecture norms q and k (qwen3)
    "Kcur_normed",  # [B,T,K·D]
    "Qcur",  # [B,T,H·D] after RoPE
    "Kcur",  # [B,T,K·D]
    "Qcur_latent",  # [B,T,H·(C+R)] only where latent attention has matrices of each head: q times k_b, and the part that turns
    "Kcur_latent",  # [B,T,C+R] what its cache holds: the latent vector, which is the value too, and the part that turns
    "kq_soft_max",  # [B,H,T,S] attention probabilities
    "kqv_out",  # [B,T,H·D] weighted values, before the output projection
    "attn_out",  # [B,T,E]
    "attn_post_norm",  # [B,T,E] only where what the attention adds is normed (gemma2)
    "ffn_inp",  # [B,T,E] residual stream after the attention; none where the feed-forward runs beside it
    "ffn_norm",  # [B,T,E]
    "ffn_moe_logits",  # [B,T,X] of the router: X experts
    "ffn_moe_probs",  # [B,T,X]
    CHOSEN,  # [B,T,n_used] numbers of the chosen experts, the most probable first
    "ffn_moe_weights",  # [B,T,n_used] what their outputs are multiplied by
    "ffn_moe_gate",  # [B,T,n_used·M] of the chosen experts one after the other
    "ffn_moe_up",  # [B,T,n_used·M]
    "ffn_moe_swiglu",  # [B,T,n_used·M]
    "ffn_moe_down",  # [B,T,n_used·E]
    "ffn_moe_out",  # [B,T,E] their weighted sum
    "ffn_gate",  # [B,T,F] of a layer with experts: of the shared ones, [B,T,S]
    "ffn_up",  # [B,T,F]; [B,T,2F] where gate and up are one product
    "ffn_swiglu",  # [B,T,F] silu(gate) · up, or what the model has in its place: GELU, ReLU² ...
    "ffn_shexp",  # [B,T,E] of the shared experts
    "ffn_shexp_out",  # [B,T,E] the same times a gate of its own (qwen2moe)
    "ffn_out",  # [B,T,E]
    "ffn_post_norm",  # [B,T,E] only where what the feed-forward adds is normed
    "l_out",  # [B,T,E] residual stream after the layer
)
# those of a model like Llama; the others are there where an architecture has such an operation
USUAL_TAPS = (
    "attn_norm", "Qcur_pre", "Kcur_pre", "Vcur", "Qcur_normed", "Kcur_normed", "Qcur", "Kcur", "kq_soft_max", "kqv_out", "attn_out",
    "ffn_inp", "ffn_norm", "ffn_gate", "ffn_up", "ffn_swiglu", "ffn_out", "l_out",
)  # fmt: skip
HEAD_TAPS = ("result_norm", "result_output")  # [B,T,E], [B,T,V] logits

# Tap without its layer → the matrices that multiply it, in the order of the graph.
READ_BY: dict[str, tuple[str, ...]] = {
    "attn_norm": ("attn_q", "attn_k", "attn_v"),
    "kqv_out": ("attn_output",),
    "ffn_norm": ("ffn_gate", "ffn_up"),
    "ffn_swiglu": ("ffn_down",),
    "result_norm": ("output",),
}
READ_IN_LAYER = {tap: matrices for tap, matrices in READ_BY.items() if tap in LAYER_TAPS}

# Tap without its layer → what its channels are proportional to: a norm's weight, or the matrix whose rows make them.
MAKERS: dict[str, str] = {"attn_norm": "attn_norm", "ffn_norm": "ffn_norm", "kqv_out": "attn_v", "ffn_swiglu": "ffn_up"}


class Tap(Protocol):
    """Called with every tap's name and tensor.  An object with ``wants(name) -> bool`` is asked before a costly tensor is kept."""

    def __call__(self, name: str, x: Tensor, /) -> None: ...


def no_tap(name: str, x: Tensor, /) -> None:
    """Observe nothing."""


def wants(tap: Tap, name: str) -> bool:
    """Whether the tap will look at this name; a plain function looks at all of them, ``no_tap`` at none."""
    ask = getattr(tap, "wants", None)
    return tap is not no_tap if ask is None else bool(ask(name))


class _LayerTap:
    """Passes "name" on as "name-i"."""

    def __init__(self, tap: Tap, i: int) -> None:
        self.tap, self.i = tap, i

    def wants(self, name: str) -> bool:
        return wants(self.tap, f"{name}-{self.i}")

    def __call__(self, name: str, x: Tensor, /) -> None:
        self.tap(f"{name}-{self.i}", x)


def at_layer(tap: Tap, i: int) -> Tap:
    """The tap as layer i sees it: local names go in, "name-i" comes out."""
    return no_tap if tap is no_tap else _LayerTap(tap, i)


def tap_names(n_layer: int) -> tuple[str, ...]:
    """All tap names of a model like Llama in graph order (those of q/k norms included); ``wiring.model_taps`` has those of any model."""
    return (EMBD, *(f"{name}-{i}" for i in range(n_layer) for name in USUAL_TAPS), *HEAD_TAPS)


def split_tap(name: str) -> tuple[str, int | None] | None:
    """``"l_out-3"`` → ("l_out", 3), ``"embd"`` → ("embd", None); None for a name that is no tap's."""
    stem, dash, layer = name.partition("-")
    if dash and stem in LAYER_TAPS and layer.isascii() and layer.isdigit() and len(layer) < 6:
        return stem, int(layer)
    return (name, None) if name == EMBD or name in HEAD_TAPS else None


def place_of(name: str) -> tuple[str, int | None]:
    """``split_tap``; a name that is no tap's is its own stem, in no layer."""
    return split_tap(name) or (name, None)


def stem_of(name: str) -> str:
    """``"l_out-3"`` → "l_out"; of a name that is no tap's, the name."""
    return place_of(name)[0]


def graph_order(name: str) -> tuple[float, int, str]:
    """A sort key: the order in which a forward passes the taps; names that are no tap's come last."""
    stem, layer = split_tap(name) or ("", None)
    if layer is not None:
        return layer, LAYER_TAPS.index(stem), name
    if stem in HEAD_TAPS:
        return math.inf, HEAD_TAPS.index(stem), name
    return (-1, 0, name) if stem == EMBD else (math.inf, len(HEAD_TAPS), name)


class Recorder:
    """A tap that keeps tensors: ``recorder.taps[name]``, those in ``wanted`` only, unless it is None."""

    def __init__(self, wanted: Collection[str] | None = None) -> None:
        self.wanted = wanted
        self.taps: dict[str, Tensor] = {}

    def wants(self, name: str) -> bool:
        return self.wanted is None or name in self.wanted

    def __call__(self, name: str, x: Tensor, /) -> None:
        if self.wants(name):
            self.taps[name] = x
