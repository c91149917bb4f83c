"""Findings about whole distributions: the order by KL divergence, and perplexity."""

from __future__ import annotations

import dataclasses
import math

from quantscope.language import say
from quantscope.phrases import between, clauses, count, joined, listed, paragraph
from quantscope.results import Finding, LogitStats, Paired, Study, Variant
from quantscope.wording import fixed, percent, sci, sig

FEW_POSITIONS = 100
FLOOR_TIMES = 10.0  # a KL divergence within this multiple of the numerical floor may be rounding


def kl_order(study: Study) -> Finding | None:
    """Variants from closest to farthest, and whether their sizes order them the same way."""
    measured = [(v, v.logits) for v in study.quantized if v.logits and v.logits.kl_nats is not None]
    if not measured:
        return None
    measured.sort(key=lambda pair: _kl(pair[1]))
    n = measured[0][1].n_positions
    order = say(
        "KL divergence from {original}: {order} nats, the mean of {positions}.",
        original=study.original,
        order=_chain(measured),
        positions=count(n, "position"),
    )
    few = say(
        "{positions} {_are} few: give a text with --text for figures to rely on.",
        positions=count(n, "position"),
        _are="is" if n == 1 else "are",
    )
    text = paragraph([order, _size_order([v for v, _ in measured]), _agreement(measured), few if n < FEW_POSITIONS else ""])
    evidence = {v.name: {"kl_nats": s.kl_nats, "kl_nats_se": s.kl_nats_se, "top1_agree": s.top1_agree} for v, s in measured}
    return Finding("kl-order", text, {"n_positions": n, **evidence})


def _kl(s: LogitStats) -> float:
    return math.inf if s.kl_nats is None or math.isnan(s.kl_nats) else s.kl_nats


def _size_order(ordered: list[Variant]) -> str:
    """Whether a smaller file is ever closer than a larger one."""
    if len(ordered) < 2 or any(v.file_bytes is None for v in ordered):
        return ""
    sizes = [v.file_bytes or 0 for v in ordered]
    if sizes == sorted(sizes, reverse=True):
        return say("That is also the order of the sizes, largest first.")
    pairs = [(a, b) for i, a in enumerate(ordered) for b in ordered[i + 1 :] if (a.file_bytes or 0) < (b.file_bytes or 0)]
    return say("{pairs}.", pairs=listed(say("{name} is smaller and yet closer than {other}", name=a.name, other=b.name) for a, b in pairs))


def _chain(measured: list[tuple[Variant, LogitStats]]) -> str:
    """``Q8_0 0.0004 < Q6_K 0.0018``; an equals sign between equal numbers."""
    text = ""
    for i, (v, s) in enumerate(measured):
        sign = "" if i == 0 else " = " if _kl(s) == _kl(measured[i - 1][1]) else " < "
        text += f"{sign}{v.name} {sig(_kl(s))}"
    return text


def pairs(study: Study) -> Finding | None:
    """Which neighbours in the order by KL are told apart, each pair judged on the same positions."""
    compared = study.neighbours()
    if not compared or not study.text:
        return None
    parts = [
        say("{better} is better than {other} by {nats} ({interval})", better=p.b, other=p.a, nats=sig(p.mean_nats), interval=_interval(p))
        for p in compared
        if p.better
    ]
    open_ones = [say("{name} and {other} ({interval})", name=p.b, other=p.a, interval=_interval(p)) for p in compared if not p.better]
    if open_ones:
        parts.append(say("not told apart: {pairs}, whose order may be chance: more --chunks would tell", pairs=joined(open_ones)))
    text = say(
        "On the same positions (95 % intervals of the mean difference of KL [nats], over {units}): {pairs}.",
        units=units(compared[0]),
        pairs=clauses(parts),
    )
    return Finding("paired", text, {f"{p.b} < {p.a}": dataclasses.asdict(p) for p in compared})


def units(p: Paired) -> str:
    """What was taken as independent: ``8 chunks``, ``64 positions``."""
    return count(p.n_units, "chunk") if p.unit == "chunk" else count(p.n_units, "position")


def _interval(p: Paired) -> str:
    return between(sig(p.low_nats), sig(p.high_nats))


def floor(study: Study) -> Finding | None:
    """How far the divergences are above what float32 rounding makes by itself."""
    known = {v.name: v.logits.kl_nats for v in study.quantized if v.logits and v.logits.kl_nats is not None}
    if study.floor is None or not known:
        return None
    within = [name for name, kl in known.items() if not kl > FLOOR_TIMES * study.floor.kl_nats]
    nats = sci(study.floor.kl_nats, 2)
    if within:
        text = say(
            "Float32 rounding alone makes a KL divergence of {nats} nats; {names} {_are} within {times} times that: no difference is shown "
            "there.",
            nats=nats,
            names=listed(within),
            _are="is" if len(within) == 1 else "are",
            times=f"{FLOOR_TIMES:.0f}",
        )
    else:
        name, smallest = min(known.items(), key=lambda item: item[1])
        text = say(
            "Float32 rounding alone makes a KL divergence of {nats} nats: the smallest one measured, {name} {smallest}, is {times} times "
            "as large.",
            nats=nats,
            name=name,
            smallest=sig(smallest),
            times=quantity_of(smallest / study.floor.kl_nats),
        )
    return Finding("numerical-floor", text, dataclasses.asdict(study.floor))


def base(study: Study) -> Finding | None:
    """What the 16 bits of a base leave, and what else is in the divergences from it."""
    if study.base is None or study.original is None:
        return None
    half = study.base.step_nats / 2
    known = {v.name: v.logits.kl_nats for v in study.quantized if v.logits and v.logits.kl_nats is not None}
    within = [name for name, kl in known.items() if not abs(kl) > half]
    text = paragraph(
        [
            say(
                "The original is the file {original}, log-probabilities of 16 bits: each is off by {half} nats at most, and so is the KL "
                "divergence of a position.",
                original=study.original,
                half=sci(half, 2),
            ),
            say(
                "Tokens more than 16 nats below the most probable one are in no divergence; they have {missing} of the probability.",
                missing=percent(study.base.missing),
            ),
            say("The mean divergence of {names} is within that rounding: no difference is shown there.", names=listed(within))
            if within
            else "",
            say("What the program that wrote the file computes otherwise than the reference here is in every divergence, too."),
        ]
    )
    return Finding("base", text, dataclasses.asdict(study.base))


def quantity_of(times: float) -> str:
    """A large multiple in two digits: ``12``, ``3,400``, ``1.2e9``; ``∞`` times nothing."""
    return sig(times, 2) if not 100 <= times < 1e6 else f"{float(f'{times:.1e}'):,.0f}"


def _agreement(measured: list[tuple[Variant, LogitStats]]) -> str:
    known = [(v.name, s.top1_agree) for v, s in measured if s.top1_agree is not None]
    if not known:
        return ""
    if all(agree == 1 for _, agree in known):
        return say("The top token is the original's at every position in every variant.")
    return say("Same top token at {shares} of the positions.", shares=listed(f"{name} {fixed(100 * agree, 2)}%" for name, agree in known))


def perplexity(study: Study) -> Finding | None:
    """The original's perplexity and how much each variant adds."""
    base = study.reference.logits.ppl if study.reference and study.reference.logits else None
    known = {v.name: v.logits for v in study.quantized if v.logits and v.logits.ppl is not None}
    if base is None or not known:
        return None
    ordered = sorted(known.items(), key=lambda item: item[1].ppl or 0)
    parts = [f"{name} {fixed(s.ppl, 3)} ({_change(s, base)})" for name, s in ordered]
    sentences = [say("Perplexity is {base} in {original}; {others}.", base=fixed(base, 3), original=study.original, others=listed(parts))]
    better = [name for name, s in ordered if _clearly_better(s)]
    if better:
        sentences.append(
            say(
                "{names} below the original: on this text the error happens to help, which does not make the variant better.",
                names=listed(better),
            )
        )
    text = paragraph(sentences)
    return Finding("perplexity", text, {"original": base, **{name: s.ppl for name, s in ordered}})


def _change(s: LogitStats, base: float) -> str:
    """``+1.2% ± 0.3%``, from the paired log ratio where it is known."""
    if s.ln_ppl_ratio is None or s.ln_ppl_ratio_se is None:
        return _signed_percent((s.ppl or math.nan) / base - 1)
    ratio = math.exp(s.ln_ppl_ratio)
    return f"{_signed_percent(ratio - 1)} ± {fixed(100 * ratio * s.ln_ppl_ratio_se, 2)}%"


def _signed_percent(x: float) -> str:
    return ("+" if x >= 0 else "") + fixed(100 * x, 2) + "%"


def _clearly_better(s: LogitStats) -> bool:
    return s.ln_ppl_ratio is not None and s.ln_ppl_ratio_se is not None and s.ln_ppl_ratio < -2 * s.ln_ppl_ratio_se
