"""Traces of statistics or whole tensors → a study: the layer tables and findings, for numbers of any engine.

A number that a trace does not have is NaN in its LayerRow, as in a trace file; NaN statistics are not kept in traces.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from quantscope.findings import complete
from quantscope.importers.base import input_tap
from quantscope.importers.consistency import numbers_at, row_layers
from quantscope.phrases import listed
from quantscope.results import STUDY_VERSION, LayerRow, PromptInfo, Study, Variant
from quantscope.trace import Trace

APPLY = ("rms-growth", "mean-drift", "standing-out", "limits")  # findings that need nothing but layer rows


def study_of(traces: Sequence[tuple[str, Trace]]) -> Study | None:
    """The traces that know the output RMS of a layer, side by side; None where none does.

    Findings that compare the first with the last layer are left out where the variants do not show the same ones.
    """
    variants = [v for name, trace in traces if (v := _variant(name, trace)).layers]
    if not variants:
        return None
    engines = list(dict.fromkeys(t.origin.engine for _, t in traces))
    ids = {t.origin.tokens for _, t in traces}
    prompt = PromptInfo(None, ids.pop() or ()) if len(ids) == 1 and None not in ids else None
    done = complete(Study(STUDY_VERSION, None, tuple(variants), provenance={"engine": listed(engines)}, prompt=prompt))
    ends = {(v.layers[0].layer, v.layers[-1].layer) for v in variants}
    apply = APPLY if len(ends) == 1 and all(a < b for a, b in ends) else APPLY[2:]
    return dataclasses.replace(done, findings=tuple(f for f in done.findings if f.id in apply))


def _variant(name: str, trace: Trace) -> Variant:
    rows = []
    for i in row_layers(trace):
        inputs = numbers_at(trace, input_tap(i), "rms")
        rows.append(
            LayerRow(
                i,
                inputs[-1].value if inputs else math.nan,
                numbers_at(trace, f"l_out-{i}", "rms")[0].value,
                _or_nan(_first(trace, f"l_out-{i}", "mean")),
                swiglu_rms=_first(trace, f"ffn_swiglu-{i}", "rms"),
                swiglu_mean=_first(trace, f"ffn_swiglu-{i}", "mean"),
            )
        )
    return Variant(name, {}, None, None, (), tuple(rows))


def _first(trace: Trace, tap: str, statistic: str) -> float | None:
    numbers = numbers_at(trace, tap, statistic)
    return numbers[0].value if numbers else None


def _or_nan(x: float | None) -> float:
    return math.nan if x is None else x
