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
from quantscope.recipes import PRESETS
from quantscope.results import DEFAULT_TYPES, Study, Variant
from quantscope.wording import listed, mean, percent, quoted, times

DRIFT = "mean-drift"
DRIFT_TEXT = "Quantization error decides where the mean of the layer outputs drifts."
AGAINST = "quantscope diagnose FILE.gguf --against TRACE"


def ledger_of_tables(study: Study, answers: Sequence[Answer] = ()) -> tuple[Hypothesis, ...]:
    """What the layer rows of a study of imported traces, and what was answered, support.

    study: of ``findings.traces.study_of``: no original, no logits.  answers: of this and of other engines.
    """
    engine = str(study.provenance.get("engine", "the engine"))
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
            ("Statistics of activations do not show a damaged tensor apart from other causes.",),
            "quantscope weights ORIGINAL.gguf FILE.gguf",
        ),
        hypothesis(
            "activation-rounding",
            "untested",
            ("That needs the exact and the expected arithmetic on the same file.",),
            AGAINST,
        ),
    )


def _study_command(study: Study) -> str:
    """The exact execution of the original and of the same types made from it."""
    types = [name for v in study.variants if (name := v.name.upper()) in PRESETS]
    return f"quantscope study ORIGINAL.gguf --types {','.join(types or DEFAULT_TYPES)}"


def _ids(study: Study) -> str:
    if study.prompt is None or not study.prompt.ids:
        return "The token ids that were run are not known, or not the same in all."
    return f"All variants ran the same {len(study.prompt.ids)} ids; which ids the prompt should give was not checked."


# ---- Different output ---------------------------------------------------------------------------------------------------


def _quantization(study: Study, engine: str, own: Sequence[Answer]) -> Hypothesis:
    """Two types that disagree, or agree, say nothing about which is right."""
    why = "there is no original, and no exact execution of the same file"
    parts = [f"No token of {engine} is known, and {why}."]
    if own:
        given = listed(f"{_token(a)} in {a.variant}" for a in own)
        if len(own) < 2:
            says = "One token alone does not say whether it is right"
        elif len({(a.id, a.token if a.id is None else None) for a in own}) > 1:
            says = "That types disagree does not say which of them is right, or whether one is"
        else:
            says = "That types agree does not say that they are right"
        parts = [f"{engine} gives {given}.", f"{says}: {why}."]
    odd = [a for a in own if a.rank is not None and a.rank > 1]
    if odd:
        parts.append(f"{listed(f'Rank {a.rank} in {a.variant}' for a in odd)} is no greedy choice.")
    return hypothesis("quantization-too-coarse", "untested", tuple(parts), _study_command(study))


def _token(a: Answer) -> str:
    text = "" if a.token is None else quoted(a.token)
    known = [f"id {a.id}"] if a.id is not None else []
    known += [f"rank {a.rank}"] if a.rank is not None else []
    return f"{text} ({', '.join(known)})" if text and known else text or f"token {', '.join(known)}"


# ---- Growth and drift ---------------------------------------------------------------------------------------------------


def _architecture(study: Study) -> Hypothesis:
    """Growth that all variants share does not come from their quantization."""
    name, command = "architecture-amplifies", _study_command(study)
    growths = {v.name: v.layers[-1].rms_growth for v in study.variants if len(v.layers) > 1}
    known = {n: g for n, g in growths.items() if g is not None and 0 < g < math.inf}
    same_layers = len({(v.layers[0].layer, v.layers[-1].layer) for v in study.variants if v.name in known}) == 1
    if len(known) < 2 or not same_layers:
        return hypothesis(name, "untested", ("The RMS of the same first and last layer is not known for two variants.",), command)
    low, high = min(known.values()), max(known.values())
    text = f"RMS grows {listed(f'{times(g)} ({n})' for n, g in known.items())}, at most {percent(high / low - 1)} apart"
    if not similar(low, high):
        return hypothesis(
            name, "untested", (f"{text}: something beside the architecture is in it, and which variant is off is open.",), command
        )
    nature = (
        "Growth that no quantization changes is not its damage, and RMSNorm divides it out again in every layer: by itself it is no "
        "evidence of an error. The original in float32 shows whether it grows so by nature."
    )
    return hypothesis(name, "supported", (f"{text}, so it hardly depends on the quantization.", nature), command)


def _drift(study: Study) -> Hypothesis:
    """What the means do; nothing in a table says what moves them."""
    ends = [(v, v.layers[0], v.layers[-1]) for v in study.variants if len(v.layers) > 1 and _finite(v)]
    flagged = [(v.name, row.layer, flag) for v in study.variants for row in v.layers for flag in row.flags]
    if len(ends) < 2:
        return _drift_entry(study, ("The mean of the first and last layer is not known for two variants.",))
    signs = {last.mean > 0 for _, _, last in ends}
    offsets = {v.name: metrics.mean_to_rms(last.mean, last.output_rms) for v, _, last in ends}
    shown = listed(f"{mean(first.mean)} → {mean(last.mean)} ({v.name})" for v, first, last in ends)
    parts = [
        f"The mean goes {shown}: {'opposite signs' if len(signs) > 1 else 'the same sign'} at the end, where |mean|/RMS is "
        f"{listed(f'{percent(x)} ({n})' for n, x in offsets.items())}."
    ]
    if flagged:
        strongest = max(flagged, key=lambda f: f[2].times)
        parts.append(
            f"Flagged, over {metrics.FLAG_TIMES:g} times the other variants: the SwiGLU mean of {strongest[0]} in layer {strongest[1]}, "
            f"{percent(strongest[2].mean_to_rms)} of its RMS" + (f", and {len(flagged) - 1} more." if len(flagged) > 1 else ".")
        )
    parts.append("That the variants differ is shown; that quantization is the cause is not: a fault of the engine moves means, too.")
    return _drift_entry(study, tuple(parts))


def _drift_entry(study: Study, evidence: tuple[str, ...]) -> Hypothesis:
    return Hypothesis(DRIFT, DRIFT_TEXT, "untested", evidence, _study_command(study))


def _finite(v: Variant) -> bool:
    first, last = v.layers[0], v.layers[-1]
    return all(math.isfinite(x) for x in (first.mean, last.mean, last.output_rms)) and last.output_rms > 0


# ---- Engine -------------------------------------------------------------------------------------------------------------


def _engine(engine: str, others: Sequence[Answer]) -> Hypothesis:
    """A token of another engine is no reference: it is of another run, whose ids and state nobody wrote down."""
    parts = [f"All statistics come from {engine}: nothing independent ran the same file on the same token ids."]
    for name in dict.fromkeys(a.engine for a in others):
        given = [a for a in others if a.engine == name]
        unknown = "" if all(a.id is not None for a in given) else ", its id not known,"
        parts.append(
            f"{name} gave {listed(f'{_token(a)} in {a.variant}' for a in given)}: one token{unknown} of another run, whose ids and file "
            f"hash are not recorded. That it looks odd, too, does not clear {engine}."
        )
    return hypothesis("engine-bug", "untested", tuple(parts), f"{AGAINST} --original ORIGINAL.gguf")
