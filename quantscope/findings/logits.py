"""Findings about whole distributions: the order by KL divergence, and perplexity."""

from __future__ import annotations

import dataclasses
import math

from quantscope.results import Finding, LogitStats, Paired, Study, Variant
from quantscope.wording import count, fixed, listed, percent, sci, sig

FEW_POSITIONS = 100
FLOOR_TIMES = 10.0  # a KL divergence within this multiple of the numerical floor may be rounding


def kl_order(study: Study) -> Finding | None:
    """Variants from closest to farthest, and whether their sizes order them the same way."""
    measured = [(v, v.logits) for v in study.quantized if v.logits and v.logits.kl_nats is not None]
    if not measured:
        return None
    measured.sort(key=lambda pair: _kl(pair[1]))
    n = measured[0][1].n_positions
    text = f"KL divergence from {study.original}: {_chain(measured)} nats, the mean of {count(n, 'position')}."
    text += _size_order([v for v, _ in measured]) + _agreement(measured)
    if n < FEW_POSITIONS:
        text += f" {count(n, 'position')} {'is' if n == 1 else 'are'} few: give a text with --text for figures to rely on."
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
        return " That is also the order of the sizes, largest first."
    pairs = [(a, b) for i, a in enumerate(ordered) for b in ordered[i + 1 :] if (a.file_bytes or 0) < (b.file_bytes or 0)]
    return f" {listed(f'{a.name} is smaller and yet closer than {b.name}' for a, b in pairs)}."


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
    settled = [f"{p.b} is better than {p.a} by {sig(p.mean_nats)} ({_interval(p)})" for p in compared if p.better]
    open_ones = [f"{p.b} and {p.a} ({_interval(p)})" for p in compared if not p.better]
    first = compared[0]
    what = f"95 % intervals of the mean difference of KL [nats], over {count(first.n_units, first.unit)}"
    text = f"On the same positions ({what}): " + "; ".join(settled)
    if open_ones:
        text += f"{'; n' if settled else 'n'}ot told apart: {', '.join(open_ones)}, whose order may be chance: more --chunks would tell"
    return Finding("paired", text + ".", {f"{p.b} < {p.a}": dataclasses.asdict(p) for p in compared})


def _interval(p: Paired) -> str:
    return f"{sig(p.low_nats)} to {sig(p.high_nats)}"


def floor(study: Study) -> Finding | None:
    """How far the divergences are above what float32 rounding makes by itself."""
    known = {v.name: v.logits.kl_nats for v in study.quantized if v.logits and v.logits.kl_nats is not None}
    if study.floor is None or not known:
        return None
    within = [name for name, kl in known.items() if not kl > FLOOR_TIMES * study.floor.kl_nats]
    text = f"Float32 rounding alone makes a KL divergence of {sci(study.floor.kl_nats, 2)} nats"
    if within:
        text += (
            f"; {listed(within)} {'is' if len(within) == 1 else 'are'} within {FLOOR_TIMES:.0f} times that: no difference is shown there."
        )
    else:
        name, smallest = min(known.items(), key=lambda item: item[1])
        text += f": the smallest one measured, {name} {sig(smallest)}, is {quantity_of(smallest / study.floor.kl_nats)} times as large."
    return Finding("numerical-floor", text, dataclasses.asdict(study.floor))


def base(study: Study) -> Finding | None:
    """What the 16 bits of a base leave, and what else is in the divergences from it."""
    if study.base is None or study.original is None:
        return None
    half = study.base.step_nats / 2
    known = {v.name: v.logits.kl_nats for v in study.quantized if v.logits and v.logits.kl_nats is not None}
    text = (
        f"The original is the file {study.original}, log-probabilities of 16 bits: each is off by {sci(half, 2)} nats at most, and so is "
        f"the KL divergence of a position. Tokens more than 16 nats below the most probable one are in no divergence; they have "
        f"{percent(study.base.missing)} of the probability."
    )
    within = [name for name, kl in known.items() if not abs(kl) > half]
    if within:
        text += f" The mean divergence of {listed(within)} is within that rounding: no difference is shown there."
    text += " What the program that wrote the file computes otherwise than the reference here is in every divergence, too."
    return Finding("base", text, dataclasses.asdict(study.base))


def quantity_of(times: float) -> str:
    """A large multiple in two digits: ``12``, ``3,400``, ``1.2e9``; ``∞`` times nothing."""
    return sig(times, 2) if not 100 <= times < 1e6 else f"{float(f'{times:.1e}'):,.0f}"


def _agreement(measured: list[tuple[Variant, LogitStats]]) -> str:
    known = [(v.name, s.top1_agree) for v, s in measured if s.top1_agree is not None]
    if not known:
        return ""
    if all(agree == 1 for _, agree in known):
        return " The top token is the original's at every position in every variant."
    return f" Same top token at {listed(f'{name} {fixed(100 * agree, 2)}%' for name, agree in known)} of the positions."


def perplexity(study: Study) -> Finding | None:
    """The original's perplexity and how much each variant adds."""
    base = study.reference.logits.ppl if study.reference and study.reference.logits else None
    known = {v.name: v.logits for v in study.quantized if v.logits and v.logits.ppl is not None}
    if base is None or not known:
        return None
    ordered = sorted(known.items(), key=lambda item: item[1].ppl or 0)
    parts = [f"{name} {fixed(s.ppl, 3)} ({_change(s, base)})" for name, s in ordered]
    text = f"Perplexity is {fixed(base, 3)} in {study.original}; {listed(parts)}."
    better = [name for name, s in ordered if _clearly_better(s)]
    if better:
        text += f" {listed(better)} below the original: on this text the error happens to help, which does not make the variant better."
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
