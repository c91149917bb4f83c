"""The faults of the numpy engine: how it does each thing (``Way``), and for each fault what it does otherwise.

way = way_of(planted, layer)      every default of Way is right; a fault replaces one field or one entry
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import numpy as np

from benchmarks.numpy_blocks import MISTAKES, WRONG, Array, Decoder
from benchmarks.planted import F16_MAX, NORMS, Planted

Norm: TypeAlias = Callable[[Array, Array, float], Array]  # (x [...,E], weight [E], eps)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    mean_square = np.mean(np.square(x, dtype=np.float64), axis=-1, keepdims=True)
    return (x / np.sqrt(mean_square + eps) * weight).astype(np.float32)


def causal(query: Array, key: Array) -> Array:
    """Whether a query position sees a key position."""
    return key <= query


def silu(x: Array) -> Array:
    with np.errstate(over="ignore"):
        return x / (1 + np.exp(-x))


def softmax(scores: Array, axis: int) -> Array:
    """Over an axis of scores in which −inf is masked; 0 where everything along the axis is masked."""
    largest = scores.max(axis=axis, keepdims=True)
    powers = np.exp(scores - np.where(np.isfinite(largest), largest, 0))
    total = powers.sum(axis=axis, keepdims=True)
    return powers / np.where(total == 0, 1, total)


def repeated(head: int, n_head: int, n_head_kv: int) -> int:
    """The key/value head of a query head."""
    return head // (n_head // n_head_kv)


@dataclass(frozen=True)
class Way:
    """How the engine does what some engine has done wrong."""

    # reading the file
    decoders: Mapping[str, Decoder] = field(default_factory=dict)  # type → instead of the right one
    matrices: Mapping[str, Callable[[Array], Array]] = field(default_factory=dict)  # role → W as loaded to W as used
    names: Mapping[str, str] = field(default_factory=dict)  # role → the one whose tensor is loaded instead
    embedding: Literal["row", "column"] = "row"
    biases: bool = True
    # normalization
    norms: Mapping[str, Norm] = field(default_factory=dict)  # norm → instead of rms_norm
    # rotation
    other_layout: bool = False
    theta: float | None = None  # None: the file's
    factors: bool = True
    turns: int = 1  # −1: the other way
    position_of_q: Callable[[Array], Array] | None = lambda at: at  # None: q is not turned
    position_of_k: Callable[[Array], Array] | None = lambda at: at
    # attention
    sees: Callable[[Array, Array], Array] = causal
    scale: Callable[[int, int], float] = lambda head_dim, n_embd: 1 / math.sqrt(head_dim)
    kv_head: Callable[[int, int, int], int] = repeated
    halved_heads: bool = False
    softmax_axis: int = -1  # of [H,T,S]
    cache: Literal["whole", "stale", "late"] = "whole"
    # feed-forward
    activation: Callable[[Array], Array] = silu
    swapped: bool = False  # silu(up) · gate
    overflow: float = math.inf
    # the residual stream
    attn_residual: bool = True
    ffn_residual: bool = True
    times: int = 1  # that the layer is run
    dropped: bool = False  # the layer is run and its result is not used
    largest: float = math.inf  # magnitude in the residual stream
    # the head
    head: Literal["there", "missing", "zero"] = "there"


Fault: TypeAlias = Callable[[Way, Planted], Way]


def sets(**fields: Any) -> Fault:
    return lambda way, planted: replace(way, **fields)


# Matrices: W is [out,in], its memory row-major.
def as_loaded(w: Array) -> Array:
    return w


def transposed(w: Array) -> Array:
    """The memory taken for an [in,out] matrix."""
    return w.reshape(w.shape[::-1]).T


def reinterpreted(w: Array) -> Array:
    """The memory of the transposed matrix taken for an [out,in] matrix."""
    return np.ascontiguousarray(w.T).reshape(w.shape)


def matrix(change: Callable[[Array], Array]) -> Fault:
    return lambda way, planted: replace(way, matrices={**way.matrices, planted.where: change})


def decoder(way: Way, planted: Planted) -> Way:
    return replace(way, decoders={**way.decoders, planted.where: WRONG[planted.cause, planted.where]})


# Norms
HEAD_NORMS = ("attn_q_norm", "attn_k_norm")


def passed_on(x: Array, weight: Array, eps: float) -> Array:
    return x


def layer_norm(x: Array, weight: Array, eps: float) -> Array:
    return rms_norm(x - x.mean(axis=-1, keepdims=True), weight, eps)


def norm(change: Norm) -> Fault:
    return lambda way, planted: replace(way, norms={**way.norms, planted.where: change})


def norm_eps(way: Way, planted: Planted) -> Way:
    """Another eps in one norm, or in "all" of them, those of q and k too: an engine has one constant for all."""
    wrong = planted.value
    names = (*NORMS, *HEAD_NORMS) if planted.where == "all" else (planted.where,)
    return replace(way, norms={**way.norms, **{name: lambda x, w, eps: rms_norm(x, w, wrong) for name in names}})


# Attention masks
def future_token(query: Array, key: Array) -> Array:
    return key <= query + 1


def not_itself(query: Array, key: Array) -> Array:
    return (key < query) | ((query == 0) & (key == 0))


# Activations
def gelu_erf(x: Array) -> Array:
    return 0.5 * x * (1 + np.vectorize(math.erf, otypes=[np.float32])(x / math.sqrt(2)))


def gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def sigmoid(x: Array) -> Array:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))


def next_position(at: Array) -> Array:
    return at + 1


def first_position(at: Array) -> Array:
    return 0 * at


def gate_up(way: Way, planted: Planted) -> Way:
    """The two are taken for one another where they are used, or already where they are loaded."""
    return replace(way, swapped=True) if planted.where == "used" else replace(way, names={"ffn_gate": "ffn_up", "ffn_up": "ffn_gate"})


FAULTS: dict[str, Fault] = {
    "weight-transposed": matrix(transposed),
    "weight-reinterpreted": matrix(reinterpreted),
    "embedding-column": sets(embedding="column"),
    "head-layout": lambda way, planted: replace(way, matrices={**way.matrices, "output": transposed}),
    "head-missing": sets(head="missing"),
    "head-zero": sets(head="zero"),
    "bias-ignored": sets(biases=False),
    "q-norm-ignored": lambda way, planted: replace(way, norms={**way.norms, **dict.fromkeys(HEAD_NORMS, passed_on)}),
    "norm-eps": norm_eps,
    "norm-weight-missing": norm(lambda x, w, eps: rms_norm(x, np.ones_like(w), eps)),
    "norm-weight-twice": norm(lambda x, w, eps: rms_norm(x, w, eps) * w),
    "norm-weight-plus-one": norm(lambda x, w, eps: rms_norm(x, w + 1, eps)),
    "norm-layernorm": norm(layer_norm),
    "norm-missing": norm(passed_on),
    "rope-layout": sets(other_layout=True),
    "rope-theta": lambda way, planted: replace(way, theta=planted.value),
    "rope-offset": sets(position_of_q=next_position, position_of_k=next_position),
    "rope-offset-q": sets(position_of_q=next_position),
    "rope-stuck": sets(position_of_q=first_position, position_of_k=first_position),
    "rope-missing": sets(position_of_q=None, position_of_k=None),
    "rope-missing-q": sets(position_of_q=None),
    "rope-missing-k": sets(position_of_k=None),
    "rope-reversed": sets(turns=-1),
    "rope-factors-ignored": sets(factors=False),
    "mask-missing": sets(sees=lambda query, key: key >= 0),
    "mask-next": sets(sees=future_token),
    "mask-self": sets(sees=not_itself),
    "scale-missing": sets(scale=lambda head_dim, n_embd: 1.0),
    "scale-embd": sets(scale=lambda head_dim, n_embd: 1 / math.sqrt(n_embd)),
    "scale-linear": sets(scale=lambda head_dim, n_embd: 1 / head_dim),
    "gqa-tile": sets(kv_head=lambda head, n_head, n_head_kv: head % n_head_kv),
    "head-dim-half": sets(halved_heads=True),
    "softmax-queries": sets(softmax_axis=1),
    "softmax-heads": sets(softmax_axis=0),
    "cache-stale": sets(cache="stale"),
    "cache-off-by-one": sets(cache="late"),
    "gate-up-swapped": gate_up,
    "act-gelu-erf": sets(activation=gelu_erf),
    "act-gelu-tanh": sets(activation=gelu_tanh),
    "act-relu": sets(activation=lambda x: np.maximum(x, 0)),
    "act-missing": sets(activation=lambda x: x),
    "act-sigmoid": sets(activation=sigmoid),
    "f16-overflow": sets(overflow=F16_MAX),
    "residual-missing-attn": sets(attn_residual=False),
    "residual-missing-ffn": sets(ffn_residual=False),
    "layer-skipped": lambda way, planted: replace(way, dropped=True) if planted.where == "dropped" else replace(way, times=0),
    "layer-repeated": sets(times=2),
    "activations-clipped": lambda way, planted: replace(way, largest=planted.value),
    "bos-missing": sets(),  # of the ids, not of the forward
    **dict.fromkeys(MISTAKES, decoder),
}


def way_of(planted: Sequence[Planted], layer: int | None) -> Way:
    """How the engine works in a layer, or in the embedding and the head (None)."""
    way = Way()
    for fault in planted:
        if fault.at(layer):
            way = FAULTS[fault.cause](way, fault)
    return way
