"""What a comparison means, in sentences: the first divergence, the operation that made it, and the setting of a rotation that fits."""

from __future__ import annotations

import re

from quantscope.arch.config import rope_of
from quantscope.compare import Comparison, Row
from quantscope.errors import QuantscopeError
from quantscope.language import mark, say
from quantscope.phrases import count, listed, paragraph
from quantscope.trace import Full, Trace, covered
from quantscope.wording import sci

# tap → the operation that makes it (a template to say), and the taps it is made of ("<" is the layer before)
MADE_BY: dict[str, tuple[str, tuple[str, ...]]] = {
    "embd": (mark("the rows of token_embd.weight for the token ids"), ()),
    "attn_norm": (mark("the norm with attn_norm.weight"), ("l_out<",)),
    "attn_norm_2": (mark("the norm with attn_norm_2.weight"), ("l_out<",)),
    "wqkv": (mark("the product with attn_qkv.weight"), ("attn_norm_2", "attn_norm")),
    "Qcur_pre": (mark("the product with attn_q.weight"), ("attn_norm",)),
    "Kcur_pre": (mark("the product with attn_k.weight"), ("attn_norm",)),
    "Vcur": (mark("the product with attn_v.weight"), ("attn_norm",)),
    "Qcur_normed": (mark("the norm of q with attn_q_norm.weight"), ("Qcur_pre",)),
    "Kcur_normed": (mark("the norm of k with attn_k_norm.weight"), ("Kcur_pre",)),
    "Qcur": (mark("RoPE"), ("Qcur_normed", "Qcur_pre")),
    "Kcur": (mark("RoPE"), ("Kcur_normed", "Kcur_pre")),
    "Qcur_latent": (mark("RoPE and the product of q with attn_k_b.weight"), ("Qcur", "Qcur_pre")),
    "Kcur_latent": (mark("the product with attn_kv_a_mqa.weight, its norm and RoPE"), ("attn_norm",)),
    "kq_soft_max": (mark("the scaled, masked softmax of q·kᵀ"), ("Qcur_latent", "Kcur_latent", "Qcur", "Kcur")),
    "kqv_out": (mark("the probabilities times v, and how heads of v are shared"), ("kq_soft_max", "Kcur_latent", "Vcur")),
    "attn_out": (mark("the product with attn_output.weight"), ("kqv_out",)),
    "attn_post_norm": (mark("the norm of what the attention adds"), ("attn_out",)),
    "ffn_inp": (mark("the residual sum after the attention"), ("attn_post_norm", "attn_out", "l_out<")),
    "ffn_norm": (mark("the norm with ffn_norm.weight"), ("ffn_inp",)),
    "ffn_moe_logits": (mark("the product with ffn_gate_inp.weight"), ("ffn_norm",)),
    "ffn_moe_probs": (mark("the router's softmax or sigmoid"), ("ffn_moe_logits",)),
    "ffn_moe_topk": (mark("the choice of experts"), ("ffn_moe_probs",)),
    "ffn_moe_weights": (mark("the weights of the chosen experts"), ("ffn_moe_probs", "ffn_moe_topk")),
    "ffn_moe_gate": (mark("the products with ffn_gate_exps.weight"), ("ffn_norm", "ffn_moe_topk")),
    "ffn_moe_up": (mark("the products with ffn_up_exps.weight"), ("ffn_norm", "ffn_moe_topk")),
    "ffn_moe_swiglu": (mark("the experts' activation"), ("ffn_moe_gate", "ffn_moe_up")),
    "ffn_moe_down": (mark("the products with ffn_down_exps.weight"), ("ffn_moe_swiglu", "ffn_moe_topk")),
    "ffn_moe_out": (mark("the weighted sum of the experts"), ("ffn_moe_down", "ffn_moe_weights")),
    "ffn_gate": (mark("the product with ffn_gate.weight"), ("ffn_norm",)),
    "ffn_up": (mark("the product with ffn_up.weight"), ("ffn_norm",)),
    "ffn_swiglu": (mark("the activation, times up where there is a gate"), ("ffn_gate", "ffn_up")),
    "ffn_shexp": (mark("the product with ffn_down_shexp.weight"), ("ffn_swiglu",)),
    "ffn_shexp_out": (mark("the shared experts times their gate"), ("ffn_shexp",)),
    "ffn_out": (mark("the product with ffn_down.weight"), ("ffn_swiglu",)),
    "ffn_post_norm": (mark("the norm of what the feed-forward adds"), ("ffn_out",)),
    "l_out": (mark("the residual sum after the feed-forward"), ("ffn_post_norm", "ffn_out", "ffn_inp")),
    "result_norm": (mark("the norm with output_norm.weight"), ("l_out<",)),
    "result_output": (mark("the product with output.weight (token_embd.weight where tied)"), ("result_norm",)),
}
# what latent attention does in their place
LATENT_MADE_BY: dict[str, str] = {
    "Qcur_pre": mark("the product that makes q, or two with a norm between them (attn_q_a.weight, attn_q_b.weight)"),
    "Kcur": mark("the latent vector (attn_kv_a_mqa.weight, its norm and RoPE) and the keys made of it"),
    "Vcur": mark("the latent vector (attn_kv_a_mqa.weight and its norm) and the values made of it"),
    "kqv_out": mark("the probabilities times v; with a matrix of each head times the latent vectors, and the product with attn_v_b.weight"),
}


def made_by(stem: str, *, latent: bool = False) -> str:
    """The operation that makes a tap, in the reader's language.  latent: in a model with latent attention."""
    operation = LATENT_MADE_BY.get(stem) if latent else None
    return say(operation or MADE_BY[stem][0])


def answer(c: Comparison) -> str:
    """The comparison in one paragraph: agreement within the floor, or the first divergence and what lies before it."""
    first = c.first_divergence
    if first is None:
        return _no_divergence(c)
    before, here = c.last_agreement, {row.tap: row for row in c.rows}
    operation, inputs = _origin(first.tap)
    agreeing = [tap for tap in inputs if tap in here and here[tap].verdict == "within"]
    n = sum(row.verdict == "differs" for row in c.rows)
    where = say(
        "The first tap that differs is {tap} (NMSE {error}, floor {floor}).", tap=first.tap, error=_error(first), floor=sci(first.floor)
    )
    if agreeing and inputs:
        cause = say(
            "Its input {inputs} agrees, so the fault is in what makes it: {operation}.", inputs=listed(agreeing), operation=operation
        )
    elif not inputs:
        cause = say("Nothing comes before it: it is {operation}.", operation=operation)
    elif before is not None:
        cause = say(
            "The last tap shown to agree is {before}; the fault is between the two, {tap} being made by {operation}.",
            before=before.tap,
            tap=first.tap,
            operation=operation,
        )
    else:
        cause = say(
            "No tap before it is shown to agree; it is made by {operation}. Record more taps before it to see where it begins.",
            operation=operation,
        )
    in_all = say("{taps} of {total} {_differ} in all.", taps=count(n, "tap"), total=len(c.rows), _differ="differs" if n == 1 else "differ")
    return paragraph([where, cause, in_all])


def _no_divergence(c: Comparison) -> str:
    shown = [row for row in c.rows if row.verdict == "within"]
    hidden = len(c.rows) - len(shown)
    if not shown:
        return say(
            "Nothing is shown to differ, and nothing is shown to agree: {taps} {_have} only statistics, which a permuted or transposed "
            "signal keeps.",
            taps=count(hidden, "tap"),
            _have="has" if hidden == 1 else "have",
        )
    worst = max(shown, key=lambda row: row.nmse / row.floor if row.floor else row.nmse)
    agreed = say(
        "No divergence: all {n} taps with values agree within their floor. Closest to it is {tap}, NMSE {error} of {floor}.",
        n=len(shown),
        tap=worst.tap,
        error=_error(worst),
        floor=sci(worst.floor),
    )
    rest = say("{taps} cannot be judged from statistics.", taps=count(hidden, "more tap")) if hidden else ""
    return paragraph([agreed, rest])


def _error(row: Row) -> str:
    if row.kind == "fingerprint":
        return say("about {error}", error=sci(row.nmse))
    return say("at least {error}", error=sci(row.nmse)) if row.kind == "statistics" else sci(row.nmse)


def _origin(tap: str) -> tuple[str, list[str]]:
    """(operation, names of the taps it reads) of a tap by its full name."""
    stem, _, layer = tap.rpartition("-")
    if not (layer.isdigit() and stem in MADE_BY):
        operation, inputs = MADE_BY.get(tap, (mark("an operation this program does not know"), ()))
        return say(operation), [i for i in inputs if not i.endswith("<")]
    operation, inputs = MADE_BY[stem]
    previous = "embd" if int(layer) == 0 else f"l_out-{int(layer) - 1}"
    return say(operation), [previous if i == "l_out<" else f"{i}-{layer}" for i in inputs]


def rotation(ref: Trace, test: Trace, c: Comparison) -> str | None:
    """What RoPE setting the engine used, from its own q or k before and after; None where it rotated as expected, or where they were
    not recorded whole.

    The first layer whose rotated q or k differs is looked at.  The model's config must be in one of the traces.
    """
    config = ref.origin.config or test.origin.config
    differing = next((row.tap for row in c.rows if row.verdict == "differs" and re.fullmatch(r"[QK]cur-\d+", row.tap)), None)
    if config is None or differing is None or config.get("latent"):  # of latent attention's heads only the last channels turn
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
        return say("The rotation could not be examined: {error}", error=e)
    return None if report.as_expected else report.verdict
