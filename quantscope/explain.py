"""What a comparison means, in sentences: the first divergence, the operation that made it, and the setting of a rotation that fits."""

from __future__ import annotations

import re

from quantscope.arch.config import rope_of
from quantscope.compare import Comparison, Row
from quantscope.errors import QuantscopeError
from quantscope.trace import Full, Trace, covered
from quantscope.wording import count, listed, sci

# tap → the operation that makes it, and the taps it is made of ("<" is the layer before)
MADE_BY: dict[str, tuple[str, tuple[str, ...]]] = {
    "embd": ("the rows of token_embd.weight for the token ids", ()),
    "attn_norm": ("RMSNorm with attn_norm.weight", ("l_out<",)),
    "attn_norm_2": ("the norm with attn_norm_2.weight", ("l_out<",)),
    "wqkv": ("the product with attn_qkv.weight", ("attn_norm_2", "attn_norm")),
    "Qcur_pre": ("the product with attn_q.weight", ("attn_norm",)),
    "Kcur_pre": ("the product with attn_k.weight", ("attn_norm",)),
    "Vcur": ("the product with attn_v.weight", ("attn_norm",)),
    "Qcur_normed": ("RMSNorm of each head with attn_q_norm.weight", ("Qcur_pre",)),
    "Kcur_normed": ("RMSNorm of each head with attn_k_norm.weight", ("Kcur_pre",)),
    "Qcur": ("RoPE", ("Qcur_normed", "Qcur_pre")),
    "Kcur": ("RoPE", ("Kcur_normed", "Kcur_pre")),
    "kq_soft_max": ("the scaled, masked softmax of q·kᵀ", ("Qcur", "Kcur")),
    "kqv_out": ("the probabilities times v, and how heads of v are shared", ("kq_soft_max", "Vcur")),
    "attn_out": ("the product with attn_output.weight", ("kqv_out",)),
    "attn_post_norm": ("the norm of what the attention adds", ("attn_out",)),
    "ffn_inp": ("the residual sum after the attention", ("attn_post_norm", "attn_out", "l_out<")),
    "ffn_norm": ("RMSNorm with ffn_norm.weight", ("ffn_inp",)),
    "ffn_moe_logits": ("the product with ffn_gate_inp.weight", ("ffn_norm",)),
    "ffn_moe_probs": ("the router's softmax or sigmoid", ("ffn_moe_logits",)),
    "ffn_moe_topk": ("the choice of experts", ("ffn_moe_probs",)),
    "ffn_moe_weights": ("the weights of the chosen experts", ("ffn_moe_probs", "ffn_moe_topk")),
    "ffn_moe_gate": ("the products with ffn_gate_exps.weight", ("ffn_norm", "ffn_moe_topk")),
    "ffn_moe_up": ("the products with ffn_up_exps.weight", ("ffn_norm", "ffn_moe_topk")),
    "ffn_moe_swiglu": ("the experts' activation", ("ffn_moe_gate", "ffn_moe_up")),
    "ffn_moe_down": ("the products with ffn_down_exps.weight", ("ffn_moe_swiglu", "ffn_moe_topk")),
    "ffn_moe_out": ("the weighted sum of the experts", ("ffn_moe_down", "ffn_moe_weights")),
    "ffn_gate": ("the product with ffn_gate.weight", ("ffn_norm",)),
    "ffn_up": ("the product with ffn_up.weight", ("ffn_norm",)),
    "ffn_swiglu": ("silu(gate) · up", ("ffn_gate", "ffn_up")),
    "ffn_shexp": ("the product with ffn_down_shexp.weight", ("ffn_swiglu",)),
    "ffn_shexp_out": ("the shared experts times their gate", ("ffn_shexp",)),
    "ffn_out": ("the product with ffn_down.weight", ("ffn_swiglu",)),
    "ffn_post_norm": ("the norm of what the feed-forward adds", ("ffn_out",)),
    "l_out": ("the residual sum after the feed-forward", ("ffn_post_norm", "ffn_out", "ffn_inp")),
    "result_norm": ("RMSNorm with output_norm.weight", ("l_out<",)),
    "result_output": ("the product with output.weight (token_embd.weight where tied)", ("result_norm",)),
}


def answer(c: Comparison) -> str:
    """The comparison in one paragraph: agreement within the floor, or the first divergence and what lies before it."""
    first = c.first_divergence
    if first is None:
        return _no_divergence(c)
    size = f"NMSE {_about(first)}{sci(first.nmse)}, floor {sci(first.floor)}"
    before, here = c.last_agreement, {row.tap: row for row in c.rows}
    operation, inputs = _origin(first.tap)
    agreeing = [tap for tap in inputs if tap in here and here[tap].verdict == "within"]
    where = f"The first tap that differs is {first.tap} ({size})."
    if agreeing and inputs:
        cause = f"Its input {listed(agreeing)} agrees, so the fault is in what makes it: {operation}."
    elif not inputs:
        cause = f"Nothing comes before it: it is {operation}."
    elif before is not None:
        cause = f"The last tap shown to agree is {before.tap}; the fault is between the two, {first.tap} being made by {operation}."
    else:
        cause = f"No tap before it is shown to agree; it is made by {operation}. Record more taps before it to see where it begins."
    n = sum(row.verdict == "differs" for row in c.rows)
    return f"{where} {cause} {count(n, 'tap')} of {len(c.rows)} {'differs' if n == 1 else 'differ'} in all."


def _no_divergence(c: Comparison) -> str:
    shown = [row for row in c.rows if row.verdict == "within"]
    hidden = len(c.rows) - len(shown)
    if not shown:
        return (
            f"Nothing is shown to differ, and nothing is shown to agree: {count(hidden, 'tap')} {'has' if hidden == 1 else 'have'} only "
            f"statistics, which a permuted or transposed signal keeps."
        )
    worst = max(shown, key=lambda row: row.nmse / row.floor if row.floor else row.nmse)
    rest = f" {count(hidden, 'more tap')} cannot be judged from statistics." if hidden else ""
    return (
        f"No divergence: all {len(shown)} taps with values agree within their floor. Closest to it is {worst.tap}, NMSE {_about(worst)}"
        f"{sci(worst.nmse)} of {sci(worst.floor)}.{rest}"
    )


def _about(row: Row) -> str:
    return {"values": "", "sample": "", "fingerprint": "about ", "statistics": "at least "}[row.kind]


def _origin(tap: str) -> tuple[str, list[str]]:
    """(operation, names of the taps it reads) of a tap by its full name."""
    stem, _, layer = tap.rpartition("-")
    if not (layer.isdigit() and stem in MADE_BY):
        operation, inputs = MADE_BY.get(tap, ("an operation this program does not know", ()))
        return operation, [i for i in inputs if not i.endswith("<")]
    operation, inputs = MADE_BY[stem]
    previous = "embd" if int(layer) == 0 else f"l_out-{int(layer) - 1}"
    return operation, [previous if i == "l_out<" else f"{i}-{layer}" for i in inputs]


def rotation(ref: Trace, test: Trace, c: Comparison) -> str | None:
    """What RoPE setting the engine used, from its own q or k before and after; None where it rotated as expected, or where they were
    not recorded whole.

    The first layer whose rotated q or k differs is looked at.  The model's config must be in one of the traces.
    """
    config = ref.origin.config or test.origin.config
    differing = next((row.tap for row in c.rows if row.verdict == "differs" and re.fullmatch(r"[QK]cur-\d+", row.tap)), None)
    if config is None or differing is None:
        return None
    letter, layer = differing[0], differing.partition("-")[2]
    names = [f"{letter}cur_{part}-{layer}" for part in ("normed", "pre")]
    before = next(((name, full) for name in names if (full := test.find(name, Full)) is not None), None)
    after = test.find(differing, Full)
    if before is None or after is None or before[1].values.shape != after.values.shape:
        return None
    positions = covered(after, test.origin) or tuple(range(len(after.values)))
    return _fitted(ref, config, before[0], before[1], after, positions, letter)


def _fitted(ref: Trace, config: object, name: str, before: Full, after: Full, positions: tuple[int, ...], letter: str) -> str | None:
    import torch

    from quantscope.rotation import fit_rotation

    assert isinstance(config, dict)
    same = ref.find(name, Full)
    reference = same.values if same is not None and same.values.shape == before.values.shape else None
    factors = None if config.get("rope_factors") is None else torch.tensor(config["rope_factors"])
    n_head = config["n_head"] if letter == "Q" else config["n_head_kv"]
    try:
        report = fit_rotation(before.values, after.values, n_head, rope_of(config), positions, factors, reference)
    except QuantscopeError as e:
        return f"The rotation could not be examined: {e}"
    return None if report.as_expected else report.verdict
