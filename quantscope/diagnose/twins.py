"""Faults that much evidence cannot tell apart, and what tells them apart."""

from __future__ import annotations

from collections.abc import Sequence

from quantscope.language import mark, say

PROBES: Sequence[tuple[frozenset[str], str]] = (
    (
        frozenset({"rope-missing", "rope-stuck"}),
        mark("nothing: a rotation by 0 is no rotation; look at the positions that the engine passes"),
    ),
    (
        frozenset({"act-gelu-erf", "act-gelu-tanh"}),
        mark("the whole ffn_gate, ffn_up and ffn_swiglu of one layer in float32 (they are 4e-8 apart)"),
    ),
    (frozenset({"weight-transposed", "head-layout"}), mark("nothing: they are the same reading of output.weight")),
    (frozenset({"rope-offset-q", "rope-offset-k"}), mark("Qcur and Kcur of layer 0: only one of them is wrong")),
    (frozenset({"norm-weight-missing", "norm-weight-twice", "norm-weight-plus-one"}), mark("a norm whose weights are not all alike")),
    (frozenset({"rope-offset-q", "cache-off-by-one"}), mark("the same text in one batch: a cache fault is gone there")),
)


def probe(names: Sequence[str]) -> str:
    """What would tell these faults apart."""
    found = [text for twins, text in PROBES if len(twins & set(names)) > 1]
    if found:
        return say(found[0])
    return say("whole tensors of the operations they touch, in the first layer that differs, on eight different tokens")
