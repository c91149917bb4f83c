"""Findings about the layers: growth of RMS, drift of the mean, cells that stand out, growth of the error, broken numbers."""

from __future__ import annotations

import math
from itertools import pairwise

from quantscope import metrics
from quantscope.language import say
from quantscope.phrases import clauses, count, listed, paragraph, span, times
from quantscope.results import Finding, Flag, LayerRow, Study, Variant
from quantscope.wording import mean, percent, with_sign

SIMILAR = 0.1  # growth within 10 % counts as the same
LITTLE_GROWTH = 2.0  # below this multiple the residual stream hardly grows
NEAR_ZERO = 0.05  # a mean below 5 % of its RMS: multiples of it say little
NAMED_FLAGS = 5  # flagged cells that the sentence names; all are in the evidence


def with_layers(study: Study) -> list[Variant]:
    return [v for v in study.variants if v.layers]


def last_growth(variant: Variant) -> float:
    return metrics.rms_growth([row.output_rms for row in variant.layers])[-1]


# ---- RMS growth ---------------------------------------------------------------------------------------------------------


def growth_of_rms(study: Study) -> Finding | None:
    """Does the RMS grow in the original too?  Then it is architecture, not damage."""
    variants = with_layers(study)
    if not variants:
        return None
    growth = {v.name: last_growth(v) for v in variants}
    if not all(math.isfinite(g) for g in growth.values()):
        return None  # the finding on NaN and infinity says it
    rows = variants[0].layers
    where = say("from layer {first} to layer {last}", first=rows[0].layer, last=rows[-1].layer)
    original = growth.get(study.original or "")
    others = {name: g for name, g in growth.items() if name != study.original}
    if original is None:
        text = _growth_alone(growth, where)
    elif not others:
        text = say("Output RMS grows {growth} {where} in the original.", growth=times(original), where=where)
    else:
        text = _growth_beside_original(original, others, where)
    return Finding("rms-growth", text, {"first_layer": rows[0].layer, "last_layer": rows[-1].layer, "growth": growth})


def _growth_alone(growth: dict[str, float], where: str) -> str:
    each = listed(say("{value} ({name})", value=times(g), name=name) for name, g in growth.items())
    sentences = [say("Output RMS grows {growth} {where}.", growth=each, where=where)]
    low, high = min(growth.values()), max(growth.values())
    if len(growth) > 1 and high <= low * (1 + SIMILAR):
        sentences.append(
            say(
                "They are within {spread} of each other, so it hardly depends on which of these quantizations is used.",
                spread=percent(high / low - 1),
            )
        )
    elif len(growth) > 1:
        sentences.append(say("The largest is {spread} above the smallest.", spread=percent(high / low - 1)))
    sentences.append(say("Whether the original grows as much, which would make it architecture and not damage, cannot be told without it."))
    return paragraph(sentences)


def _growth_beside_original(original: float, others: dict[str, float], where: str) -> str:
    grown = {"growth": times(original), "where": where, "others": span(list(others.values()))}
    change = {name: g / original - 1 for name, g in others.items()}
    far = {name: c for name, c in change.items() if abs(c) > SIMILAR}
    if not far:
        spread = percent(abs(max(change.values(), key=abs)))
        if original < LITTLE_GROWTH:
            return say(
                "Output RMS grows {growth} {where} in the original and {others} in the other variants, which is little (at most {spread} "
                "apart): no sign of damage.",
                spread=spread,
                **grown,
            )
        return say(
            "Output RMS grows {growth} {where} in the original and {others} in the other variants (at most {spread} apart): the growth "
            "belongs to the architecture, it is not quantization damage.",
            spread=spread,
            **grown,
        )
    deviations = listed(say("{name} by {change}", name=name, change=f"{with_sign(100 * c, 0)}%") for name, c in far.items())
    if original < LITTLE_GROWTH:
        return say(
            "Output RMS grows {growth} {where} in the original and {others} in the other variants, which is little; {deviations} away from "
            "the original: that is damage.",
            deviations=deviations,
            **grown,
        )
    return say(
        "Output RMS grows {growth} {where} in the original and {others} in the other variants; {deviations} away from the original: the "
        "growth itself belongs to the architecture, this deviation does not.",
        deviations=deviations,
        **grown,
    )


# ---- Drift of the mean --------------------------------------------------------------------------------------------------


def drift_of_mean(study: Study) -> Finding | None:
    """How far and in which direction the mean of the layer output moves, and how much of the multiple is just RMS growth."""
    variants = [v for v in with_layers(study) if len(v.layers) > 1 and _finite_means(v)]
    if not variants:
        return None
    rows = variants[0].layers
    alike = _drifting_like_the_original(study, variants)
    ends = {"first": rows[0].layer, "last": rows[-1].layer, "drifts": clauses(_drift_of(v) for v in variants if v not in alike)}
    if alike:
        text = say(
            "Mean of the layer output from layer {first} to layer {last}: {drifts}; {alike} likewise ({multiples}).",
            alike=listed(v.name for v in alike),
            multiples=span([_drift_numbers(v)["drift"] for v in alike]),
            **ends,
        )
    else:
        text = say("Mean of the layer output from layer {first} to layer {last}: {drifts}.", **ends)
    more = [_direction(study, variants), *_what_the_multiple_is(variants), _offset_from_original(study, variants)]
    text = paragraph([text, *more])
    return Finding("mean-drift", text, {v.name: _drift_numbers(v) for v in variants})


def _finite_means(v: Variant) -> bool:
    first, last = v.layers[0], v.layers[-1]
    return (
        all(math.isfinite(x) for x in (first.mean, last.mean, first.output_rms, last.output_rms)) and first.output_rms > 0 < last.output_rms
    )


def _drifting_like_the_original(study: Study, variants: list[Variant]) -> list[Variant]:
    """Variants whose drift is within SIMILAR of the original's, in the same direction."""
    reference = next((v for v in variants if v.name == study.original), None)
    if reference is None:
        return []
    wanted = _drift_numbers(reference)
    numbers = {v.name: _drift_numbers(v) for v in variants if v is not reference}
    return [
        v
        for v in variants
        if v is not reference
        and abs(numbers[v.name]["drift"] / wanted["drift"] - 1) <= SIMILAR
        and numbers[v.name]["last"] * wanted["last"] > 0
    ]


def _drift_numbers(v: Variant) -> dict[str, float]:
    first, last = v.layers[0], v.layers[-1]
    return {
        "first": first.mean,
        "last": last.mean,
        "drift": metrics.mean_drift([first.mean, last.mean]),
        "first_mean_to_rms": metrics.mean_to_rms(first.mean, first.output_rms),
        "last_mean_to_rms": metrics.mean_to_rms(last.mean, last.output_rms),
        "rms_growth": last_growth(v),
    }


def _drift_of(v: Variant) -> str:
    first, last = v.layers[0].mean, v.layers[-1].mean
    drift = metrics.mean_drift([first, last])
    moved = {"name": v.name, "first": mean(first), "last": mean(last)}
    if math.isnan(drift):
        return say("{name} {first} → {last} (from exactly zero, so it has no multiple)", **moved)
    moved["drift"] = times(drift)
    if drift < 0:
        return say("{name} {first} → {last} ({drift}, it changes its sign)", **moved)
    if drift < 1:
        return say("{name} {first} → {last} ({drift}, towards zero)", **moved)
    if last > 0:
        return say("{name} {first} → {last} ({drift}, positive direction)", **moved)
    return say("{name} {first} → {last} ({drift}, negative direction)", **moved)


def _direction(study: Study, variants: list[Variant]) -> str:
    """Which variants end on the other side of zero than the original, or than each other."""
    ends = {v.name: v.layers[-1].mean > 0 for v in variants}
    if study.original is None:
        if len(set(ends.values())) < 2:
            return ""
        up, down = [n for n, x in ends.items() if x], [n for n, x in ends.items() if not x]
        return say("The variants drift apart: {up} to the positive side, {down} to the negative.", up=listed(up), down=listed(down))
    if study.original not in ends or len(ends) < 2:
        return ""
    other = [n for n, x in ends.items() if x != ends[study.original]]
    if not other:
        return say("All end on the original's side of zero.")
    return say(
        "{names} {_end} on the other side of zero than the original.", names=listed(other), _end="ends" if len(other) == 1 else "end"
    )


def _what_the_multiple_is(variants: list[Variant]) -> list[str]:
    """The exact split drift = RMS growth × change of |mean|/RMS, and a warning where the first mean is near zero."""
    numbers = {v.name: _drift_numbers(v) for v in variants}
    name = max((n for n in numbers if math.isfinite(numbers[n]["drift"])), key=lambda n: abs(numbers[n]["drift"]), default=None)
    if name is None:
        return []
    d = numbers[name]
    split = say(
        "Of the {drift} in {name}, {growth} is the growth of RMS and {ratio} the change of |mean|/RMS, from {first} to {last}.",
        drift=times(abs(d["drift"])),
        name=name,
        growth=times(d["rms_growth"]),
        ratio=times(d["last_mean_to_rms"] / d["first_mean_to_rms"]),
        first=percent(d["first_mean_to_rms"]),
        last=percent(d["last_mean_to_rms"]),
    )
    near = [n for n, x in numbers.items() if x["first_mean_to_rms"] < NEAR_ZERO]
    if not near:
        return [split]
    whose = say("every variant") if len(near) == len(numbers) > 1 else listed(near)
    warning = say(
        "The first mean is near zero in {whose} (under {limit} of RMS): multiples of so small a number say little.",
        whose=whose,
        limit=percent(NEAR_ZERO, 1),
    )
    return [split, warning]


def _offset_from_original(study: Study, variants: list[Variant]) -> str:
    """The last mean's distance from the original's, in units of the original's RMS: what quantization really moved."""
    reference = next((v for v in variants if v.name == study.original), None)
    others = [v for v in variants if v.name != study.original]
    if reference is None or not others:
        return ""
    last = reference.layers[-1]
    worst = max(others, key=lambda v: abs(v.layers[-1].mean - last.mean))
    moved = abs(worst.layers[-1].mean - last.mean) / last.output_rms
    return say("Against the original the last mean is off by at most {moved} of its RMS ({name}).", moved=percent(moved), name=worst.name)


# ---- Cells that stand out -----------------------------------------------------------------------------------------------


def standing_out(study: Study) -> Finding | None:
    """The flagged means of the activation, strongest first."""
    variants = [v for v in study.variants if any(row.swiglu_mean is not None for row in v.layers)]
    if len(variants) < 2:
        return None
    flagged = [(v, row, flag) for v in variants for row in v.layers for flag in row.flags]
    flagged.sort(key=lambda item: -item[2].times)
    rule = f"{metrics.FLAG_TIMES:g}"
    if not flagged:
        text = say(
            "No {activation} mean stands out: none has a |mean|/RMS over {rule} times the median of the other variants.",
            activation=study.activation,
            rule=rule,
        )
        return Finding("standing-out", text, {"cells": []})
    named = [_cell(*item) for item in flagged[:NAMED_FLAGS]]
    more = len(flagged) - NAMED_FLAGS
    sentences = [
        say(
            "{n} {activation} {_mean} {_stand} out with a |mean|/RMS over {rule} times the median of the other variants: {cells}.",
            n=f"{len(flagged):,}",
            activation=study.activation,
            _mean="mean" if len(flagged) == 1 else "means",
            _stand="stands" if len(flagged) == 1 else "stand",
            rule=rule,
            cells=clauses([*named, say("and {n} more", n=more)] if more > 0 else named),
        )
    ]
    if study.original is None and flagged[0][2].n_others == 1:
        sentences.append(say("With one other variant the rule cannot say which of the two is off."))
    cells = [{"variant": v.name, "layer": row.layer, "mean_to_rms": f.mean_to_rms, "times": f.times} for v, row, f in flagged]
    return Finding("standing-out", paragraph(sentences), {"cells": cells})


def _cell(v: Variant, row: LayerRow, flag: Flag) -> str:
    return say(
        "{name} layer {layer}, mean {mean}, {share} of its RMS, {times} the others' {others}",
        name=v.name,
        layer=row.layer,
        mean=mean(row.swiglu_mean),
        share=percent(flag.mean_to_rms),
        times=times(flag.times),
        others=percent(flag.median_of_others),
    )


# ---- Growth of the error ------------------------------------------------------------------------------------------------


def error_growth(study: Study) -> Finding | None:
    """From which layer the error against the original grows faster than before (``metrics.knee`` on NMSE in dB)."""
    curves = {v.name: curve for v in study.quantized if len(curve := _error_curve(v)) > 1}
    if not curves:
        return None
    knees = {name: metrics.knee([x for x, _ in c], [y for _, y in c]) for name, c in curves.items()}
    ordered = sorted(curves, key=lambda n: curves[n][-1][1])
    ends = (f"{n} {with_sign(curves[n][0][1], 1)} → {with_sign(curves[n][-1][1], 1)}" for n in ordered)
    sentences = [say("Error of the layer output against the original (NMSE in dB, first → last layer): {errors}.", errors=listed(ends))]
    sentences += [_knee_sentence(n, k) for n in ordered if (k := knees[n]) is not None]
    straight = [n for n in ordered if knees[n] is None]
    sentences += [_no_knee(straight, curves)] if straight else []
    text = paragraph(sentences)
    evidence = {n: {"curve": curves[n], "knee": _knee_numbers(knees[n]), "steepest": _steepest(curves[n])} for n in ordered}
    return Finding("error-growth", text, evidence)


def _error_curve(v: Variant) -> list[tuple[int, float]]:
    """(layer, NMSE in dB) of every layer whose error is neither zero nor broken."""
    return [(row.layer, -row.sqnr_db) for row in v.layers if row.sqnr_db is not None and math.isfinite(row.sqnr_db)]


def _knee_sentence(name: str, k: metrics.Knee) -> str:
    return say(
        "{name}: from layer {layer} on it grows by {after} dB a layer, before by {before}.",
        name=name,
        layer=f"{k.layer:g}",
        after=with_sign(k.after, 2),
        before=with_sign(k.before, 2),
    )


def _knee_numbers(k: metrics.Knee | None) -> dict[str, float] | None:
    return None if k is None else {"layer": k.layer, "db_per_layer_before": k.before, "db_per_layer_after": k.after}


def _steepest(curve: list[tuple[int, float]]) -> dict[str, float]:
    """The largest rise from one listed layer to the next."""
    rise, layer = max((b[1] - a[1], b[0]) for a, b in pairwise(curve))
    return {"layer": layer, "db": rise}


def _no_knee(straight: list[str], curves: dict[str, list[tuple[int, float]]]) -> str:
    fewest = min(len(curves[n]) for n in straight)
    steps = {n: _steepest(curves[n]) for n in straight}
    largest = max(straight, key=lambda n: steps[n]["db"])
    step = {"db": with_sign(steps[largest]["db"], 1), "layer": f"{steps[largest]['layer']:g}", "name": largest}
    if fewest < metrics.MIN_KNEE_POINTS:
        return say(
            "{layers} are too few to say from which it grows faster than before; the steepest single step is {db} dB at layer {layer} "
            "({name}).",
            layers=count(fewest, "layer"),
            **step,
        )
    if len(straight) == len(curves) > 1:
        return say(
            "In no variant is there a layer from which it grows clearly faster than before; the steepest single step is {db} dB at layer "
            "{layer} ({name}).",
            **step,
        )
    return say(
        "{names}: no layer from which it grows clearly faster than before; the steepest single step is {db} dB at layer {layer} ({name}).",
        names=listed(straight),
        **step,
    )


# ---- Broken numbers -----------------------------------------------------------------------------------------------------


def non_finite(study: Study) -> Finding | None:
    """Variants whose signals are NaN or infinite, with the first layer where that shows."""
    first: dict[str, int | str] = {}
    for v in study.variants:
        bad = [row.layer for row in v.layers if not all(math.isfinite(x) for x in (row.input_rms, row.output_rms, row.mean))]
        kl = v.logits.kl_nats if v.logits else None
        if bad:
            first[v.name] = bad[0]
        elif (kl is not None and math.isnan(kl)) or any(g.logit is not None and not math.isfinite(g.logit) for g in v.generated):
            first[v.name] = "logits"
    if not first:
        return None
    where = listed(
        say("{name} (first in the logits)", name=name) if at == "logits" else say("{name} (first in layer {layer})", name=name, layer=at)
        for name, at in first.items()
    )
    text = say("NaN or infinity in {where}: the numbers after that point mean nothing.", where=where)
    return Finding("non-finite", text, {"first": first})
