"""A page as HTML: jinja2 fills the frame, page.js draws what is in the JSON beside it."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from quantscope import __version__
from quantscope.language import current, mark, say
from quantscope.report.page.content import Chart, Page, Series
from quantscope.report.table import DIFFERS, FLAG, Table
from quantscope.wording import MISSING, sig

# what the frame itself says
FRAME_WORDS = {
    "skip": mark("Skip to the answer"),
    "contents": mark("Contents"),
    "variants": mark("Variants: press one to hide or show it everywhere"),
    "all": mark("Show all"),
    "variant": mark("Variant"),
    "shown": mark("Shown"),
    "numbers": mark("Numbers of this chart"),
    "below": mark("The numbers are in the table below."),
    "table": mark("Table"),
    "tsv": mark("Copy as TSV"),
    "dark": mark("Dark"),
    "script": mark("The charts need JavaScript; the tables do not."),
}
LIBRARY, STYLE, SCRIPT, FRAME = "plotly-cartesian.min.js", "page.css", "page.js", "page.html"


def html(page: Page) -> str:
    """The whole file.  Whatever the names and texts hold, they are shown, never run."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_file(FRAME)).render(
        page=page,
        lang=current(),
        words={key: say(words) for key, words in FRAME_WORDS.items()},
        made=say(
            "Made by quantscope {version}. This page needs nothing else: it can be kept, sent and opened offline.", version=__version__
        ),
        version=__version__,
        tables={block.id: [table_view(t, page) for t in block.tables] for block in page.blocks},
        chart_tables={c.id: table_view(table_of(c), page) for block in page.blocks for c in block.charts},
        style=_file(STYLE),
        script=_file(SCRIPT),
        library=_file(LIBRARY),
        data=in_script(data(page)),
    )


@cache
def _file(name: str) -> str:
    return (resources.files("quantscope") / "data" / "page" / name).read_text("utf-8")


def data(page: Page) -> dict[str, Any]:
    """What page.js reads."""
    return {
        "keys": list(page.keys),
        "original": page.original,
        "charts": {c.id: _chart(c) for block in page.blocks for c in block.charts},
        "passages": {block.id: block.passage for block in page.blocks if block.passage},
        "words": words(),
    }


def words() -> dict[str, str]:
    """What page.js says."""
    return {
        "next": say("What really follows: {token}", token="{token}"),
        "kl": say("KL divergence here: {kl} nats", kl="{kl}"),
        "copied": say("Copied"),
        "dark": say("Dark"),
        "light": say("Light"),
    }


def in_script(value: Any) -> Markup:
    """JSON that may stand inside <script>: no "<", no line separators that old JavaScript takes for ends of lines."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return Markup(text.encode("utf-8", "backslashreplace").decode("utf-8"))


def _chart(c: Chart) -> dict[str, Any]:
    found: dict[str, Any] = {"kind": c.kind, "xTitle": c.x_title, "yTitle": c.y_title, "logX": c.log_x, "logY": c.log_y}
    if c.kind == "heat":
        frames = [{"name": f.name, "key": f.key, "z": f.z} for f in c.frames]
        return found | {"x": c.x, "y": c.y, "frames": frames, "zTitle": c.z_title, "logZ": c.log_z}
    return found | {"series": [_series(s) for s in c.series]}


def _series(s: Series) -> dict[str, Any]:
    every = {"name": s.name, "key": s.key, "x": s.x, "y": s.y, "low": s.low, "high": s.high, "text": s.text, "style": s.style}
    return {key: value for key, value in every.items() if value not in (None, "")} | ({"original": True} if s.original else {})


def table_of(c: Chart) -> Table:
    """The numbers of a chart as a table: a row an x, a column a series."""
    if c.kind == "heat":
        names = [f.name for f in c.frames]
        rows = tuple((str(y), str(x), *(_cell(f.z[j][i]) for f in c.frames)) for j, y in enumerate(c.y) for i, x in enumerate(c.x))
        return Table((c.y_title, c.x_title, *names), rows, text_columns=frozenset({0}))
    places = list(dict.fromkeys(x for s in c.series for x in s.x))
    found = [dict(zip(s.x, s.y, strict=True)) for s in c.series]
    rows = tuple((_word(x), *(_cell(values.get(x)) for values in found)) for x in places)
    return Table((c.x_title, *(s.name for s in c.series)), rows)


def _word(x: Any) -> str:
    return sig(x, 5) if isinstance(x, float) else str(x)


def _cell(x: float | None) -> str:
    return MISSING if x is None else sig(x, 4)


def table_view(table: Table, page: Page) -> dict[str, Any]:
    """A table for the template: cells with their class, and the variant that a column or row belongs to."""
    of = {key: i for i, key in enumerate(page.keys)}
    columns = [of.get(name) for name in table.columns]
    rows = [[{"text": cell, "flag": cell.startswith(FLAG), "differs": cell.startswith(DIFFERS)} for cell in row] for row in table.rows]
    return {
        "caption": table.caption,
        "columns": [
            {"name": n, "key": k, "words": i in table.text_columns} for i, (n, k) in enumerate(zip(table.columns, columns, strict=True))
        ],
        "rows": [{"key": of.get(raw[0]) if raw else None, "cells": cells} for raw, cells in zip(table.rows, rows, strict=True)],
        "notes": table.footnotes,
    }
