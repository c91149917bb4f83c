"""A comparison of two files' tensors as a paragraph, as a table, and as the document of ``--json``."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from quantscope.report.table import DIFFERS, Table
from quantscope.weight_compare import CORRECTED, FACTOR, TensorDiff, WeightComparison
from quantscope.wording import MISSING, count, fixed, listed, printable, sig

NAMED = 4  # tensors named in a sentence
RELATED, UNRELATED = 0.9, 0.1  # cosine


def answer(c: WeightComparison) -> str:
    """One paragraph: all explained, or the tensors that are not, grouped by cause."""
    bad = c.unexplained
    if not c.rows:
        return "No tensor was compared."
    if not bad:
        n = {verdict: sum(row.verdict == verdict for row in c.rows) for verdict in ("equal", "explained", "rescaled", "re-tuned")}
        text = (
            f"All {count(len(c.rows), 'tensor')} agree: {n['equal']} are equal, {n['explained']} differ by no more than their types explain"
        )
        text += f", {n['rescaled']} by channel scales that cancel" if n["rescaled"] else ""
        text += f", {n['re-tuned']} are norm weights and biases that the file says were re-tuned" if n["re-tuned"] else ""
        return text + "."
    matrices = [row for row in c.rows if len(row.shape_a or ()) > 1 and row.shape_a == row.shape_b]
    if matrices and all(abs(row.cosine) < UNRELATED and not row.causes for row in matrices):
        return f"Another model altogether: the values of all {count(len(matrices), 'matrix', 'matrices')} are unrelated."
    if all(row.shape_a != row.shape_b for row in c.rows):
        return "Another model altogether: no tensor has the same shape in both files."
    groups: dict[str, list[str]] = {}
    for row in bad:
        groups.setdefault(said(row, short=True), []).append(row.name)
    parts = [f"{_names(names)}: {text}." for text, names in groups.items()]
    return f"{len(bad)} of {count(len(c.rows), 'tensor')} differ by more than their types explain. {' '.join(parts)}"


def _names(names: Sequence[str]) -> str:
    """Names, those of many layers as one: ``blk.*.attn_q.weight (10)``."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(re.sub(r"^blk\.\d+\.", "blk.*.", name), []).append(name)
    words = [members[0] if len(members) == 1 else f"{kind} ({len(members)})" for kind, members in kinds.items()]
    return printable(listed(words[:NAMED]) + (f" and {len(words) - NAMED} more kinds" if len(words) > NAMED else ""))


def said(row: TensorDiff, short: bool = False) -> str:
    """What one tensor shows; ``short`` without numbers of its own, so that equal faults read equally."""
    if row.verdict in ("only in A", "only in B"):
        return row.verdict
    if row.verdict == "shape":
        return f"the shape is {list(row.shape_a or ())} in A and {list(row.shape_b or ())} in B"
    if row.verdict == "blocks":
        return "some blocks are corrupt in one of the files" if short else _blocks(row)
    if row.verdict != "differs":
        return ""
    if row.causes:
        left = (
            ""
            if row.causes[0].verified
            else f", which leaves more than the types explain{'' if short else f' ({sig(row.causes[0].left)})'}"
        )
        return f"B holds {' or '.join(cause.text for cause in row.causes)}{left}"
    return _uncaused(row.cosine)


def _blocks(row: TensorDiff) -> str:
    w = row.worst
    if w is None:
        return count(row.bad_blocks, "corrupt block")
    error = f"has {sig(w.times)} times the error of its types" if math.isfinite(w.times) else "is zero in one file only"
    return f"{row.bad_blocks} of {count(row.n_blocks, 'block')} corrupt; the worst, {w.size} elements from [{w.row}, {w.column}], {error}"


def _uncaused(cosine: float) -> str:
    if abs(cosine) < UNRELATED:
        return "the values are unrelated (another model, or an order that is not among the known ones)"
    if cosine > RELATED:
        return (
            "like rounding or further training (all blocks, strongly correlated): one file went through a coarser type, or was trained on"
        )
    return "none of the known causes"


def weights_table(c: WeightComparison, *, every: bool = False) -> Table:
    """A row a tensor: types, NMSE, what the types explain, cosine, corrupt blocks.  Unless ``every``: those that are not explained."""
    rows = c.rows if every else c.unexplained
    left_out = len(c.rows) - len(rows)
    caption = f"{count(left_out, 'tensor')} within what the types explain not shown; `--all` shows them." if left_out else ""
    notes = tuple(f"{printable(row.name)}: {said(row)}." for row in rows if said(row) != said(row, short=True))  # others are in the answer
    columns = ("tensor", "A", "B", "NMSE", f"explained ({FACTOR:g}×)", "cosine", "bad blocks", "verdict")
    return Table(columns, tuple(_cells(row) for row in rows), caption, notes, text_columns=frozenset({0, 1, 2, 7}))


def _cells(row: TensorDiff) -> tuple[str, ...]:
    measured = not math.isnan(row.nmse)
    return (
        ("" if row.ok else f"{DIFFERS} ") + printable(row.name),
        row.type_a or MISSING,
        row.type_b or MISSING,
        sig(row.nmse, 2) if measured else MISSING,
        sig(row.expected, 2) if measured else MISSING,
        fixed(row.cosine, 6) if measured else MISSING,
        f"{row.bad_blocks:,} of {row.n_blocks:,}" if measured else MISSING,
        row.verdict,
    )


def notes(c: WeightComparison) -> list[str]:
    """Which file is which, and the tensors that no forward reads: they are not compared."""
    lines = [f"A: {printable(c.path_a)}. B: {printable(c.path_b)}."]
    lines += [
        f"{printable(path)} says that it was corrected for the outputs of its products: its values may be {CORRECTED:g} times as far as "
        f"its types explain."
        for path in c.corrected
    ]
    for which, names in (("A", c.unused_a), ("B", c.unused_b)):
        if names:
            more = ", ..." if len(names) > NAMED else ""
            lines.append(f"Not read by the forward, not compared, in {which}: {printable(', '.join(names[:NAMED]))}{more}.")
    return lines


def document(c: WeightComparison) -> dict[str, Any]:
    """What ``--json`` prints; numbers that are not finite are null."""
    return {
        "version": 1,
        "answer": answer(c),
        "a": printable(c.path_a),
        "b": printable(c.path_b),
        "explained": not c.unexplained,
        "tensors": [_finite(asdict(row)) | {"finding": said(row)} for row in c.rows],
        "unused_a": c.unused_a,
        "unused_b": c.unused_b,
    }


def _finite(x: Any) -> Any:
    if isinstance(x, dict):
        return {key: _finite(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_finite(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x
