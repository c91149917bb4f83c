"""Tables and sentences as a piece of HTML that a notebook shows: no script, no style sheet, every text escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from quantscope.language import say
from quantscope.report.table import Section, Table
from quantscope.report.tables import header, sections
from quantscope.report.text import sample
from quantscope.results import Study
from quantscope.wording import printable

SHORT = 8  # rows of a table that is shown unfolded


def study_html(study: Study) -> str:
    """The answer, what was studied, every table of the report folded under its heading, the findings."""
    answer = study.findings[0].text if study.findings else ""
    parts = [said(answer, strong=True), _small(header(study))]
    parts += [_folded(s, unfolded=all(len(t.rows) <= SHORT for t in s.tables)) for s in sections(study)]
    if len(study.findings) > 1:
        items = "".join(f"<li><b>{_text(f.id)}</b>: {_text(f.text)}</li>" for f in study.findings[1:])
        parts.append(f"<details><summary>{_text(say('Findings'))}</summary><ul>{items}</ul></details>")
    return whole(parts)


def tables_html(answer: str, tables: Sequence[Table], notes: Iterable[str] = ()) -> str:
    """A sentence in bold, tables folded under their captions, and notes in small print."""
    return whole(
        [said(answer, strong=True), *(_folded(Section(t.caption, "", (t,)), unfolded=i == 0) for i, t in enumerate(tables)), _small(notes)]
    )


def whole(parts: Iterable[str]) -> str:
    return f"<div>{''.join(parts)}</div>"


def said(text: str, *, strong: bool = False) -> str:
    """A paragraph; lines stay lines."""
    inner = "<br>".join(_text(line) for line in text.split("\n"))
    return f"<p>{f'<b>{inner}</b>' if strong else inner}</p>" if text else ""


def table_html(table: Table, caption: str = "") -> str:
    """One table, numbers to the right; of many layers a sample, which is said."""
    rows, note = sample(table, "to_pandas()")
    head = _row(table, table.columns, "th")
    body = "".join(_row(table, row, "td") for row in rows)
    name = f"<caption>{_text(caption)}</caption>" if caption else ""
    return f"<table>{name}<thead>{head}</thead><tbody>{body}</tbody></table>{_small([*([note] if note else []), *table.footnotes])}"


def _row(table: Table, cells: Sequence[str], tag: str) -> str:
    sides = ["left" if c in table.text_columns else "right" for c in range(len(cells))]
    drawn = [f"<{tag} style='text-align:{side};padding:0 0.6em'>{_text(cell)}</{tag}>" for side, cell in zip(sides, cells, strict=True)]
    return f"<tr>{''.join(drawn)}</tr>"


def _folded(section: Section, *, unfolded: bool) -> str:
    tables = "".join(table_html(t, t.caption if t.caption != section.title else "") for t in section.tables)
    title = section.title or " / ".join(section.tables[0].columns[:3])
    return f"<details{' open' if unfolded else ''}><summary>{_text(title)}</summary>{_small([section.explanation])}{tables}</details>"


def _small(lines: Iterable[str]) -> str:
    shown = "<br>".join(_text(line) for line in lines if line)
    return f"<p><small>{shown}</small></p>" if shown else ""


def _text(text: str) -> str:
    return escape(printable(text))
