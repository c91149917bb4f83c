"""What a page is made of: an answer, sections with charts and tables, a text; plain data that the template and page.js draw.

Everything that is said is said when this is made, in the language of the context.  ``key`` names the variant that a series, a column or a
row belongs to: the buttons at the top of the page show and hide all that has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from quantscope.report.table import Table

Numbers: TypeAlias = "list[float | None]"
DIGITS = 5  # significant, of numbers in charts


@dataclass(frozen=True)
class Series:
    """Points of one variant.  low, high: an interval or a band; text: beside the points, or when one points at them."""

    name: str
    x: list[Any]
    y: Numbers
    key: str | None = None
    low: Numbers | None = None
    high: Numbers | None = None
    text: list[str] | None = None
    style: Literal["", "dash", "band", "label"] = ""
    original: bool = False


@dataclass(frozen=True)
class Frame:
    """A heat map of one variant (or type): rows y, columns x."""

    name: str
    z: list[Numbers]
    key: str | None = None


@dataclass(frozen=True)
class Chart:
    """One figure.  kind: lines; points at categories x, drawn from top to bottom; steps of a histogram; a heat map, one frame at a time."""

    id: str
    title: str
    kind: Literal["lines", "points", "steps", "heat"]
    x_title: str
    y_title: str
    series: tuple[Series, ...] = ()
    log_x: bool = False
    log_y: bool = False
    x: list[Any] = field(default_factory=list)  # of a heat map
    y: list[Any] = field(default_factory=list)
    frames: tuple[Frame, ...] = ()
    z_title: str = ""
    log_z: bool = False
    note: str = ""


@dataclass(frozen=True)
class Block:
    """A section of the page."""

    id: str
    title: str
    explanation: str = ""
    charts: tuple[Chart, ...] = ()
    tables: tuple[Table, ...] = ()
    lines: tuple[tuple[str, str], ...] = ()  # (word in front or "", sentence)
    passage: dict[str, Any] | None = None


@dataclass(frozen=True)
class Page:
    """keys: the variants, in the order of their colours, the original first where there is one."""

    title: str
    answer: str
    facts: tuple[str, ...]
    blocks: tuple[Block, ...]
    keys: tuple[str, ...] = ()
    original: str | None = None
    warning: str = ""


def rounded(values: Sequence[float | None]) -> Numbers:
    """To DIGITS significant digits; what is no finite number, which a chart cannot show, becomes None."""
    return [None if v is None or v != v or v in (float("inf"), float("-inf")) else float(f"{v:.{DIGITS - 1}e}") for v in values]


def grid(cells: Mapping[Any, float | None], rows: Sequence[Any], columns: Sequence[Any]) -> list[Numbers]:
    """What a heat map shows: cells by (row, column); None where there is none."""
    return [rounded([cells.get((row, column)) for column in columns]) for row in rows]
