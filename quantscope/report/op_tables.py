"""Tables about every operation over a whole text: where each differs most, outlier channels and massive activations."""

from __future__ import annotations

import math
from collections.abc import Sequence

from quantscope.findings.ops import STREAM
from quantscope.language import say
from quantscope.report.table import FLAG, Section, Table, label
from quantscope.results import OpRow, Study
from quantscope.wording import MISSING, fixed, percent, sig


def operations(study: Study) -> Section:
    """For every operation the layer where its result differs most from the original's."""
    having = [v for v in study.quantized if study.text and any(r.nmse is not None for r in v.ops)]
    taps = list(dict.fromkeys(r.tap for v in having for r in v.ops))
    rows = tuple((tap, *(_worst([r for r in v.ops if r.tap == tap]) for v in having)) for tap in taps)
    return Section(
        say("Operation by operation"),
        say(
            "The lowest SQNR [dB] of each operation's result over the layers, and the layer; in the order of the graph. study.json has "
            "RMS, mean, extremes, NMSE, cosine and their spread over the chunks for every layer."
        ),
        (Table((say("operation"), *(label(study, v) for v in having)), rows),) if rows else (),
    )


def _worst(rows: Sequence[OpRow]) -> str:
    measured = [r for r in rows if r.sqnr_db is not None and not math.isnan(r.sqnr_db)]
    if not measured:
        return MISSING
    worst = min(measured, key=lambda r: r.sqnr_db or 0.0)
    return f"{fixed(worst.sqnr_db, 1)}" + (f" @ {worst.layer}" if worst.layer is not None else "")


def outliers(study: Study) -> Section:
    """Outlier channels and massive activations of the original's residual stream, layer by layer."""
    shown = next((v for v in (study.reference, *study.variants) if v and v.ops), None) if study.text else None
    rows = [r for r in shown.ops if r.tap == STREAM and r.layer is not None] if shown else []
    if not shown or not rows:
        return Section(say("Outliers"), "", ())
    cells = tuple(
        (str(r.layer), sig(r.abs_max, 4), _place(r), percent(r.outlier_share), _massive(r), _spread(r.rms, r.rms_spread)) for r in rows
    )
    table = Table(
        (
            say("layer"),
            say("largest |x|"),
            say("at token, channel"),
            say("outlier channels"),
            say("massive"),
            say("RMS ± over chunks"),
        ),
        cells,
        layers=tuple(r.layer for r in rows if r.layer is not None),
        important=frozenset(r.layer for r in rows if r.layer is not None and r.n_massive),
        text_columns=frozenset(),
    )
    return Section(
        say("Outliers"),
        say(
            "Residual stream of {name}. An outlier channel has over 6 times the median channel's RMS; a massive activation is over 100 and "
            "over 1,000 times the median |x|.",
            name=label(study, shown),
        ),
        (table,),
    )


def _place(r: OpRow) -> str:
    return MISSING if r.abs_max_position is None else f"{r.abs_max_position:,}, {r.abs_max_channel:,}"


def _massive(r: OpRow) -> str:
    return f"{FLAG} {r.n_massive:,}" if r.n_massive else "0"


def _spread(value: float, spread: float | None) -> str:
    return sig(value, 4) + (f" ± {sig(spread, 2)}" if spread is not None else "")
