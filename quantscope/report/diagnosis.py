"""A diagnosis as tables, as Markdown, and as the document of ``--json``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from quantscope.diagnose.answer import LEVELS, answer
from quantscope.diagnose.causes import Causes
from quantscope.diagnose.diagnosis import Diagnosis
from quantscope.language import mark, say
from quantscope.report.compare import split_table, taps_table
from quantscope.report.imported import ledger_table
from quantscope.report.markdown import escaped, pipe_table
from quantscope.report.table import DIFFERS, Table
from quantscope.wording import MISSING, percent, sci

CONVICTED_ROWS = 12  # rows of the replay that are shown


def tables(d: Diagnosis, *, every: bool = False) -> list[Table]:
    """Evidence, convicted operations, taps, the split, the ledger; those that there are."""
    found = [evidence_table(d), *([] if d.causes is None else cause_tables(d.causes))]
    found += [taps_table(d.comparison, every=every)] if d.comparison is not None else []
    found += [split_table(d.split)] if d.split else []
    return [*found, ledger_table(d.ledger)]


def cause_tables(c: Causes) -> list[Table]:
    """Convicted operations and explaining faults; those that there are."""
    found = [convicted_table(c)] if c.replayed is not None and c.replayed.those("convicted") else []
    return found + ([candidates_table(c)] if c.searched is not None and c.searched.candidates else [])


_CONCLUSIONS = {"agrees": mark("agrees"), "differs": mark("{mark} differs"), "not measured": mark("not measured")}


def evidence_table(d: Diagnosis) -> Table:
    """A row a piece of evidence, cheapest first."""
    rows = tuple(
        (
            r.id,
            say(_CONCLUSIONS[r.conclusion], mark=DIFFERS),
            MISSING if r.value is None else sci(r.value, 2),
            MISSING if r.floor is None else sci(r.floor, 2),
            r.text,
        )
        for r in d.evidence
    )
    columns = (say("evidence"), say("conclusion"), say("NMSE"), say("floor"), say("found"))
    return Table(columns, rows, say("Evidence, cheapest first"), text_columns=frozenset({0, 1, 4}))


def convicted_table(c: Causes) -> Table:
    """The operations that are wrong by themselves, in the order of the graph."""
    assert c.replayed is not None
    convicted = c.replayed.those("convicted")
    rows = tuple(
        (row.tap, row.operation, MISSING if row.nmse is None else sci(row.nmse, 2), MISSING if row.floor is None else sci(row.floor, 2))
        for row in convicted[:CONVICTED_ROWS]
    )
    left_out = len(convicted) - len(rows)
    caption = say("Operations that are wrong by themselves")
    if left_out > 0:
        caption = say("Operations that are wrong by themselves; {n} more are in --json", n=left_out)
    return Table((say("tap"), say("operation"), say("NMSE"), say("floor")), rows, caption, text_columns=frozenset({0, 1}))


def candidates_table(c: Causes) -> Table:
    """What the catalogue explains, best first."""
    assert c.searched is not None
    rows = tuple(
        (x.label, say("yes") if x.consistent else say("no"), percent(x.explained, 3), percent(x.front, 3))
        for x in c.searched.candidates[:6]
    )
    caption = say("Known faults that explain what differs ({n} tried)", n=c.searched.n_tried)
    columns = (say("fault"), say("consistent"), say("explained"), say("of the graph"))
    return Table(columns, rows, caption, text_columns=frozenset({0, 1}))


def markdown(d: Diagnosis) -> str:
    """The whole diagnosis; ends with a newline."""
    title = say("quantscope diagnosis of {model} against {engine}", model=escaped(d.model), engine=escaped(d.engine))
    blocks = [f"# {title}", f"**{escaped(answer(d))}**"]
    blocks += ["\n".join(f"- {escaped(s)}" for s in d.about_logits)] if d.about_logits else []
    for table in tables(d, every=True):
        blocks += [f"## {escaped(table.caption)}" if table.caption else "", pipe_table(table)]
        blocks += ["\n".join(f"- {escaped(n)}" for n in table.footnotes)] if table.footnotes else []
    blocks += [f"## {say('Next')}", "\n".join(f"- {escaped(n)}" for n in d.next_steps)] if d.next_steps else []
    blocks += [f"## {say('How to measure it again')}", *(f"{escaped(r.id)}:\n\n    {r.command}" for r in d.evidence if r.command)]
    blocks += [f"## {say('Notes')}", "\n".join(f"- {escaped(n)}" for n in notes(d))] if notes(d) else []
    return "\n\n".join(b for b in blocks if b) + "\n"


def notes(d: Diagnosis) -> list[str]:
    """What a reader must know of the floors and of what was taken on trust."""
    return [] if d.comparison is None else [say("Floor: {source}.", source=d.comparison.floor_source), *d.comparison.notes]


def document(d: Diagnosis) -> dict[str, Any]:
    """What ``--json`` prints."""
    return {
        "version": 1,
        "answer": answer(d),
        "verdict": d.verdict,
        "level": {"number": d.level, "name": LEVELS[d.level]},
        "model": d.model,
        "engine": d.engine,
        "evidence": [asdict(r) for r in d.evidence],
        "causes": None if d.causes is None else _causes(d.causes),
        "logits": None if d.logits is None else asdict(d.logits),
        "about_logits": d.about_logits,
        "split": [asdict(row) for row in d.split],
        "taps": [] if d.comparison is None else [asdict(row) for row in d.comparison.rows],
        "ledger": [asdict(h) for h in d.ledger],
        "next": d.next_steps,
        "notes": notes(d),
    }


def _causes(c: Causes) -> dict[str, Any]:
    searched = c.searched
    return {
        "named": [{"fault": n.instance.fault.name, "place": n.instance.place, "where": n.where, "twins": n.twins} for n in c.named],
        "alternatives": [x.label for x in c.alternatives],
        "unexplained": c.unexplained,
        "separating": c.separating,
        "convicted": [] if c.replayed is None else [_operation(row) for row in c.replayed.those("convicted")],
        "candidates": [] if searched is None else [_candidate(x) for x in searched.candidates],
        "excluded": () if searched is None else searched.excluded,
        "untestable": () if searched is None else searched.untestable,
    }


def _operation(row: Any) -> dict[str, Any]:
    return {"tap": row.tap, "operation": row.operation, "inputs": row.inputs, "nmse": row.nmse, "floor": row.floor, "note": row.note}


def _candidate(x: Any) -> dict[str, Any]:
    layers: Sequence[int] | None = None if x.layers is None else sorted(x.layers)
    return {"faults": [i.label for i in x.faults], "layers": layers, "explained": x.explained, "consistent": x.consistent}
