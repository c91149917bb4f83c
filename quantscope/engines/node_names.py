"""Nodes of llama.cpp's graph → taps.

    namer = TapNamer();  for every node in order:  tap = namer(name, op)      "l_out-3", or None for a node that is no tap

A name occurs several times (product, scale, bias, RoPE) and the last one counts, except that q and k before RoPE are taps of their own.
Not every architecture names the output projection: it is the last product, scale or sum between kqv_out and ffn_inp.
Source: ``cb(...)`` in llama.cpp's src/llama-graph.cpp and src/models/*.cpp.
"""

from __future__ import annotations

from quantscope.model.taps import EMBD, HEAD_TAPS, LAYER_TAPS

SUMS = ("MUL_MAT", "MUL", "ADD")  # what a linear layer is made of: product, scale, bias
VIEWS = ("RESHAPE", "VIEW", "PERMUTE", "TRANSPOSE", "NONE")  # the same values again
BEFORE_ROPE = {"Qcur": "Qcur_pre", "Kcur": "Kcur_pre"}
AFTER_BIAS_OR_SCALE = {f"{name}_{part}": name for name in ("ffn_gate", "ffn_up") for part in ("b", "s")}


class TapNamer:
    """Names the nodes of one graph; they must come in the order of evaluation."""

    def __init__(self) -> None:
        self._projecting = ""  # the layer whose kqv_out was seen and whose ffn_inp was not

    def __call__(self, name: str, op: str) -> str | None:
        """The tap of a node by its name and operation (``MUL_MAT``, ``ROPE`` ...)."""
        if op in VIEWS:
            return None
        stem, _, layer = name.partition("-")
        stem = AFTER_BIAS_OR_SCALE.get(stem, stem)
        if op in SUMS:
            stem = BEFORE_ROPE.get(stem, stem)
        if stem in ("kqv_out", "ffn_inp"):
            self._projecting = layer if stem == "kqv_out" else ""
        elif self._projecting and op in SUMS:
            return f"attn_out-{self._projecting}"
        if layer.isdigit() and stem in LAYER_TAPS:
            return f"{stem}-{layer}"
        return stem if stem == EMBD or stem in HEAD_TAPS else None
