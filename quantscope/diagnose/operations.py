"""The operations of the forward one by one, each a function of the taps it is made of: what ``model.forward`` does between two taps.

    operation(Place(arithmetic, weights ...), *inputs)  →  the output, [1,T,channels] or [1,H,T,S]

The formulas are those of the arithmetic; what is here is which of them makes a tap, with which weights.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from quantscope.arch.config import ModelConfig
from quantscope.language import mark
from quantscope.model.arithmetic import Arithmetic
from quantscope.model.attention import cut, gathered, head_norm, scores_of, tempered
from quantscope.model.feed_forward import activation, chosen_linear, expert_probabilities, expert_weights, shared_gate
from quantscope.model.forward import embed, layer, logits, tables
from quantscope.model.latent import absorbed, absorbs, latent_keys, latent_values, queries, turned_queries, written_out
from quantscope.model.rope import RopeTables
from quantscope.model.taps import place_of
from quantscope.model.wiring import BEFORE, Wiring, layer_wiring
from quantscope.weights import WeightProvider


@dataclass(frozen=True)
class Place:
    """Where an operation takes place: by which arithmetic, with which weights, in which layer, at which positions."""

    m: Arithmetic
    w: Mapping[str, Tensor]  # of the layer, or of the head
    weights: WeightProvider
    positions: Sequence[int]
    ids: Tensor | None  # of these positions, int64 [1,T]
    layer: int = 0

    @property
    def config(self) -> ModelConfig:
        return self.weights.config

    def heads(self, x: Tensor) -> Tensor:
        """[1,T,H·D] → [1,T,H,D]."""
        return x.reshape(*x.shape[:2], -1, self.config.head_dim)

    def rope(self, dtype: torch.dtype) -> RopeTables | None:
        """The tables of these positions; None in a layer that turns nothing."""
        rope = self.config.rope_of(self.layer)
        if rope is None:
            return None
        factors = self.weights.rope_factors(self.positions[-1] + 1) if rope is self.config.rope else None
        return self.m.rope_tables(rope, torch.tensor(self.positions), factors, dtype)


Operation: TypeAlias = Callable[..., Tensor]  # (place, [1,T,channels] for each input) → [1,T,channels]
NotReplayed: TypeAlias = None  # no operation: the tap is in the graph, and is not computed again
Way: TypeAlias = tuple[Operation | NotReplayed, tuple[str, ...]]  # and the taps it is computed from


def _linear(name: str) -> Operation:
    return lambda at, x: at.m.linear(x, at.w, name, scale_last=name.startswith("ffn"))


def _norm(name: str) -> Operation:
    return lambda at, x: at.m.norm(x, at.w, name, at.config.block.norm, at.config.norm_eps)


def _block_norm(field: Literal["attn_norm", "ffn_norm", "attn_post_norm", "ffn_post_norm"]) -> Operation:
    """The norm that the architecture has in this place, under whatever name."""
    return lambda at, x: _norm(getattr(at.config.block, field))(at, x)


def _head_norm(name: str) -> Operation:
    return lambda at, x: head_norm(at.heads(x), at.w, name, at.config, at.m).flatten(-2)


def _embedded(at: Place) -> Tensor:
    assert at.ids is not None
    return embed(at.ids, at.weights, positions=torch.tensor(at.positions), arithmetic=at.m)


def _projected(part: int, name: str) -> Operation:
    """q, k or v, from a matrix of its own, or its part of the product that they share."""

    def made(at: Place, x: Tensor) -> Tensor:
        if "attn_qkv.weight" in at.w:
            return torch.split(x, [at.config.axis(letter) for letter in "QKW"], dim=-1)[part]
        return cut(at.m.linear(x, at.w, name), at.config.clamp_qkv)

    return made


def _fused(at: Place, x: Tensor) -> Tensor:
    return cut(at.m.linear(x, at.w, "attn_qkv"), at.config.clamp_qkv)


def _rotated(which: Literal["q", "k"]) -> Operation:
    def rotated(at: Place, x: Tensor) -> Tensor:
        tables = at.rope(x.dtype)
        return x if tables is None else at.m.rotate(at.heads(x), tables, which).flatten(-2)

    return rotated


def _attention_map(at: Place, q: Tensor, k: Tensor) -> Tensor:
    return at.m.attention_map(*_attending(at, q, k), at.config.kq_scale, scores_of(at.w, at.layer, at.config))  # [1,H,T,S]


def _attention(at: Place, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    how = scores_of(at.w, at.layer, at.config)
    return at.m.attention(*_attending(at, q, k), _values(at, v), at.config.kq_scale, how).flatten(-2)


def _attending(at: Place, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """q [1,T,H,D] and k [1,S,K,D], D being channels of a key, or of what latent attention has in its place."""
    q = q.reshape(*q.shape[:2], at.config.n_head, -1)
    return tempered(q, k.shape[1], at.config), k.reshape(*k.shape[:2], -1, q.shape[-1])


def _values(at: Place, v: Tensor) -> Tensor:
    return v.reshape(*v.shape[:2], -1, at.config.value_dim or at.config.head_dim)


def _weighted(at: Place, probs: Tensor, v: Tensor) -> Tensor:
    """The second half of the attention: probs [1,H,T,S], v [1,S,K·D] → [1,T,H·D]."""
    return at.m.weighted_values(probs, _values(at, v)).flatten(-2)


# ---- latent attention -----------------------------------------------------------------------------------------------------------------


def _latent_keys(at: Place, x: Tensor) -> Tensor:
    return latent_keys(x, at.w, at.config, at.rope(x.dtype), at.m)


def _written_out(part: int) -> Operation:
    """Keys or values of all heads, from the layer's normed input."""
    return lambda at, x: written_out(_latent_keys(at, x), at.w, at.config, at.m)[part].flatten(-2)


def _turned(at: Place, q: Tensor) -> Tensor:
    return turned_queries(q, at.config, at.rope(q.dtype), at.m).flatten(-2)


def _absorbed(at: Place, q: Tensor) -> Tensor:
    return absorbed(at.heads(q), at.w, at.config, at.m).flatten(-2)


def _latent_weighted(at: Place, probs: Tensor, k: Tensor) -> Tensor:
    return gathered(at.m.weighted_values(probs, latent_values(k, at.config)), at.w, at.m)


def _latent_attention(at: Place, q: Tensor, k: Tensor) -> Tensor:
    how = scores_of(at.w, at.layer, at.config)
    return gathered(at.m.attention(*_attending(at, q, k), latent_values(k, at.config), at.config.kq_scale, how), at.w, at.m)


# ---- the rest of the layer ------------------------------------------------------------------------------------------------------------


def _sum(branch: Literal["attn", "ffn"]) -> Operation:
    """h + what a branch adds; of a parallel layer h + both branches."""

    def added(at: Place, *inputs: Tensor) -> Tensor:
        *branches, h = (x if x is inputs[-1] or at.config.residual_scale == 1 else x * at.config.residual_scale for x in inputs)
        return at.m.residual(h, sum(branches[1:], branches[0]), branch)

    return added


def _activated(at: Place, *inputs: Tensor) -> Tensor:
    gate, up = inputs if len(inputs) == 2 else (None, inputs[0])
    return activation(gate, up, at.w, at.config, at.m)


def _down(at: Place, x: Tensor, *more: Tensor) -> Tensor:
    """The feed-forward's last product, or the sum of the routed and the shared experts."""
    if "ffn_gate_inp.weight" in at.w:
        return sum(more, x)
    return at.m.linear(x, at.w, "ffn_down", scale_last=True)


def _probabilities(at: Place, logits: Tensor) -> Tensor:
    assert at.config.experts is not None
    return expert_probabilities(logits, at.config.experts)


def _weights(at: Place, scores: Tensor, chosen: Tensor) -> Tensor:
    assert at.config.experts is not None
    return expert_weights(scores, chosen.long(), at.config.experts)


def _of_experts(part: int, name: str) -> Operation:
    """Gate or up of every chosen expert, from a matrix of its own or its half of a common one: [1,T,E], [1,T,n_used] → [1,T,n_used·M]."""

    def product(at: Place, x: Tensor, chosen: Tensor) -> Tensor:
        if "ffn_gate_up_exps.weight" not in at.w:
            return chosen_linear(x, chosen.long(), at.w, name, at.m)
        both = chosen_linear(x, chosen.long(), at.w, "ffn_gate_up_exps", at.m)
        return both.reshape(*chosen.shape, -1).chunk(2, dim=-1)[part].flatten(-2)

    return product


def _expert_down(at: Place, x: Tensor, chosen: Tensor) -> Tensor:
    return chosen_linear(x, chosen.long(), at.w, "ffn_down_exps", at.m, each=True)


def _mixed(at: Place, down: Tensor, weight: Tensor) -> Tensor:
    return (down.reshape(*weight.shape, -1) * weight[..., None]).sum(-2)


def _gated_shared(at: Place, shared: Tensor, x: Tensor) -> Tensor:
    return shared * shared_gate(x, at.w)


def _layer(at: Place, h: Tensor) -> Tensor:
    """All of a layer, from the stream before it at every position: h [1,S,E] → the rows of these positions."""
    ropes = tables(h, at.weights, dtype=h.dtype, arithmetic=at.m)
    out = layer(h, at.w, at.layer, at.config, ropes, m=at.m)
    return out[:, at.positions[0] : at.positions[-1] + 1]


# tap → how it is computed from the taps that ``layer_wiring`` names
OPERATIONS: dict[str, Operation | NotReplayed] = {
    "embd": _embedded,
    "attn_norm": _block_norm("attn_norm"),
    "attn_norm_2": _norm("attn_norm_2"),
    "wqkv": _fused,
    "Qcur_pre": _projected(0, "attn_q"),
    "Kcur_pre": _projected(1, "attn_k"),
    "Vcur": _projected(2, "attn_v"),
    "Qcur_normed": _head_norm("attn_q_norm"),
    "Kcur_normed": _head_norm("attn_k_norm"),
    "Qcur": _rotated("q"),
    "Kcur": _rotated("k"),
    "kq_soft_max": _attention_map,
    "kqv_out": _weighted,
    "attn_out": _linear("attn_output"),
    "attn_post_norm": _block_norm("attn_post_norm"),
    "ffn_inp": _sum("attn"),
    "ffn_norm": _block_norm("ffn_norm"),
    "ffn_moe_logits": _linear("ffn_gate_inp"),
    "ffn_moe_probs": _probabilities,
    "ffn_moe_topk": None,  # a choice: where two experts are equally probable, either is right
    "ffn_moe_weights": _weights,
    "ffn_moe_gate": _of_experts(0, "ffn_gate_exps"),
    "ffn_moe_up": _of_experts(1, "ffn_up_exps"),
    "ffn_moe_swiglu": _activated,
    "ffn_moe_down": _expert_down,
    "ffn_moe_out": _mixed,
    "ffn_gate": lambda at, x: _linear(f"ffn_gate{_shared(at)}")(at, x),
    "ffn_up": lambda at, x: _linear(f"ffn_up{_shared(at)}")(at, x),
    "ffn_swiglu": _activated,
    "ffn_shexp": _linear("ffn_down_shexp"),
    "ffn_shexp_out": _gated_shared,
    "ffn_out": _down,
    "ffn_post_norm": _block_norm("ffn_post_norm"),
    "l_out": _sum("ffn"),
    "result_norm": _norm("output_norm"),
    "result_output": lambda at, x: logits(x, at.w, at.config, at.m),
}


def _shared(at: Place) -> str:
    """What the names of the dense matrices end in: in a layer with experts they are those of the shared ones."""
    return "_shexp" if "ffn_gate_inp.weight" in at.w else ""


# what latent attention does in their place
LATENT: dict[str, Operation | NotReplayed] = {
    "Qcur_pre": lambda at, x: queries(x, at.w, at.config, at.m),
    "Qcur": _turned,
    "Kcur": _written_out(0),
    "Vcur": _written_out(1),
    "Kcur_latent": _latent_keys,
}
# with a matrix of each head: by the vectors that llama.cpp keeps, or by keys and values of an engine that writes them out
ABSORBED: dict[str, list[Way]] = {
    "Qcur_latent": [(_absorbed, ("Qcur",)), (lambda at, q: _absorbed(at, _turned(at, q)), ("Qcur_pre",))],
    "kq_soft_max": [(_attention_map, ("Qcur_latent", "Kcur_latent")), (_attention_map, ("Qcur", "Kcur"))],
    "kqv_out": [
        (_latent_weighted, ("kq_soft_max", "Kcur_latent")),
        (_latent_attention, ("Qcur_latent", "Kcur_latent")),
        (_weighted, ("kq_soft_max", "Vcur")),
        (_attention, ("Qcur", "Kcur", "Vcur")),
    ],
}
WHOLE_LAYER = mark("the whole layer")
OTHER_WAYS: dict[str, list[Way]] = {  # where the taps between were not recorded
    "l_out": [(_layer, (BEFORE,))],
}
BY_POSITION = (
    "embd",
    "Qcur",
    "Kcur",
    "Qcur_latent",
    "Kcur_latent",
    "kq_soft_max",
    "kqv_out",
)  # operations that ask which position a row stands for
LOOKS_BACK = {  # operations that look back, and which of their inputs they look back at
    "kq_soft_max": ("Kcur", "Kcur_normed", "Kcur_latent"),
    "kqv_out": ("Kcur", "Kcur_normed", "Kcur_latent", "Vcur"),
    "l_out": ("l_out", "embd"),
}


def ways(tap: str, config: ModelConfig, names: Collection[str]) -> list[Way]:
    """(operation, full names of its inputs) of a tap, the one to be tried first in front.  names: local ones of the layer's tensors."""
    stem, layer = place_of(tap)
    if layer is None:
        last = f"l_out-{config.n_layer - 1}"
        return [(OPERATIONS[stem], {"embd": (), "result_norm": (last,)}.get(stem, ("result_norm",)))]
    before = {BEFORE: f"l_out-{layer - 1}" if layer else "embd"}
    possible = ABSORBED[stem] if absorbs(names) and stem in ABSORBED else _usual_ways(stem, config, layer_wiring(config, layer, names))
    return [(operation, tuple(before.get(i, f"{i}-{layer}") for i in stems)) for operation, stems in possible]


def _usual_ways(stem: str, config: ModelConfig, wiring: Wiring) -> list[Way]:
    operations = OPERATIONS | LATENT if config.latent else OPERATIONS
    possible: list[Way] = [(operations[stem], wiring[stem]), *OTHER_WAYS.get(stem, ())]
    if stem == "kqv_out":  # where the probabilities were not recorded
        possible.append((_attention, (*wiring["kq_soft_max"], "Vcur")))
    return possible
