"""A recipe as a paragraph, as tables (the candidates, size against KL divergence), and as the document of ``--json``."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from quantscope.language import mark, retold, say
from quantscope.phrases import count, joined, listed, size
from quantscope.phrases import times as times_in_words
from quantscope.remedy.candidates import PRESET, RULE, SEARCHED, Candidate
from quantscope.remedy.recipe import Found, ratio
from quantscope.remedy.recipe_file import Recipe
from quantscope.report.table import Table
from quantscope.wording import MISSING, fixed, percent, printable, sig, times

RECIPE_VERSION = 1  # of the JSON document
FEW_CHUNKS = 8  # below this a note says that the order of close candidates is uncertain


def answer(f: Found) -> str:
    """What was chosen, its size and KL divergence, and what the best preset has."""
    c, preset = f.chosen, f.best_preset
    head = say(
        "{recipe} is the best recipe found for {target}: {size}, {bpw} bits per weight, a KL divergence of {kl} nats on text that nothing "
        "was fitted to",
        recipe=_named(c),
        target=f.target,
        size=size(c.n_bytes),
        bpw=fixed(c.bpw, 2),
        kl=sig(_elsewhere(c)),
    )
    if preset is None:
        if f.barred:
            return say("{found}. No preset of llama-quantize that quantscope writes has these types only.", found=head)
        return say("{found}. No preset of llama-quantize that quantscope writes is so small.", found=head)
    if preset is c:
        return say("{found}; no mix that was tried is better there.", found=head)
    return say("{found}, {comparison}.", found=head, comparison=_beside(c, preset))


def _named(c: Candidate) -> str:
    if c.kind == PRESET:
        return say("The preset {name}", name=c.name)
    name = retold(c.name)
    return f"{name[:1].upper()}{name[1:]}" if c.kind == RULE else say("A mix of {types}", types=_mix(c))


def _beside(c: Candidate, preset: Candidate) -> str:
    """``38% below Q4_K_M with 0.0078 in 4.9 MB (95% interval of the ratio: 0.58 to 0.66)``."""
    r, half = ratio(c, preset)
    facts = {"preset": preset.name, "kl": sig(_elsewhere(preset)), "size": size(preset.n_bytes)}
    if math.isnan(r):
        text = say("beside {preset} with {kl} in {size}", **facts)
    elif r < 1:
        text = say("{change} below {preset} with {kl} in {size}", change=percent(1 - r), **facts)
    else:
        text = say("{change} above {preset} with {kl} in {size}", change=percent(r - 1), **facts)
    if math.isnan(half):
        return text
    return say(
        "{comparison} (95% interval of the ratio: {low} to {high})", comparison=text, low=fixed(r - half, 2), high=fixed(r + half, 2)
    )


def _mix(c: Candidate) -> str:
    """``Q4_K × 40, Q6_K × 8 and Q5_K × 4``: the number of tensors in each type."""
    kinds = Counter(t.name for t in c.types.values() if t.is_quantized)
    return listed(f"{name} × {n}" for name, n in kinds.most_common())


def _elsewhere(c: Candidate) -> float:
    assert c.kl is not None
    return c.kl[1]


def notes(f: Found) -> list[str]:
    """What was run, how the rules of thumb did, and what limits the figures."""
    here, elsewhere = f.n_chunks
    lines = [
        say(
            "Measured with the exact forward, weighted encoding, on {chunks} of the calibration text and {others} of text that only "
            "judges, of {n_ctx} tokens each; all positions count.",
            chunks=count(here, "chunk"),
            others=count(elsewhere, "chunk"),
            n_ctx=f"{f.n_ctx:,}",
        )
    ]
    if elsewhere < FEW_CHUNKS:
        lines.append(
            say("{chunks} that judge: the order of close candidates is uncertain. Give a longer text.", chunks=count(elsewhere, "chunk"))
        )
    worst = _rules_said(f)
    lines += [worst] if worst else []
    if f.barred:
        lines.append(say("Presets that fit, but have types that --types does not allow: {names}.", names=joined(f.barred)))
    if f.absent:
        lines.append(say("Presets whose types quantscope does not write, or that equal another one here: {names}.", names=joined(f.absent)))
    lines.append(
        say("Sizes are those of llama-quantize's file; quantscope's says beside what it was made from, for which the search leaves room.")
    )
    return lines


def _rules_said(f: Found) -> str:
    """The rules of thumb beside the chosen recipe."""
    rules = [c for c in f.candidates if c.kind == RULE and c.kl is not None and c is not f.chosen]
    if not rules or not _elsewhere(f.chosen):
        return ""
    said = listed(
        say(
            "{name} {times} in {size}",
            name=retold(c.name),
            times=times_in_words(_elsewhere(c) / _elsewhere(f.chosen)),
            size=size(c.n_bytes),
        )
        for c in rules
    )
    return say("Rules of thumb that fit, with the KL divergence of the chosen recipe as 1: {rules}.", rules=said)


def tables(f: Found) -> list[Table]:
    return [candidate_table(f), front_table(f)]


_KINDS = {SEARCHED: mark("search"), PRESET: mark("preset"), RULE: mark("rule of thumb")}


def candidate_table(f: Found) -> Table:
    """Best measured first."""
    rows = tuple(
        (
            printable(retold(c.name)),
            say(_KINDS[c.kind]),
            size(c.n_bytes),
            fixed(c.bpw, 2),
            sig(c.predicted),
            *(sig(kl) for kl in (c.kl or (None, None))),
            say("chosen") if c is f.chosen else "",
        )
        for c in f.candidates
    )
    return Table(
        (say("recipe"), say("kind"), say("size"), say("bpw"), say("predicted"), say("calibration text"), say("other text"), ""),
        rows,
        say("Candidates that fit: KL divergence in nats per token, predicted and measured"),
        (say("The lowest measured KL divergence on the other text is chosen; what was not measured was worse by prediction."),),
        text_columns=frozenset({0, 1, 7}),
    )


def front_table(f: Found) -> Table:
    """Presets and searched assignments by size."""
    rows = tuple(
        (
            p.name or say("search"),
            size(p.n_bytes),
            fixed(p.bpw, 2),
            sig(p.kl),
            sig(p.best) if p.name else "",
            times(p.kl / p.best) if p.name and p.best else MISSING if p.name else "",
        )
        for p in f.front
    )
    caption = say("Size against predicted KL divergence in nats per token: presets, and the search at sizes along the range")
    columns = (say("recipe"), say("size"), say("bpw"), say("predicted"), say("search, this size"), say("preset / search"))
    return Table(columns, rows, caption)


def document(f: Found, recipe: Recipe, model: str, text: str, imatrix: str | None = None) -> dict[str, Any]:
    """What ``--json`` prints; KL divergences in nats per token."""
    return {
        "version": RECIPE_VERSION,
        "answer": answer(f),
        "model": printable(model),
        "text": printable(text),
        "imatrix": None if imatrix is None else printable(imatrix),
        "target": {"bytes": f.target.n_bytes, "bpw": f.target.bpw, "kl": f.target.kl},
        "chosen": f.chosen.name,
        "candidates": [_candidate(c, f) for c in f.candidates],
        "front": [{"preset": p.name, "bytes": p.n_bytes, "bpw": p.bpw, "predicted_kl": p.kl, "search_kl": p.best} for p in f.front],
        "recipe": recipe.document(),
        "notes": notes(f),
    }


def _candidate(c: Candidate, f: Found) -> dict[str, Any]:
    here, elsewhere = c.kl or (None, None)
    return {
        "name": c.name,
        "kind": c.kind,
        "bytes": c.n_bytes,
        "bpw": c.bpw,
        "predicted_kl": c.predicted,
        "calibration_kl": here,
        "other_kl": elsewhere,
        "chosen": c is f.chosen,
        "types": {name: t.name for name, t in c.types.items()},
    }
