"""The ledger of what tables of statistics can show: an engine's RMS and means, in some quantizations, without a reference.

    layer | output RMS | mean ...  of several variants of one engine, and the tokens it gave      →  Hypothesis for every suspicion

Statistics of one engine say how its variants differ from each other.  Whether any of them is right they cannot say: for that the same file
must run on the same ids in something independent.  So most of this ledger stays untested, each with the command that would test it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from quantscope import metrics
from quantscope.diagnose.ledger import Hypothesis, hypothesis, similar
from quantscope.importers.answers import Answer
from quantscope.language import mark, say
from quantscope.phrases import joined, listed, times
from quantscope.recipes import PRESETS
from quantscope.results import DEFAULT_TYPES, Flag, Study, Variant
from quantscope.wording import mean, percent, quoted

DRIFT = "mean-drift"
DRIFT_TEXT = mark("Quantization error decides where the mean of the layer outputs drifts.")
AGAINST = "quantscope diagnose FILE.gguf --against TRACE"


def ledger_of_tables(study: Study, answers: Sequence[Answer] = ()) -> tuple[Hypothesis, ...]:
    """What the layer rows of a study of imported traces, and what was answered, support.

    study: of ``findings.traces.study_of``: no original, no logits.  answers: of this and of other engines.
    """
    engine = str(study.provenance.get("engine", say("the engine")))
    own = [a for a in answers if a.engine == engine]
    others = [a for a in answers if a.engine != engine]
    return (
        _quantization(study, engine, own),
        _architecture(study),
        _drift(study),
        _engine(engine, others),
        hypothesis("tokenizer", "untested", (_ids(study),), AGAINST),
        hypothesis(
            "file-damaged",
            "untested",
            (say("Statistics of activations do not show a damaged tensor apart from other causes."),),
            "quantscope weights ORIGINAL.gguf FILE.gguf",
        ),
        hypothesis(
            "activation-rounding",
            "untested",
            (say("That needs the exact and the expected arithmetic on the same file."),),
            AGAINST,
        ),
    )


def _study_command(study: Study) -> str:
    """The exact execution of the original and of the same types made from it."""
    types = [name for v in study.variants if (name := v.name.upper()) in PRESETS]
    return f"quantscope study ORIGINAL.gguf --types {','.join(types or DEFAULT_TYPES)}"


def _ids(study: Study) -> str:
    if study.prompt is None or not study.prompt.ids:
        return say("The token ids that were run are not known, or not the same in all.")
    return say("All variants ran the same {n} ids; which ids the prompt should give was not checked.", n=len(study.prompt.ids))


# ---- Different output ---------------------------------------------------------------------------------------------------


def _quantization(study: Study, engine: str, own: Sequence[Answer]) -> Hypothesis:
    """Two types that disagree, or agree, say nothing about which is right."""
    parts = []
    if own:
        given = listed(say("{token} in {variant}", token=_token(a), variant=a.variant) for a in own)
        if len(own) < 2:
            means = say("One token alone does not say whether it is right: there is no original, and no exact execution of the same file.")
        elif len({(a.id, a.token if a.id is None else None) for a in own}) > 1:
            means = say(
                "That types disagree does not say which of them is right, or whether one is: there is no original, and no exact execution "
                "of the same file."
            )
        else:
            means = say("That types agree does not say that they are right: there is no original, and no exact execution of the same file.")
        parts += [say("{engine} gives {tokens}.", engine=engine, tokens=given), means]
    else:
        parts.append(
            say("No token of {engine} is known, and there is no original, and no exact execution of the same file.", engine=engine)
        )
    odd = [say("Rank {rank} in {variant}", rank=a.rank, variant=a.variant) for a in own if a.rank is not None and a.rank > 1]
    if odd:
        parts.append(say("{ranks} is no greedy choice.", ranks=listed(odd)))
    return hypothesis("quantization-too-coarse", "untested", tuple(parts), _study_command(study))


def _token(a: Answer) -> str:
    text = "" if a.token is None else quoted(a.token)
    known = [say("id {id}", id=a.id)] if a.id is not None else []
    known += [say("rank {rank}", rank=a.rank)] if a.rank is not None else []
    if text and known:
        return say("{name} ({value})", name=text, value=joined(known))
    return text or say("token {facts}", facts=joined(known))


# ---- Growth and drift ---------------------------------------------------------------------------------------------------


def _architecture(study: Study) -> Hypothesis:
    """Growth that all variants share does not come from their quantization."""
    name, command = "architecture-amplifies", _study_command(study)
    growths = {v.name: v.layers[-1].rms_growth for v in study.variants if len(v.layers) > 1}
    known = {n: g for n, g in growths.items() if g is not None and 0 < g < math.inf}
    same_layers = len({(v.layers[0].layer, v.layers[-1].layer) for v in study.variants if v.name in known}) == 1
    if len(known) < 2 or not same_layers:
        return hypothesis(name, "untested", (say("The RMS of the same first and last layer is not known for two variants."),), command)
    low, high = min(known.values()), max(known.values())
    facts = {
        "growth": listed(say("{value} ({name})", value=times(g), name=n) for n, g in known.items()),
        "spread": percent(high / low - 1),
    }
    if not similar(low, high):
        apart = say(
            "RMS grows {growth}, at most {spread} apart: something beside the architecture is in it, and which variant is off is open.",
            **facts,
        )
        return hypothesis(name, "untested", (apart,), command)
    alike = say("RMS grows {growth}, at most {spread} apart, so it hardly depends on the quantization.", **facts)
    nature = say(
        "Growth that no quantization changes is not its damage, and RMSNorm divides it out again in every layer: by itself it is no "
        "evidence of an error. The original in float32 shows whether it grows so by nature."
    )
    return hypothesis(name, "supported", (alike, nature), command)


def _drift(study: Study) -> Hypothesis:
    """What the means do; nothing in a table says what moves them."""
    ends = [(v, v.layers[0], v.layers[-1]) for v in study.variants if len(v.layers) > 1 and _finite(v)]
    flagged = [(v.name, row.layer, flag) for v in study.variants for row in v.layers for flag in row.flags]
    if len(ends) < 2:
        return _drift_entry(study, (say("The mean of the first and last layer is not known for two variants."),))
    signs = {last.mean > 0 for _, _, last in ends}
    offsets = {v.name: metrics.mean_to_rms(last.mean, last.output_rms) for v, _, last in ends}
    facts = {
        "means": listed(say("{value} ({name})", value=f"{mean(first.mean)} → {mean(last.mean)}", name=v.name) for v, first, last in ends),
        "ratios": listed(say("{value} ({name})", value=percent(x), name=n) for n, x in offsets.items()),
    }
    if len(signs) > 1:
        parts = [say("The mean goes {means}: opposite signs at the end, where |mean|/RMS is {ratios}.", **facts)]
    else:
        parts = [say("The mean goes {means}: the same sign at the end, where |mean|/RMS is {ratios}.", **facts)]
    if flagged:
        parts.append(_flags(flagged, study.activation))
    parts.append(say("That the variants differ is shown; that quantization is the cause is not: a fault of the engine moves means, too."))
    return _drift_entry(study, tuple(parts))


def _flags(flagged: Sequence[tuple[str, int, Flag]], activation: str) -> str:
    """The strongest, and how many more there are."""
    name, layer, flag = max(flagged, key=lambda f: f[2].times)
    facts = {"times": f"{metrics.FLAG_TIMES:g}", "name": name, "layer": layer, "share": percent(flag.mean_to_rms), "activation": activation}
    if len(flagged) == 1:
        return say(
            "Flagged, over {times} times the other variants: the {activation} mean of {name} in layer {layer}, {share} of its RMS.", **facts
        )
    return say(
        "Flagged, over {times} times the other variants: the {activation} mean of {name} in layer {layer}, {share} of its RMS, and {n} "
        "more.",
        n=len(flagged) - 1,
        **facts,
    )


def _drift_entry(study: Study, evidence: tuple[str, ...]) -> Hypothesis:
    return Hypothesis(DRIFT, say(DRIFT_TEXT), "untested", evidence, _study_command(study))


def _finite(v: Variant) -> bool:
    first, last = v.layers[0], v.layers[-1]
    return all(math.isfinite(x) for x in (first.mean, last.mean, last.output_rms)) and last.output_rms > 0


# ---- Engine -------------------------------------------------------------------------------------------------------------


def _engine(engine: str, others: Sequence[Answer]) -> Hypothesis:
    """A token of another engine is no reference: it is of another run, whose ids and state nobody wrote down."""
    parts = [say("All statistics come from {engine}: nothing independent ran the same file on the same token ids.", engine=engine)]
    for name in dict.fromkeys(a.engine for a in others):
        given = [a for a in others if a.engine == name]
        facts = {
            "other": name,
            "tokens": listed(say("{token} in {variant}", token=_token(a), variant=a.variant) for a in given),
            "engine": engine,
        }
        if all(a.id is not None for a in given):
            parts.append(
                say(
                    "{other} gave {tokens}: one token of another run, whose ids and file hash are not recorded. That it looks odd, too, "
                    "does not clear {engine}.",
                    **facts,
                )
            )
        else:
            parts.append(
                say(
                    "{other} gave {tokens}: one token, its id not known, of another run, whose ids and file hash are not recorded. That it "
                    "looks odd, too, does not clear {engine}.",
                    **facts,
                )
            )
    return hypothesis("engine-bug", "untested", tuple(parts), f"{AGAINST} --original ORIGINAL.gguf")
