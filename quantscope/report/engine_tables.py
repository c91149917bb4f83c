"""The engines of a study as tables: the three-way split of the error, layer by layer, one table a file."""

from __future__ import annotations

from collections.abc import Sequence

from quantscope.language import say
from quantscope.phrases import joined
from quantscope.report.table import DIFFERS, Section, Table
from quantscope.results import EngineRow, EngineRun, Study
from quantscope.wording import MISSING, printable, sci


def engines(study: Study) -> Section:
    """Each file with all its engines.  A run that failed has no column; its words are among the findings."""
    names = list(dict.fromkeys(run.variant for run in study.engines if run.rows))
    tables = tuple(_split(name, [run for run in study.engines if run.variant == name and run.rows]) for name in names)
    return Section(
        say("Engines"),
        say(
            "NMSE, three ways. Quantization: the original → this file, both exact. An engine's column: this file, exact → the engine on "
            "it. Predicted: what its arithmetic (activations rounded to 8 bits, a 16-bit cache) does to exact results; where there is "
            "none, only the order of sums may differ."
        ),
        tables,
    )


def _split(variant: str, runs: Sequence[EngineRun]) -> Table:
    states = joined(
        say("{engine} within the floor", engine=run.engine)
        if run.agrees
        else say("{engine} {mark} differs", engine=run.engine, mark=DIFFERS)
        for run in runs
    )
    columns, cells = [say("layer"), say("quantization")], []
    for run in runs:
        columns += [run.engine, say("{engine}, predicted", engine=run.engine)] if _has_prediction(run) else [run.engine]
    for rows in zip(*(run.rows for run in runs), strict=True):
        values = [_error(rows[0].quantization)]
        for run, row in zip(runs, rows, strict=True):
            values += [_error(row.engine), _error(row.predicted)] if _has_prediction(run) else [_error(row.engine)]
        cells.append((place_of_row(rows[0]), *values))
    return Table(
        tuple(columns), tuple(cells), say("{name}: {states}", name=printable(variant), states=states), layers=tuple(range(len(cells)))
    )


def _has_prediction(run: EngineRun) -> bool:
    return any(row.predicted is not None for row in run.rows)


def place_of_row(row: EngineRow) -> str:
    return row.tap.rpartition("-")[2] if "-" in row.tap else say("logits")


def _error(x: float | None) -> str:
    return MISSING if x is None else sci(x, 2)
