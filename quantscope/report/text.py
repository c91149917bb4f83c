"""A study for the terminal: rich renderables, readable at 100 columns and without colour."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Column
from rich.table import Table as RichTable
from rich.text import Text

from quantscope.language import retold, say
from quantscope.report.prose import Prose
from quantscope.report.table import DIFFERS, FLAG, Table
from quantscope.report.tables import header, sections
from quantscope.results import Study
from quantscope.wording import printable

MOST_ROWS = 12  # layers shown before they are sampled
MOST_FOOTNOTES = 6
WIDEST_NAME = 16  # [columns] a longer name is broken over several lines
INDENT = 2  # [columns] of a table
WIDEST_WORDS = 30  # [columns] a wider column of words is wrapped when space is short
GAP = 2  # [columns] between two columns of a table


def render(study: Study, width: int = 100, full: str = "report.md") -> RenderableType:
    """The whole study: the answer, what was studied, the tables in the seed's order, the findings, the notes.

    Tables wider than ``width`` columns are cut into several; of more than 12 layers a sample is shown, and ``full`` says
    where all of them are.
    """
    parts: list[RenderableType] = []
    if study.findings:
        parts += [Prose(study.findings[0].text, style="bold"), Text()]
    parts += [Prose(line, style="dim") for line in header(study)]
    for section in sections(study):
        parts += [Text(), Text(section.title, style="bold cyan")]
        parts += [Prose(section.explanation, style="dim")] if section.explanation else []
        for table in section.tables:
            parts += grid(table, width, full)
    if len(study.findings) > 1:
        parts += [Text(), Text(say("Findings"), style="bold cyan"), _findings(study)]
    if study.notes:
        parts += [Text(), Text(say("Notes"), style="bold cyan"), *(Prose(f"• {printable(retold(n))}") for n in study.notes)]
    return Group(*parts)


def _findings(study: Study) -> RenderableType:
    """Two columns, the finding's id and its sentences; the answer is at the top of the report already."""
    pairs = RichTable.grid(padding=(0, 2, 1, 0))
    pairs.add_column(style="cyan", no_wrap=True)
    pairs.add_column(overflow="fold")
    for f in study.findings[1:]:
        pairs.add_row(f.id, Prose(f.text))
    return pairs


def grid(table: Table, width: int, full: str = "") -> list[RenderableType]:
    """A table as renderables, cut into several where it is wider than ``width``; ``full`` names where all rows and flags are."""
    rows, said = sample(table, full)
    parts: list[RenderableType] = [Text(), Prose(table.caption, style="italic")] if table.caption else [Text()]
    headings = [folded(c, WIDEST_NAME) for c in table.columns]
    rows = [(folded(first, WIDEST_NAME), *others) for first, *others in rows]
    for i, columns in enumerate(fitting(headings, rows, width, table.text_columns)):
        parts += [Text()] if i else []
        parts.append(_grid(table, headings, rows, columns))
    if said:
        parts.append(Prose(said, style="dim"))
    notes = table.footnotes[:MOST_FOOTNOTES]
    parts += [Prose(note, style="yellow") for note in notes]
    if len(notes) < len(table.footnotes):
        parts.append(
            Text(
                say("{mark} {n} more flagged cells: see {full}", mark=FLAG, n=len(table.footnotes) - len(notes), full=full), style="yellow"
            )
        )
    return [parts[0], *(Padding(p, (0, 0, 0, INDENT), expand=False) for p in parts[1:])]


def _grid(table: Table, headings: Sequence[str], rows: Sequence[tuple[str, ...]], columns: Sequence[int]) -> RichTable:
    drawn = RichTable(
        *(
            Column(
                Text(headings[c], style="bold"),
                justify="left" if c in table.text_columns else "right",
                no_wrap=c not in table.text_columns,
                overflow="fold",
            )
            for c in columns
        ),
        box=None,
        padding=(0, GAP, 0, 0),
        pad_edge=False,
    )
    for row in rows:
        drawn.add_row(*(_cell(row[c]) for c in columns))
    return drawn


def _cell(text: str) -> Text:
    style = "yellow" if text.startswith(FLAG) else "red" if text.startswith(DIFFERS) else ""
    return Prose(text, style=style)


def sample(table: Table, full: str) -> tuple[list[tuple[str, ...]], str]:
    """At most 12 rows: first, last, evenly between, and the important ones on top of that; and a line saying so."""
    n = len(table.rows)
    if not table.layers or n <= MOST_ROWS:
        return list(table.rows), ""
    chosen = {round(i * (n - 1) / (MOST_ROWS - 1)) for i in range(MOST_ROWS)}
    chosen |= {i for i, layer in enumerate(table.layers) if layer in table.important}
    said = say("{shown} of {n} layers shown; all of them are in {full}", shown=len(chosen), n=n, full=full)
    return [row for i, row in enumerate(table.rows) if i in chosen], said


def fitting(headings: Sequence[str], rows: Sequence[tuple[str, ...]], width: int, wrapping: Collection[int] = ()) -> list[list[int]]:
    """Column numbers of each part table, so that no part is wider than ``width``; the first column is in every part.

    Columns in ``wrapping`` hold words: they may take several lines, and need no more than 30 columns.
    """

    def needs(c: int) -> int:
        natural = max(cell_len(line) for cell in (headings[c], *(row[c] for row in rows)) for line in cell.split("\n"))
        return min(natural, WIDEST_WORDS) if c in wrapping else natural

    parts, used = [[0]], needs(0)
    for c in range(1, len(headings)):
        if used + GAP + needs(c) > width - INDENT and len(parts[-1]) > 1:
            parts.append([0])
            used = needs(0)
        parts[-1].append(c)
        used += GAP + needs(c)
    return parts


def folded(name: str, width: int) -> str:
    """A long name broken after ``-``, ``_``, ``.`` or a space, in lines of at most ``width`` columns where it has such places."""
    lines = [""]
    for piece in re.findall(r"[^-_. ]+[-_. ]?|[-_. ]", name):
        if lines[-1] and cell_len(lines[-1] + piece.rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)
