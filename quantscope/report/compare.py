"""A comparison of two traces as tables, and as the document of ``--json``."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from quantscope.compare import Comparison, Row
from quantscope.language import mark, say
from quantscope.report.table import DIFFERS, Table
from quantscope.three_way import SplitRow
from quantscope.wording import MISSING, fixed, sci, sig

AROUND = 3  # rows shown on either side of the first divergence
_KIND = {"values": "", "fingerprint": "≈", "sample": "", "statistics": "≥"}
_EVIDENCE = {
    "values": mark("all values"),
    "fingerprint": mark("fingerprint"),
    "sample": mark("sample {n} of {total}"),
    "statistics": mark("statistics"),
}


def taps_table(c: Comparison, *, every: bool = False) -> Table:
    """A row a tap: error, floor, cosine, worst element.  Unless ``every``: layer outputs, head, and what is near the first divergence."""
    rows = list(c.rows) if every else shortened(c.rows, c.first_divergence)
    left_out = len(c.rows) - len(rows)
    caption = say("{n} taps are not shown; `--all` shows them.", n=left_out) if left_out else ""
    footnotes = tuple(f"{row.tap}: {row.note}" for row in rows if row.note and row.kind != "sample")
    columns = (
        say("tap"),
        say("evidence"),
        say("NMSE"),
        say("floor"),
        say("cosine"),
        say("worst at"),
        say("reference"),
        say("test"),
    )
    return Table(columns, tuple(_cells(row) for row in rows), caption, footnotes, text_columns=frozenset({0, 1}))


def shortened(rows: Sequence[Row], first: Row | None) -> list[Row]:
    """Embedding, layer outputs and head, what differs with a few rows around the first; all rows where no layer output is among them."""
    chosen = {i for i, row in enumerate(rows) if re.fullmatch(r"embd|l_out-\d+|result_\w+", row.tap)}
    if not chosen or len(rows) <= 24:
        return list(rows)
    if first is not None:
        at = rows.index(first)
        chosen |= set(range(max(0, at - AROUND), min(len(rows), at + AROUND + 1)))
    return [row for i, row in enumerate(rows) if i in chosen]


def _cells(row: Row) -> tuple[str, ...]:
    flag = f"{DIFFERS} " if row.verdict == "differs" else ""
    worst = row.worst
    return (
        flag + row.tap,
        say(_EVIDENCE[row.kind], n=row.n, total=f"{row.n_all:,}"),
        MISSING if math.isnan(row.nmse) else _KIND[row.kind] + sci(row.nmse, 2),
        sci(row.floor, 2),
        MISSING if row.cos_sim is None else fixed(row.cos_sim, 6),
        MISSING if worst is None else f"[{', '.join(map(str, worst.index))}]",
        MISSING if worst is None else sig(worst.ref, 5),
        MISSING if worst is None else sig(worst.test, 5),
    )


def split_table(rows: Sequence[SplitRow]) -> Table:
    """The three-way split: what quantization does, what the engine adds, and what its arithmetic was expected to add."""
    columns = (say("tap"), say("quantization"), say("engine"), say("engine, predicted"), say("engine / predicted"))
    return Table(
        columns,
        tuple((r.tap, _error(r.quantization), _error(r.engine), _error(r.predicted), _ratio(r)) for r in rows),
        say("NMSE of each effect. Quantization: original → this file, both exact. Engine: this file, exact → the engine on it."),
    )


def _error(x: float | None) -> str:
    return MISSING if x is None else sci(x, 2)


def _ratio(row: SplitRow) -> str:
    return MISSING if not row.predicted else sig(row.engine / row.predicted, 2)


def document(c: Comparison, answer: str, rotation: str | None, split: Sequence[SplitRow]) -> dict[str, Any]:
    """What ``--json`` prints."""
    first = c.first_divergence
    return {
        "version": 1,
        "answer": answer,
        "rotation": rotation,
        "first_divergence": None if first is None else first.tap,
        "floor": c.floor_source,
        "ref": _origin(asdict(c.ref)),
        "test": _origin(asdict(c.test)),
        "taps": [asdict(row) for row in c.rows],
        "only_ref": c.only_ref,
        "only_test": c.only_test,
        "split": [asdict(row) for row in split],
        "notes": c.notes,
    }


def _origin(facts: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if key not in ("config", "notes")}
