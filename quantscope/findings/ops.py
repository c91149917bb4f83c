"""Findings about single operations over a whole text: where quantization hurts most, and massive activations."""

from __future__ import annotations

import math

from quantscope.language import say
from quantscope.phrases import count, listed, paragraph
from quantscope.results import Finding, OpRow, Study, Variant
from quantscope.wording import fixed, sig

STREAM = "l_out"  # the residual stream, where massive activations live


def weakest(study: Study) -> Finding | None:
    """The operation and layer with the lowest SQNR of every variant."""
    worst = {v.name: row for v in study.quantized if study.text and (row := _worst(v)) is not None}
    if not worst:
        return None
    text = say(
        "The operation whose result differs most from the original's over the whole text: {operations}.",
        operations=listed(_named(name, row) for name, row in worst.items()),
    )
    evidence = {name: {"tap": r.tap, "layer": r.layer, "nmse": r.nmse, "sqnr_db": r.sqnr_db} for name, r in worst.items()}
    return Finding("weakest-operation", text, evidence)


def _worst(variant: Variant) -> OpRow | None:
    measured = [r for r in variant.ops if r.sqnr_db is not None and math.isfinite(r.sqnr_db)]
    return min(measured, key=lambda r: r.sqnr_db or 0.0, default=None)


def _named(name: str, row: OpRow) -> str:
    if row.layer is None:
        return say("{name} {tap} ({db} dB)", name=name, tap=row.tap, db=fixed(row.sqnr_db, 1))
    return say("{name} {tap} of layer {layer} ({db} dB)", name=name, tap=row.tap, layer=row.layer, db=fixed(row.sqnr_db, 1))


def _layers(rows: list[OpRow]) -> str:
    first, last = rows[0].layer, rows[-1].layer
    if first == last:
        return say("layer {layer}", layer=first)
    return say("{layers}, {first} to {last}", layers=count(len(rows), "layer"), first=first, last=last)


def massive(study: Study) -> Finding | None:
    """Massive activations of the residual stream: the original's own, and variants in which their number is another one."""
    reference = study.reference
    if reference is None or not study.text:
        return None
    own = [r for r in reference.ops if r.tap == STREAM and r.n_massive]
    if not own:
        return None
    largest = max(own, key=lambda r: r.massive_max or 0.0)
    n = sum(r.n_massive for r in own)
    text = say(
        "The original has massive activations in {layers}, the largest {largest} at token {token} of a chunk, channel {channel}: they "
        "belong to the model.",
        layers=_layers(own),
        largest=sig(largest.massive_max, 4),
        token=largest.massive_position,
        channel=largest.massive_channel,
    )
    others = {v.name: sum(r.n_massive for r in v.ops if r.tap == STREAM) for v in study.quantized if v.ops}
    changed = [f"{name} {m:,}" for name, m in others.items() if m != n]
    if changed:
        more = say("It has {n} of them in the residual stream; another number in {others}.", n=f"{n:,}", others=listed(changed))
        text = paragraph([text, more])
    return Finding("massive-activations", text, {"n": n, "largest": largest.massive_max, "variants": others})
