"""Study data → sentences with their numbers.  Pure: nothing is run, nothing is read, nothing is printed.

    complete(study)    fills in what follows from the measured cells (RMS growth, flags) and then the findings
    findings(study)    the findings alone, in the order in which they should be read
    told(study)        the study with its findings in the language of the context

Each rule looks at the whole study and returns one finding, or None when it has nothing to say.  A sentence claims no more than
its numbers carry: growth that the original shows too is architecture; a multiple of a number near zero is called that; variants that
agree say nothing about the engine; and without an original the findings say what cannot be concluded.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from quantscope import metrics
from quantscope.findings import cache, engines, layers, logits, ops, routing, tokens
from quantscope.language import ENGLISH, current
from quantscope.results import Finding, Flag, LayerRow, Study, Variant
from quantscope.wording import printable

Rule = Callable[[Study], Finding | None]

RULES: tuple[Rule, ...] = (
    tokens.answer,
    engines.runs,
    layers.non_finite,
    tokens.generated,
    tokens.smallest_that_keeps,
    logits.kl_order,
    cache.cost,
    logits.pairs,
    logits.floor,
    logits.base,
    logits.perplexity,
    layers.error_growth,
    layers.growth_of_rms,
    layers.drift_of_mean,
    layers.standing_out,
    ops.weakest,
    routing.elsewhere,
    ops.massive,
    tokens.agreement,
    tokens.same_weights,
    tokens.limits,
)


def complete(study: Study) -> Study:
    """The study with RMS growth and flags in every layer row and with its findings; what was there of these is replaced."""
    variants = tuple(_with_flags(_with_growth(v), study.variants) for v in study.variants)
    study = dataclasses.replace(study, variants=variants)
    return dataclasses.replace(study, findings=findings(study))


def findings(study: Study) -> tuple[Finding, ...]:
    """What the study shows, the answer first; file names in the sentences are made printable."""
    found = [f for rule in RULES if (f := rule(study)) is not None]
    return tuple(dataclasses.replace(f, text=printable(f.text)) for f in found)


def told(study: Study) -> Study:
    """The study with the findings it has, in the language of the context.  study.json keeps English ones."""
    if current() == ENGLISH:
        return study
    there = {f.id for f in study.findings}
    return dataclasses.replace(study, findings=tuple(f for f in findings(study) if f.id in there))


def _with_growth(variant: Variant) -> Variant:
    growth = metrics.rms_growth([row.output_rms for row in variant.layers])
    rows = tuple(dataclasses.replace(row, rms_growth=g) for row, g in zip(variant.layers, growth, strict=True))
    return dataclasses.replace(variant, layers=rows)


def _with_flags(variant: Variant, everyone: tuple[Variant, ...]) -> Variant:
    others = [{row.layer: row for row in v.layers} for v in everyone if v.name != variant.name]
    rows = tuple(_flagged(row, [o[row.layer] for o in others if row.layer in o]) for row in variant.layers)
    return dataclasses.replace(variant, layers=rows)


def _flagged(row: LayerRow, others: list[LayerRow]) -> LayerRow:
    """The row with a flag on its SwiGLU mean when |mean|/RMS is over FLAG_TIMES the median of the other variants'.

    Only the SwiGLU output is judged: the mean of the layer output crosses zero on its way through the layers, where any multiple of
    the others' value is reached by chance.
    """
    own = _swiglu_offset(row)
    times, median = metrics.times_of_others(own, [_swiglu_offset(o) for o in others])
    n = sum(math.isfinite(_swiglu_offset(o)) for o in others)
    flags = (Flag("swiglu_mean", own, median, times, n),) if times > metrics.FLAG_TIMES else ()
    return dataclasses.replace(row, flags=flags)


def _swiglu_offset(row: LayerRow) -> float:
    if row.swiglu_mean is None or row.swiglu_rms is None:
        return math.nan
    return metrics.mean_to_rms(row.swiglu_mean, row.swiglu_rms)
