"""A comparison of two files' tensors as a paragraph, as a table, and as the document of ``--json``."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from quantscope.language import mark, say
from quantscope.phrases import count, joined, listed, paragraph
from quantscope.report.table import DIFFERS, Table
from quantscope.weight_compare import CORRECTED, FACTOR, TensorDiff, WeightComparison
from quantscope.wording import MISSING, fixed, printable, sig

NAMED = 4  # tensors named in a sentence
RELATED, UNRELATED = 0.9, 0.1  # cosine


def answer(c: WeightComparison) -> str:
    """One paragraph: all explained, or the tensors that are not, grouped by cause."""
    bad = c.unexplained
    if not c.rows:
        return say("No tensor was compared.")
    if not bad:
        return say("All {tensors} agree: {parts}.", tensors=count(len(c.rows), "tensor"), parts=joined(_agreeing(c)))
    matrices = [row for row in c.rows if len(row.shape_a or ()) > 1 and row.shape_a == row.shape_b]
    if matrices and all(abs(row.cosine) < UNRELATED and not row.causes for row in matrices):
        return say(
            "Another model altogether: the values of all {matrices} are unrelated.", matrices=count(len(matrices), "matrix", "matrices")
        )
    if all(row.shape_a != row.shape_b for row in c.rows):
        return say("Another model altogether: no tensor has the same shape in both files.")
    groups: dict[str, list[str]] = {}
    for row in bad:
        groups.setdefault(said(row, short=True), []).append(row.name)
    parts = [say("{names}: {what}.", names=_names(names), what=text) for text, names in groups.items()]
    head = say("{n} of {tensors} differ by more than their types explain.", n=len(bad), tensors=count(len(c.rows), "tensor"))
    return paragraph([head, *parts])


def _agreeing(c: WeightComparison) -> list[str]:
    """How many agree in which way."""
    n = {verdict: sum(row.verdict == verdict for row in c.rows) for verdict in ("equal", "explained", "rescaled", "re-tuned")}
    parts = [say("{n} are equal", n=n["equal"]), say("{n} differ by no more than their types explain", n=n["explained"])]
    parts += [say("{n} by channel scales that cancel", n=n["rescaled"])] if n["rescaled"] else []
    parts += [say("{n} are norm weights and biases that the file says were re-tuned", n=n["re-tuned"])] if n["re-tuned"] else []
    return parts


def _names(names: Sequence[str]) -> str:
    """Names, those of many layers as one: ``blk.*.attn_q.weight (10)``."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(re.sub(r"^blk\.\d+\.", "blk.*.", name), []).append(name)
    words = [members[0] if len(members) == 1 else f"{kind} ({len(members)})" for kind, members in kinds.items()]
    shown = listed(words[:NAMED])
    return printable(say("{shown} and {n} more kinds", shown=shown, n=len(words) - NAMED) if len(words) > NAMED else shown)


def said(row: TensorDiff, short: bool = False) -> str:
    """What one tensor shows; ``short`` without numbers of its own, so that equal faults read equally."""
    if row.verdict in ("only in A", "only in B"):
        return say(_VERDICTS[row.verdict])
    if row.verdict == "shape":
        return say("the shape is {a} in A and {b} in B", a=list(row.shape_a or ()), b=list(row.shape_b or ()))
    if row.verdict == "blocks":
        return say("some blocks are corrupt in one of the files") if short else _blocks(row)
    if row.verdict != "differs":
        return ""
    if row.causes:
        holds = say(" or ").join(cause.text for cause in row.causes)
        if row.causes[0].verified:
            return say("B holds {what}", what=holds)
        if short:
            return say("B holds {what}, which leaves more than the types explain", what=holds)
        return say("B holds {what}, which leaves more than the types explain ({left})", what=holds, left=sig(row.causes[0].left))
    return _uncaused(row.cosine)


def _blocks(row: TensorDiff) -> str:
    w = row.worst
    if w is None:
        return count(row.bad_blocks, "corrupt block")
    facts = {"n": row.bad_blocks, "blocks": count(row.n_blocks, "block"), "size": w.size, "row": w.row, "column": w.column}
    if not math.isfinite(w.times):
        return say("{n} of {blocks} corrupt; the worst, {size} elements from [{row}, {column}], is zero in one file only", **facts)
    return say(
        "{n} of {blocks} corrupt; the worst, {size} elements from [{row}, {column}], has {times} times the error of its types",
        times=sig(w.times),
        **facts,
    )


def _uncaused(cosine: float) -> str:
    if abs(cosine) < UNRELATED:
        return say("the values are unrelated (another model, or an order that is not among the known ones)")
    if cosine > RELATED:
        return say(
            "like rounding or further training (all blocks, strongly correlated): one file went through a coarser type, or was trained on"
        )
    return say("none of the known causes")


_VERDICTS = {
    "equal": mark("equal"),
    "explained": mark("explained"),
    "blocks": mark("blocks"),
    "differs": mark("differs"),
    "shape": mark("shape"),
    "rescaled": mark("rescaled"),
    "re-tuned": mark("re-tuned"),
    "only in A": mark("only in A"),
    "only in B": mark("only in B"),
}


def weights_table(c: WeightComparison, *, every: bool = False) -> Table:
    """A row a tensor: types, NMSE, what the types explain, cosine, corrupt blocks.  Unless ``every``: those that are not explained."""
    rows = c.rows if every else c.unexplained
    left_out = len(c.rows) - len(rows)
    caption = ""
    if left_out:
        caption = say("{tensors} within what the types explain not shown; `--all` shows them.", tensors=count(left_out, "tensor"))
    notes = tuple(
        say("{names}: {what}.", names=printable(row.name), what=said(row)) for row in rows if said(row) != said(row, short=True)
    )  # others are in the answer
    columns = (
        say("tensor"),
        "A",
        "B",
        say("NMSE"),
        say("explained ({times}×)", times=f"{FACTOR:g}"),
        say("cosine"),
        say("bad blocks"),
        say("verdict"),
    )
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
        say("{n} of {total}", n=f"{row.bad_blocks:,}", total=f"{row.n_blocks:,}") if measured else MISSING,
        say(_VERDICTS[row.verdict]),
    )


def notes(c: WeightComparison) -> list[str]:
    """Which file is which, and the tensors that no forward reads: they are not compared."""
    lines = [say("A: {a}. B: {b}.", a=printable(c.path_a), b=printable(c.path_b))]
    lines += [
        say(
            "{path} says that it was corrected for the outputs of its products: its values may be {times} times as far as its types "
            "explain.",
            path=printable(path),
            times=f"{CORRECTED:g}",
        )
        for path in c.corrected
    ]
    for which, names in (("A", c.unused_a), ("B", c.unused_b)):
        if names:
            shown = printable(joined([*names[:NAMED], *(["..."] if len(names) > NAMED else [])]))
            lines.append(say("Not read by the forward, not compared, in {which}: {names}.", which=which, names=shown))
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
