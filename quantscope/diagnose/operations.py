"""The operations of the forward one by one, each a function of the taps it is made of: what ``model.forward`` does between two taps.

    operation(Place(arithmetic, weights ...), *inputs)  →  the output, [1,T,channels] or [1,H,T,S]

The formulas are those of the arithmetic; what is here is which of them makes a tap, with which weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from quantscope.explain import MADE_BY
from quantscope.language import mark
from quantscope.model.arithmetic import Arithmetic
from quantscope.model.forward import layer
from quantscope.model.taps import place_of
from quantscope.weights import WeightProvider


@dataclass(frozen=True)
class Place:
    """Where an operation takes place: by which arithmetic, with which weights, at which positions."""

    m: Arithmetic
    w: Mapping[str, Tensor]  # of the layer, or of the head
    weights: WeightProvider
    positions: Sequence[int]
    ids: Tensor | None  # of these positions, int64 [1,T]

    def heads(self, x: Tensor) -> Tensor:
        """[1,T,H·D] → [1,T,H,D]."""
        return x.reshape(*x.shape[:2], -1, self.weights.config.head_dim)


Operation: TypeAlias = Callable[..., Tensor]  # (place, [1,T,channels] for each input) → [1,T,channels]


def _linear(name: str) -> Operation:
    return lambda at, x: at.m.linear(x, at.w, name, scale_last=name.startswith("ffn"))


def _norm(name: str) -> Operation:
    return lambda at, x: at.m.rms_norm(x, at.w, name, at.weights.config.norm_eps)


def _head_norm(name: str) -> Operation:
    norm = _norm(name)
    return lambda at, x: norm(at, at.heads(x)).flatten(-2)


def _embedded(at: Place) -> Tensor:
    assert at.ids is not None
    return at.m.embed(at.weights, at.ids, torch.float32)


def _rotated(which: Literal["q", "k"]) -> Operation:
    def rotated(at: Place, x: Tensor) -> Tensor:
        rope, positions = at.weights.config.rope, torch.tensor(at.positions)
        tables = at.m.rope_tables(rope, positions, at.weights.rope_factors(), x.dtype)
        return at.m.rotate(at.heads(x), tables, which).flatten(-2)

    return rotated


def _attention_map(at: Place, q: Tensor, k: Tensor) -> Tensor:
    return at.m.attention_map(at.heads(q), at.heads(k), at.weights.config.kq_scale)  # [1,H,T,S]


def _attention(at: Place, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return at.m.attention(at.heads(q), at.heads(k), at.heads(v), at.weights.config.kq_scale).flatten(-2)


def _weighted(at: Place, probs: Tensor, v: Tensor) -> Tensor:
    """The second half of the attention: probs [1,H,T,S], v [1,S,K·D] → [1,T,H·D]."""
    return at.m.weighted_values(probs, at.heads(v)).flatten(-2)


def _sum(branch: Literal["attn", "ffn"]) -> Operation:
    return lambda at, x, h: at.m.residual(h, x, branch)


def _layer(at: Place, h: Tensor) -> Tensor:
    """All of a layer, from the stream before it at every position: h [1,S,E] → the rows of these positions."""
    rope = at.m.rope_tables(at.weights.config.rope, torch.arange(h.shape[1]), at.weights.rope_factors(), h.dtype)
    out = layer(h, at.w, 0, at.weights.config, rope, m=at.m)
    return out[:, at.positions[0] : at.positions[-1] + 1]


# tap → how it is computed from the taps that MADE_BY names
OPERATIONS: dict[str, Operation] = {
    "embd": _embedded,
    "attn_norm": _norm("attn_norm"),
    "Qcur_pre": _linear("attn_q"),
    "Kcur_pre": _linear("attn_k"),
    "Vcur": _linear("attn_v"),
    "Qcur_normed": _head_norm("attn_q_norm"),
    "Kcur_normed": _head_norm("attn_k_norm"),
    "Qcur": _rotated("q"),
    "Kcur": _rotated("k"),
    "kq_soft_max": _attention_map,
    "kqv_out": _weighted,
    "attn_out": _linear("attn_output"),
    "ffn_inp": _sum("attn"),
    "ffn_norm": _norm("ffn_norm"),
    "ffn_gate": _linear("ffn_gate"),
    "ffn_up": _linear("ffn_up"),
    "ffn_swiglu": lambda at, gate, up: at.m.swiglu(gate, up),
    "ffn_out": _linear("ffn_down"),
    "l_out": _sum("ffn"),
    "result_norm": _norm("output_norm"),
    "result_output": _linear("output"),
}
WHOLE_LAYER = mark("the whole layer")
WHOLE_ATTENTION = ("Qcur", "Kcur", "Vcur")  # what kqv_out is made of where the probabilities were not recorded
OTHER_WAYS: dict[str, list[tuple[Operation, tuple[str, ...]]]] = {  # where the taps between were not recorded
    "kqv_out": [(_attention, WHOLE_ATTENTION)],
    "l_out": [(_layer, ("l_out<",))],
}
BY_POSITION = ("embd", "Qcur", "Kcur", "kq_soft_max", "kqv_out")  # operations that ask which position a row stands for
ATTENTION = {
    "kq_soft_max": ("Kcur",),
    "kqv_out": ("Kcur", "Vcur"),
    "l_out": ("l_out", "embd"),
}  # operations that look back, and the inputs they look back at


def ways(tap: str, n_layer: int, normed: bool) -> list[tuple[Operation, tuple[str, ...]]]:
    """(operation, full names of its inputs) of a tap, the one to be tried first in front."""
    stem, layer = place_of(tap)
    inputs = MADE_BY[stem][1]
    if stem in ("Qcur", "Kcur"):  # made of the normed one where the model has that
        inputs = inputs[:1] if normed else inputs[1:]
    possible = [(OPERATIONS[stem], inputs), *OTHER_WAYS.get(stem, ())]
    before = (n_layer if layer is None else layer) - 1
    names = {"l_out<": f"l_out-{before}" if before >= 0 else "embd"}
    local = "" if layer is None else f"-{layer}"
    return [(operation, tuple(names.get(i, i + local) for i in stems)) for operation, stems in possible]
