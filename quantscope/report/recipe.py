"""A recipe as a paragraph, as tables (the candidates, size against KL divergence), and as the document of ``--json``."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from quantscope.remedy.candidates import PRESET, RULE, Candidate
from quantscope.remedy.recipe import Found, ratio
from quantscope.remedy.recipe_file import Recipe
from quantscope.report.table import Table
from quantscope.wording import MISSING, count, fixed, listed, percent, printable, sig, size, times

RECIPE_VERSION = 1  # of the JSON document
FEW_CHUNKS = 8  # below this a note says that the order of close candidates is uncertain


def answer(f: Found) -> str:
    """What was chosen, its size and KL divergence, and what the best preset has."""
    c = f.chosen
    kl = _elsewhere(c)
    size_ = f"{size(c.n_bytes)}, {fixed(c.bpw, 2)} bits per weight"
    head = f"The preset {c.name}" if c.kind == PRESET else f"{_capital(c.name)}" if c.kind == RULE else f"A mix of {_mix(c)}"
    said = f"{head} is the best recipe found for {f.target}: {size_}, a KL divergence of {sig(kl)} nats on text that nothing was fitted to"
    preset = f.best_preset
    if preset is None:
        why = "has these types only" if f.barred else "is so small"
        return f"{said}. No preset of llama-quantize that quantscope writes {why}."
    if preset is c:
        return f"{said}; no mix that was tried is better there."
    r, half = ratio(c, preset)
    interval = "" if math.isnan(half) else f" (95% interval of the ratio: {fixed(r - half, 2)} to {fixed(r + half, 2)})"
    return f"{said}, {_change(r)} {preset.name} with {sig(_elsewhere(preset))} in {size(preset.n_bytes)}{interval}."


def _change(r: float) -> str:
    if math.isnan(r):
        return "beside"
    return f"{percent(1 - r)} below" if r < 1 else f"{percent(r - 1)} above"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


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
        f"Measured with the exact forward, weighted encoding, on {count(here, 'chunk')} of the calibration text and "
        f"{count(elsewhere, 'chunk')} of text that only judges, of {f.n_ctx:,} tokens each; all positions count."
    ]
    if elsewhere < FEW_CHUNKS:
        lines.append(f"{count(elsewhere, 'chunk')} that judge: the order of close candidates is uncertain. Give a longer text.")
    worst = _rules_said(f)
    lines += [worst] if worst else []
    if f.barred:
        lines.append(f"Presets that fit, but have types that --types does not allow: {', '.join(f.barred)}.")
    if f.absent:
        lines.append(f"Presets whose types quantscope does not write, or that equal another one here: {', '.join(f.absent)}.")
    lines.append(
        "Sizes are those of llama-quantize's file; quantscope's says beside what it was made from, for which the search leaves room."
    )
    return lines


def _rules_said(f: Found) -> str:
    """The rules of thumb beside the chosen recipe."""
    rules = [c for c in f.candidates if c.kind == RULE and c.kl is not None and c is not f.chosen]
    if not rules or not _elsewhere(f.chosen):
        return ""
    said = listed(f"{c.name} {times(_elsewhere(c) / _elsewhere(f.chosen))} in {size(c.n_bytes)}" for c in rules)
    return f"Rules of thumb that fit, with the KL divergence of the chosen recipe as 1: {said}."


def tables(f: Found) -> list[Table]:
    return [candidate_table(f), front_table(f)]


def candidate_table(f: Found) -> Table:
    """Best measured first."""
    rows = tuple(
        (
            printable(c.name),
            c.kind,
            size(c.n_bytes),
            fixed(c.bpw, 2),
            sig(c.predicted),
            *(sig(kl) for kl in (c.kl or (None, None))),
            "chosen" if c is f.chosen else "",
        )
        for c in f.candidates
    )
    return Table(
        ("recipe", "kind", "size", "bpw", "predicted", "calibration text", "other text", ""),
        rows,
        "Candidates that fit: KL divergence in nats per token, predicted and measured",
        ("The lowest measured KL divergence on the other text is chosen; what was not measured was worse by prediction.",),
        text_columns=frozenset({0, 1, 7}),
    )


def front_table(f: Found) -> Table:
    """Presets and searched assignments by size."""
    rows = tuple(
        (
            p.name or "search",
            size(p.n_bytes),
            fixed(p.bpw, 2),
            sig(p.kl),
            sig(p.best) if p.name else "",
            times(p.kl / p.best) if p.name and p.best else MISSING if p.name else "",
        )
        for p in f.front
    )
    caption = "Size against predicted KL divergence in nats per token: presets, and the search at sizes along the range"
    return Table(("recipe", "size", "bpw", "predicted", "search, this size", "preset / search"), rows, caption)


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
