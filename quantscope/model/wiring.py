"""Which taps a model has, and which of them each is made of: the graph of ``forward`` as data.

    layer_wiring(config, i, local names of the layer's tensors)  →  {"attn_norm": ("l_out<",), "Qcur_pre": ("attn_norm",), ...}

"l_out<" is the stream before the layer.  Whoever asks what comes before a tap in a given model asks here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Protocol

from quantscope.arch.config import ModelConfig
from quantscope.model.latent import absorbs
from quantscope.model.taps import EMBD, HEAD_TAPS, LAYER_TAPS, place_of
from quantscope.weights import WeightProvider

BEFORE = "l_out<"
Wiring = dict[str, tuple[str, ...]]


class Adder(Protocol):
    """Notes what a tap is made of and gives back its name."""

    def __call__(self, tap: str, /, *inputs: str) -> str: ...


def layer_wiring(config: ModelConfig, i: int, names: Collection[str]) -> Wiring:
    """Tap → the taps it is made of, in the order of the graph."""
    b, made = config.block, Wiring()

    def add(tap: str, /, *inputs: str) -> str:
        made[tap] = inputs
        return tap

    x = add("attn_norm", BEFORE) if b.attn_norm else BEFORE
    y = add("attn_norm_2", BEFORE) if "attn_norm_2.weight" in names else x
    q, k, v = _heads(config, i, y, names, add)
    add("kq_soft_max", q, k)
    add("kqv_out", "kq_soft_max", v)
    attended = add("attn_out", "kqv_out")
    attended = add("attn_post_norm", attended) if b.attn_post_norm else attended
    stream = BEFORE if b.parallel else add("ffn_inp", attended, BEFORE)
    unnormed = x if b.parallel else stream
    z = add("ffn_norm", stream) if b.ffn_norm else unnormed
    added = (_experts if config.routes(i) else _dense)(config, z, names, add)
    added = add("ffn_post_norm", added) if b.ffn_post_norm else added
    add("l_out", added, *((attended, BEFORE) if b.parallel else (stream,)))
    return {tap: made[tap] for tap in LAYER_TAPS if tap in made}


def _heads(config: ModelConfig, i: int, y: str, names: Collection[str], add: Adder) -> tuple[str, str, str]:
    """What the scores are made of, and the values."""
    if config.latent:
        q, k, v = add("Qcur", add("Qcur_pre", y)), add("Kcur", y), add("Vcur", y)
        if not absorbs(names):
            return q, k, v
        k = add("Kcur_latent", y)
        return add("Qcur_latent", q), k, k
    source = add("wqkv", y) if "attn_qkv.weight" in names else y
    q, k = add("Qcur_pre", source), add("Kcur_pre", source)
    add("Vcur", source)
    for step in ("norm", "turn") if config.block.qk_norm == "before" else ("turn", "norm"):
        if step == "turn" and config.rope_of(i) is not None:
            q, k = add("Qcur", q), add("Kcur", k)
        elif step == "norm" and "attn_q_norm.weight" in names:
            q, k = add("Qcur_normed", q), add("Kcur_normed", k)
    return q, k, "Vcur"


def _dense(config: ModelConfig, z: str, names: Collection[str], add: Adder) -> str:
    return add("ffn_out", _activated(z, "ffn_gate.weight" in names, add))


def _activated(z: str, gated: bool, add: Adder) -> str:
    gate = (add("ffn_gate", z),) if gated else ()
    return add("ffn_swiglu", *gate, add("ffn_up", z))


def _experts(config: ModelConfig, z: str, names: Collection[str], add: Adder) -> str:
    assert config.experts is not None
    scores = add("ffn_moe_logits", z)
    if config.experts.gating != "softmax of the chosen":
        scores = add("ffn_moe_probs", scores)
    chosen = add("ffn_moe_topk", scores)
    weight = add("ffn_moe_weights", scores, chosen)
    act = add("ffn_moe_swiglu", add("ffn_moe_gate", z, chosen), add("ffn_moe_up", z, chosen))
    out = add("ffn_moe_out", add("ffn_moe_down", act, chosen), weight)
    if "ffn_up_shexp.weight" not in names:
        return out
    shared = add("ffn_shexp", _activated(z, "ffn_gate_shexp.weight" in names, add))
    if "ffn_gate_inp_shexp.weight" in names:
        shared = add("ffn_shexp_out", shared, z)
    return add("ffn_out", out, shared)


def model_taps(weights: WeightProvider) -> Iterator[str]:
    """Full names of all taps of a model, in the order of the graph."""
    yield EMBD
    for i in range(weights.config.n_layer):
        yield from (f"{tap}-{i}" for tap in layer_wiring(weights.config, i, weights.layer_names(i)))
    yield from HEAD_TAPS


# channels of a tap, as an axis letter of ``ModelConfig.axis``; the other taps have E
CHANNELS = {
    tap: letter
    for letter, taps in {
        "Q": ("Qcur_pre", "Qcur_normed", "Qcur"),
        "L": ("Qcur_latent",),
        "a": ("Kcur_latent",),
        "K": ("Kcur_pre", "Kcur_normed", "Kcur"),
        "W": ("Vcur",),
        "O": ("kqv_out",),
        "A": ("wqkv",),
        "F": ("ffn_gate", "ffn_up", "ffn_swiglu"),
        "X": ("ffn_moe_logits", "ffn_moe_probs"),
        "V": ("result_output",),
    }.items()
    for tap in taps
}
OF_CHOSEN = {"ffn_moe_topk": "1", "ffn_moe_weights": "1", "ffn_moe_down": "E"} | dict.fromkeys(
    ("ffn_moe_gate", "ffn_moe_up", "ffn_moe_swiglu"), "M"
)  # once for every expert in use


def tap_width(config: ModelConfig, tap: str) -> int:
    """Channels of a tap by its full name; of an attention map, which has none, those of the stream."""
    stem, layer = place_of(tap)
    if stem in OF_CHOSEN:
        return config.axis(OF_CHOSEN[stem]) * (config.experts.n_used if config.experts else 0)
    if CHANNELS.get(stem) == "F":
        if layer is not None and layer < config.n_layer and config.routes(layer):
            return config.axis("S")
        return config.axis("G") if stem == "ffn_up" and config.block.fused else config.axis("F")
    return config.axis(CHANNELS.get(stem, "E"))


# tap → the matrix whose product it is
PRODUCTS = {
    "wqkv": "attn_qkv",
    "Qcur_pre": "attn_q",
    "Kcur_pre": "attn_k",
    "Vcur": "attn_v",
    "attn_out": "attn_output",
    "ffn_moe_logits": "ffn_gate_inp",
    "ffn_gate": "ffn_gate",
    "ffn_up": "ffn_up",
    "ffn_shexp": "ffn_down_shexp",
    "ffn_out": "ffn_down",
}


def readers(config: ModelConfig, i: int, names: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Full name of a tap → local names of the matrices of layer i that multiply it, in the order of the graph.

    The matrices of experts are not among them: each sees the tokens that chose it.  Nor are those of latent attention before its output.
    """
    shared, found = "ffn_up_shexp.weight" in names, dict[str, tuple[str, ...]]()
    before = {BEFORE: f"l_out-{i - 1}" if i else EMBD}
    for tap, inputs in layer_wiring(config, i, names).items():
        matrix = PRODUCTS.get(tap, "")
        if shared and tap in ("ffn_gate", "ffn_up"):
            matrix += "_shexp"
        if f"{matrix}.weight" in names and not (config.latent and tap == "Qcur_pre"):
            source = before.get(inputs[0], f"{inputs[0]}-{i}")
            found[source] = (*found.get(source, ()), matrix)
    return found
