"""A study as report.md: the same tables as in the terminal, with every layer, plus where the numbers come from."""

from __future__ import annotations

import re
from collections.abc import Iterable

from rich.cells import cell_len

from quantscope.language import retold, say
from quantscope.report.table import Table
from quantscope.report.tables import header, sections
from quantscope.results import Study
from quantscope.wording import printable

# Characters that Markdown (GitHub's) may act on.  An underscore inside a word is plain text: Q4_K_M stays readable.
_SPECIAL = re.compile(r"[\\`*{}\[\]<>#|~&$]|(?<![^\W_])_|_(?![^\W_])")


def escaped(text: str) -> str:
    """Text that Markdown shows as it is, on one line: control characters as escapes, markup characters behind a backslash."""
    return _SPECIAL.sub(lambda m: "\\" + m.group(), printable(text))


def markdown(study: Study) -> str:
    """The whole report; ends with a newline."""
    name = study.model.name if study.model else study.original or say("several variants")
    blocks = [f"# {say('quantscope study of {name}', name=escaped(name))}"]
    if study.findings:
        blocks.append(f"**{escaped(study.findings[0].text)}**")
    blocks.append(_list(header(study)))
    for section in sections(study):
        blocks += [f"## {section.title}", escaped(section.explanation)]
        for table in section.tables:
            blocks += [f"### {escaped(table.caption)}" if table.caption else "", pipe_table(table), _list(table.footnotes)]
    if len(study.findings) > 1:
        blocks += [f"## {say('Findings')}", "\n".join(f"- **{f.id}**: {escaped(f.text)}" for f in study.findings[1:])]
    blocks += [f"## {say('Notes')}", _list(retold(n) for n in study.notes)] if study.notes else []
    blocks += [f"## {say('Provenance')}", _list(f"{key}: {value}" for key, value in flat(study.provenance))] if study.provenance else []
    return "\n\n".join(b for b in blocks if b) + "\n"


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {escaped(line)}" for line in lines)


def pipe_table(table: Table) -> str:
    """A pipe table, padded so that it also reads as plain text."""
    rows = [tuple(escaped(cell) for cell in row) for row in (table.columns, *table.rows)]
    widths = [max(3, *(cell_len(row[c]) for row in rows)) for c in range(len(table.columns))]
    left = [c in table.text_columns for c in range(len(table.columns))]
    rule = ["-" * w if is_left else "-" * (w - 1) + ":" for w, is_left in zip(widths, left, strict=True)]
    lines = [[_filled(cell, w, is_left) for cell, w, is_left in zip(row, widths, left, strict=True)] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


def _filled(cell: str, width: int, left: bool) -> str:
    """The cell with blanks to a width in columns of a terminal, of which a Japanese character takes two."""
    blanks = " " * (width - cell_len(cell))
    return cell + blanks if left else blanks + cell


def flat(values: dict[str, object], prefix: str = "") -> list[tuple[str, object]]:
    """Nested dictionaries as dotted keys."""
    out: list[tuple[str, object]] = []
    for key, value in values.items():
        out += flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return out
