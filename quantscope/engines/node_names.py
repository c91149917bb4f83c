"""Nodes of llama.cpp's graph → taps.

    namer = TapNamer();  for every node in order:  tap = namer(name, op, sources)      "l_out-3", or None for a node that is no tap

A node that multiplies or adds a weight is known by the weight's name, whatever the architecture calls it: product, scale and bias of a
linear layer are one tap, of which the last counts.  The others are known by their own name and operation.
Source: ``cb(...)`` in llama.cpp's src/llama-graph.cpp and src/models/*.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence

from quantscope.model.taps import EMBD, HEAD_TAPS, LAYER_TAPS

PRODUCTS = ("MUL_MAT", "MUL_MAT_ID", "MUL", "ADD", "ADD_ID", "DIV")  # what a layer's weights are used by
VIEWS = ("RESHAPE", "VIEW", "PERMUTE", "TRANSPOSE", "NONE")  # the same values again
SHOWN_VIEWS = {  # where only a view of a larger tensor has the name
    "Qcur": "Qcur_pre",
    "Kcur": "Kcur_pre",
    "Vcur": "Vcur",
    "ffn_moe_topk": "ffn_moe_topk",
    "ffn_moe_gate": "ffn_moe_gate",
    "ffn_moe_up": "ffn_moe_up",
    "ffn_moe_weights_softmax": "ffn_moe_weights",
}

# weight of a layer → the tap of what it makes
BY_WEIGHT = {
    "attn_norm": "attn_norm",
    "attn_norm_2": "attn_norm_2",
    "attn_q": "Qcur_pre",
    "attn_q_b": "Qcur_pre",
    "attn_k": "Kcur_pre",
    "attn_v": "Vcur",
    "attn_qkv": "wqkv",
    "attn_q_norm": "Qcur_normed",
    "attn_k_norm": "Kcur_normed",
    "attn_output": "attn_out",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "ffn_gate",
    "ffn_up": "ffn_up",
    "ffn_down": "ffn_out",
    "ffn.act": "ffn_swiglu",
    "post_ffw_norm": "ffn_post_norm",
    "ffn_gate_inp": "ffn_moe_logits",
    "ffn_gate_exps": "ffn_moe_gate",
    "ffn_up_exps": "ffn_moe_up",
    "ffn_down_exps": "ffn_moe_down",
    "ffn_gate_shexp": "ffn_gate",
    "ffn_up_shexp": "ffn_up",
    "ffn_down_shexp": "ffn_shexp",
    "token_embd_norm": EMBD,
}
# These come after the attention in some architectures, and before the feed-forward in others.
AFTER_OR_BEFORE = ("post_attention_norm", "attn_output_norm")

# names of products, scales and biases, where what they are made of is not said
BY_PRODUCT_NAME = {
    **{name: name for name in ("attn_norm", "ffn_norm", "result_norm", "Vcur", "Qcur_normed", "Kcur_normed", "attn_out", "ffn_out")},
    "Qcur": "Qcur_pre",
    "Kcur": "Kcur_pre",
    **{f"{name}{part}": name for name in ("ffn_gate", "ffn_up") for part in ("", "_b", "_s")},
}

# (name, operations) → tap, of nodes without a weight
ACTIVATIONS = (
    "ffn_swiglu",
    "ffn_silu",
    "ffn_geglu",
    "ffn_gelu",
    "ffn_reglu",
    "ffn_relu",
    "ffn_sqr(relu)",
    "ffn_swiglu_oai",
    "ffn_gate_par",
)
ANY: tuple[str, ...] = ()  # its kind is in the operation: a log calls it SWIGLU or GELU, the graph GLU or UNARY
BY_NAME: dict[str, tuple[tuple[str, ...], str]] = {
    EMBD: (("GET_ROWS", "SCALE"), EMBD),
    "inp_scaled": (("SCALE",), EMBD),
    "inpL": (("ADD",), EMBD),
    "attn_norm": (("NORM", "RMS_NORM"), "attn_norm"),
    "ffn_norm": (("NORM", "RMS_NORM"), "ffn_norm"),
    "result_norm": (("NORM", "RMS_NORM", "MUL", "ADD"), "result_norm"),
    "Qcur_clamped": (("CLAMP",), "Qcur_pre"),
    "Kcur_clamped": (("CLAMP",), "Kcur_pre"),
    "Vcur_clamped": (("CLAMP",), "Vcur"),
    "wqkv_clamped": (("CLAMP",), "wqkv"),
    "Qcur": (("ROPE",), "Qcur"),
    "Kcur": (("ROPE",), "Kcur"),
    "Vcur_cont": (("CONT",), "Vcur"),
    "q_states": (("ROPE",), "Qcur"),
    "v_states": (("CONT",), "Vcur"),
    "kq_soft_max": (("SOFT_MAX",), "kq_soft_max"),
    "kqv_out": (("CONT",), "kqv_out"),
    "ffn_inp": (("ADD",), "ffn_inp"),
    "sa_out": (("ADD",), "ffn_inp"),
    "ffn_out": (("ADD",), "ffn_out"),
    "l_out": (("ADD",), "l_out"),
    "ffn_moe_probs": (ANY, "ffn_moe_probs"),
    "ffn_moe_weights": (("GET_ROWS",), "ffn_moe_weights"),
    "ffn_moe_weights_norm": (("DIV",), "ffn_moe_weights"),
    "ffn_moe_weights_scaled": (("SCALE",), "ffn_moe_weights"),
    **{f"ffn_moe_{part}_scaled": (("MUL",), f"ffn_moe_{part}") for part in ("gate", "up", "down")},
    "ffn_moe_out": (("ADD", "CONT"), "ffn_moe_out"),
    "ffn_shexp_out": (("MUL",), "ffn_shexp_out"),
    **dict.fromkeys(ACTIVATIONS, (ANY, "ffn_swiglu")),
    **{name.replace("ffn_", "ffn_moe_", 1): (ANY, "ffn_moe_swiglu") for name in ACTIVATIONS},
}

# (name, what it ends in) → tap, of latent attention's q and k: what turns is put behind what does not
PUT_TOGETHER = {
    ("Qcur", "q_pe"): "Qcur_latent",
    ("Kcur", "k_pe"): "Kcur_latent",
    ("Kcur", ""): "Kcur",  # k_pe repeated for every head has no name
    ("k_states", ""): "Kcur",
}


class TapNamer:
    """Names the nodes of one graph; they must come in the order of evaluation."""

    def __init__(self) -> None:
        self._attending = False  # kqv_out was seen and what follows the attention was not
        self._attended, self._layer = "", ""  # name of the node that the output projection made last, and its layer

    def __call__(self, name: str, op: str, sources: Sequence[str] = ()) -> str | None:
        """The tap of a node by its name, its operation (``MUL_MAT``, ``ROPE`` ...) and the names of the tensors it is made of."""
        if op == "ROPE" and name.startswith("node_") and sources:
            name = sources[0]  # what turns has a name, and the result has none
        stem, _, layer = name.partition("-")
        if op in VIEWS:
            return self._tap(SHOWN_VIEWS.get(stem) if op == "VIEW" or stem == "ffn_moe_weights_softmax" else None, layer)
        weight = next((s for s in sources if s.startswith(("blk.", "output_norm.", "token_embd_norm."))), None)
        if weight is not None and op in PRODUCTS:
            return self._by_weight(weight, name)
        if self._attended in sources and name.startswith("node_"):
            return self._unnamed(name, op, sources)
        if stem == HEAD_TAPS[1]:
            return stem
        if op == "CONCAT":
            last = sources[-1].partition("-")[0] if sources else ""
            return self._tap(PUT_TOGETHER.get((stem, "" if last.startswith("node_") else last)), layer)
        if op in PRODUCTS and stem in BY_PRODUCT_NAME and not (stem == "ffn_out" and op == "ADD"):
            return self._tap(BY_PRODUCT_NAME[stem], layer)
        ops, tap = BY_NAME.get(stem, (ANY, None))
        if (ops and op not in ops) or (stem == "ffn_out" and not any(s.startswith("ffn_moe_out") for s in sources)):
            return None
        self._attending = tap == "kqv_out" or (self._attending and tap != "ffn_inp")
        return self._tap(tap, layer)

    def _unnamed(self, name: str, op: str, sources: Sequence[str]) -> str | None:
        """A node without a name that reads the attention's output: some of its rows, or the sum with the stream."""
        if op == "GET_ROWS":
            self._attended = name
        if op != "ADD" or any(s.startswith("ffn_out") for s in sources):
            return None
        self._attending = False
        return self._tap("ffn_inp", self._layer)

    def _by_weight(self, weight: str, name: str) -> str | None:
        if weight.startswith("output_norm."):
            return HEAD_TAPS[0]
        if weight.startswith("token_embd_norm."):
            return EMBD
        _, layer, stem = weight.rpartition(".")[0].split(".", 2)
        if stem == "attn_output":
            self._attended, self._layer = name, layer
        if stem in AFTER_OR_BEFORE:
            return self._tap("attn_post_norm" if self._attending else "ffn_norm", layer)
        return self._tap(BY_WEIGHT.get(stem), layer)

    @staticmethod
    def _tap(stem: str | None, layer: str) -> str | None:
        if stem in LAYER_TAPS:
            return f"{stem}-{layer}" if layer.isdigit() else None
        return stem
