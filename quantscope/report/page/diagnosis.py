"""A diagnosis as a page: the verdict, the evidence for it, and every tap's error against its floor."""

from __future__ import annotations

from quantscope.compare import Comparison
from quantscope.diagnose.answer import answer
from quantscope.diagnose.diagnosis import Diagnosis
from quantscope.language import say
from quantscope.model.taps import split_tap
from quantscope.report.compare import split_table, taps_table
from quantscope.report.diagnosis import cause_tables, evidence_table, notes
from quantscope.report.imported import ledger_table
from quantscope.report.page.content import Block, Chart, Frame, Page, Series, grid, rounded
from quantscope.three_way import SplitRow
from quantscope.wording import printable


def diagnosis_page(d: Diagnosis) -> Page:
    """The page of one diagnosis."""
    causes = [] if d.causes is None else cause_tables(d.causes)
    blocks = [Block("evidence", say("Evidence"), tables=(evidence_table(d),))]
    blocks += [Block("causes", say("Causes"), tables=tuple(causes))] if causes else []
    if d.comparison is not None:
        charts = tuple(c for c in (tap_chart(d.comparison), floor_chart(d.comparison)) if c is not None)
        blocks.append(Block("taps", say("Tap by tap"), charts=charts, tables=(taps_table(d.comparison, every=True),)))
    if d.split:
        blocks.append(Block("split", say("Three ways"), charts=(split_chart(d.split, d.engine),), tables=(split_table(d.split),)))
    blocks.append(Block("ledger", say("Hypotheses"), tables=(ledger_table(d.ledger),)))
    sentences = {"next": (say("Next"), d.next_steps), "notes": (say("Notes"), notes(d))}
    blocks += [Block(key, title, lines=tuple(("", s) for s in said)) for key, (title, said) in sentences.items() if said]
    commands = tuple((r.id, r.command) for r in d.evidence if r.command)
    blocks += [Block("again", say("How to measure it again"), lines=commands)] if commands else []
    title = say("quantscope diagnosis of {model} against {engine}", model=printable(d.model), engine=printable(d.engine))
    facts = (*d.about_logits, *([f"RoPE: {d.turned}"] if d.turned else ()))
    return Page(title, answer(d), facts, tuple(blocks))


def tap_chart(c: Comparison) -> Chart | None:
    """Error and floor of every tap in the order of the graph."""
    rows = [row for row in c.rows if row.nmse == row.nmse]
    if not rows:
        return None
    taps = [row.tap for row in rows]
    floor = rounded([row.floor for row in rows])
    series = (
        Series(say("floor"), taps, floor, high=floor, style="band"),
        Series(say("engine"), taps, rounded([row.nmse or None for row in rows])),
    )
    return Chart(
        "taps", say("Error of every tap, and the floor below which it means nothing"), "lines", say("tap"), say("NMSE"), series, log_y=True
    )


def floor_chart(c: Comparison) -> Chart | None:
    """Operation × layer: the error as a multiple of its floor."""
    cells, taps = {}, []
    for row in c.rows:
        place = split_tap(row.tap)
        if place is not None and place[1] is not None and row.floor and row.nmse == row.nmse:
            cells[place] = row.nmse / row.floor
            taps.append(place[0])
    layers = sorted({layer for _, layer in cells if layer is not None})
    if len(layers) < 2:
        return None
    names = list(dict.fromkeys(taps))
    title = say("Error as a multiple of its floor: above 1 it is no rounding")
    return Chart(
        "floors",
        title,
        "heat",
        say("layer"),
        say("operation"),
        x=layers,
        y=names,
        frames=(Frame(c.test.engine, grid(cells, names, layers)),),
        z_title=say("NMSE / floor"),
        log_z=True,
    )


def split_chart(rows: tuple[SplitRow, ...], engine: str) -> Chart:
    """What the quantization does, what the engine adds, and what it was expected to add."""
    taps = [row.tap for row in rows]
    series = []
    for name, values, style in (
        (say("{engine}, predicted", engine=engine), [r.predicted for r in rows], "band"),
        (say("quantization"), [r.quantization for r in rows], "dash"),
        (engine, [r.engine for r in rows], ""),
    ):
        shown = rounded([v or None for v in values])
        if any(v is not None for v in shown):
            series.append(Series(name, taps, shown, high=shown if style == "band" else None, style=style))  # type: ignore[arg-type]
    return Chart("split", say("Quantization and engine through the layers"), "lines", say("tap"), say("NMSE"), tuple(series), log_y=True)
