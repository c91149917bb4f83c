"""Tables of statistics, Markdown or CSV → a trace a variant.

    | Layer | Input RMS | Output RMS | Mean |        columns in English or Japanese; the variant from a heading above the table
    | Layer | Q4_K_M | Q4_0 |                        a column a variant; the quantity from a heading above the table
    tap,rms,mean                                     a row a tap

A cell may have bold marks, a unit or a sign behind its number; a column with several quantities has them in its heading and its cells with
``/`` between.  Growth and drift are not read, they follow from the rest.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from quantscope.errors import ImportFormatError
from quantscope.importers.base import NUMBER, UNKNOWN_ENGINE, Draft, Imported, Run, decimals, input_tap, number
from quantscope.model.taps import split_tap
from quantscope.trace import Origin, Stats
from quantscope.wording import count

Quantity: TypeAlias = tuple[str, str]  # (tap without its layer, or INPUT, or "" where a row names its tap; statistic)
INPUT = "input"
DERIVED = ("", "")

STATISTICS = (("rms", r"rms"), ("mean", r"mean|平均"), ("min", r"\bmin|最小"), ("max", r"\bmax|最大"), ("sum", r"\bsum\b|合計"))
PLACES = (("ffn_swiglu", r"swiglu"), (INPUT, r"input|入力"), ("l_out", r""))  # the first whose words are in the heading
NOT_READ = re.compile(r"growth|成長|drift|ドリフト|増加|倍率|ratio|/\s*rms", re.IGNORECASE)
LAYER = re.compile(r"(layer|l|block|層|レイヤー?|ブロック)\b\.?", re.IGNORECASE)
VARIANT = re.compile(r"量子化|quanti[sz]ation|quant\b|variant|モデル|^model$", re.IGNORECASE)
QUANT_NAME = re.compile(r"(?<![\w.])(?:I?Q\d\w*|TQ\d_\d|MXFP4|NVFP4|B?F16|F?P?32|FP16)(?![\w.])", re.IGNORECASE)
UNKNOWN_CELLS = re.compile(r"\s*(?:[-–—?]+|n/?a|なし)?\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Grid:
    """One table: its headings and cells, and the texts above it, the nearest first."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    above: tuple[str, ...] = ()


@dataclass(frozen=True)
class Column:
    """What a column holds: quantities of a variant (None: of the one that the row or the heading names)."""

    quantities: tuple[Quantity, ...]
    variant: str | None


@dataclass
class _Variants:
    """The drafts by name in order of appearance."""

    drafts: dict[str, Draft] = field(default_factory=dict)
    engines: dict[str, str] = field(default_factory=dict)

    def of(self, name: str) -> Draft:
        return self.drafts.setdefault(name, Draft())


def read_table(text: str, name: str, *, default: str) -> Imported:
    """Every table of statistics in a Markdown or CSV text, a run a variant.

    name: of the file, for errors; default: the variant's name where the text has none.
    Raises ImportFormatError where no table can be read.
    """
    grids = list(markdown_tables(text)) or [csv_table(text)]
    variants, unread = _Variants(), 0
    for grid in grids:
        unread += not _read_grid(grid, variants, default)
    runs = [
        Run(variant, draft.trace(Origin(variants.engines.get(variant, UNKNOWN_ENGINE), model=variant)))
        for variant, draft in variants.drafts.items()
        if draft.taps
    ]
    if not runs:
        found = "; ".join(", ".join(g.columns)[:80] for g in grids[:3])
        raise ImportFormatError(
            f"{name}: expected a table with a column `layer` (or `tap`) and columns such as `output RMS`, `mean`, found "
            f"{count(len(grids), 'table')} without ({found}). Name the columns as docs/importing.md shows."
        )
    warnings = (f"{name}: {count(unread, 'table')} without layers or statistics not read.",) if unread else ()
    return Imported("table", tuple(runs), variants=True, warnings=warnings)


# ---- Text → tables ------------------------------------------------------------------------------------------------------


def markdown_tables(text: str) -> Iterator[Grid]:
    """Pipe tables with the headings above them and the last line of text before them."""
    headings: dict[int, str] = {}
    line_before, lines = "", text.splitlines()
    i = 0
    while i < len(lines):
        line = lines[i].strip()
        if found := re.match(r"(#{1,6})\s+(.*)", line):
            level = len(found[1])
            headings = {k: v for k, v in headings.items() if k < level} | {level: found[2]}
            line_before = ""
        elif line.count("|") > 1 and i + 1 < len(lines) and re.fullmatch(r"\s*\|?[\s:|-]*-[\s:|-]*", lines[i + 1]):
            end = next((j for j in range(i + 2, len(lines)) if "|" not in lines[j]), len(lines))
            above = (line_before, *(headings[k] for k in sorted(headings, reverse=True)))
            yield Grid(_cells(line), tuple(_cells(row) for row in lines[i + 2 : end]), above)
            i, line_before = end - 1, ""
        elif line:
            line_before = line
        i += 1


def _cells(line: str) -> tuple[str, ...]:
    return tuple(
        c.replace("\\|", "|").strip().strip("*`").strip() for c in re.split(r"(?<!\\)\|", line.strip().removeprefix("|").removesuffix("|"))
    )


def csv_table(text: str) -> Grid:
    """The first line names the columns; separated by commas, semicolons or tabs."""
    first = text.lstrip().partition("\n")[0]
    separator = max(",;\t", key=first.count)
    try:
        rows = [tuple(c.strip() for c in row) for row in csv.reader(text.splitlines(), delimiter=separator) if any(c.strip() for c in row)]
    except csv.Error:
        rows = []
    return Grid(rows[0], tuple(rows[1:])) if rows else Grid((), ())


# ---- Tables → drafts ----------------------------------------------------------------------------------------------------


def quantity(heading: str) -> Quantity | None:
    """What a heading says a number is; DERIVED for growth and the like, None where it says nothing."""
    if NOT_READ.search(heading):
        return DERIVED
    statistic = next((s for s, words in STATISTICS if re.search(words, heading, re.IGNORECASE)), None)
    if statistic is None:
        return None
    return next(place for place, words in PLACES if re.search(words, heading, re.IGNORECASE)), statistic


def quantities(heading: str) -> tuple[Quantity, ...]:
    """Those of ``input RMS / output RMS / output mean``; of a heading without ``/``, its one."""
    parts = heading.split("/")
    found = [q for part in parts if (q := quantity(part)) not in (None, DERIVED)]
    if len(parts) > 1 and len(found) == len(parts):
        return tuple(found)
    one = quantity(heading)
    return () if one is None or one == DERIVED else (one,)


def _read_grid(grid: Grid, variants: _Variants, default: str) -> bool:
    """Whether the table is one of statistics."""
    named = {_kind(c): i for i, c in reversed(list(enumerate(grid.columns)))}
    at, by_tap = (named["tap"], True) if "tap" in named else (named.get("layer"), False)
    if at is None:
        return False
    heading = _named_above(grid.above)
    columns = {i: c for i, text in enumerate(grid.columns) if _kind(text) is None and (c := _column(text, grid.above)) is not None}
    if not columns:
        return False
    for row in grid.rows:
        place = row[at] if at < len(row) else ""
        own = row[named["variant"]] if "variant" in named and named["variant"] < len(row) else None
        for i, column in columns.items():
            if i < len(row):
                variant = own or column.variant or heading or default
                _read_cell(row[i], column, place, by_tap, variants.of(variant))
    _note_engine(grid.above, variants, [heading or default, *(c.variant for c in columns.values() if c.variant)])
    return True


def is_table(grid: Grid) -> bool:
    """Whether a column tells the layer or tap of its rows."""
    return len(grid.columns) > 1 and any(_kind(c) in ("tap", "layer") for c in grid.columns)


def _kind(heading: str) -> str | None:
    """What a column tells of its row; None for a column of numbers."""
    if heading.lower() == "tap":
        return "tap"
    if LAYER.fullmatch(heading) or heading in ("レイヤー", "層"):
        return "layer"
    return "variant" if VARIANT.search(heading) and not QUANT_NAME.search(heading) else None


def _column(text: str, above: Sequence[str]) -> Column | None:
    """The quantities of a column by its own heading, else by the texts above; None for one that is not read."""
    name = QUANT_NAME.search(text)
    rest = text if name is None else text.replace(name[0], " ")
    inside = re.search(r"\((.*)\)", rest)
    own = quantities(inside[1]) if inside and "/" in inside[1] else quantities(rest)
    if own:
        return Column(own, name[0] if name else None)
    if quantity(rest) == DERIVED:
        return None
    over = next((q for a in above if (q := quantities(a.rpartition(":")[2].strip(" .*") or a))), ())
    variant = name[0] if name else re.sub(r"\s+", " ", text).strip() or None
    return Column(over, variant) if over and variant else None


def _named_above(above: Sequence[str]) -> str | None:
    """The one quantization that the nearest text names; a text that names two compares them."""
    for text in above:
        names = list(dict.fromkeys(m[0] for m in QUANT_NAME.finditer(text)))
        if len(names) == 1:
            return names[0]
    return None


def _note_engine(above: Sequence[str], variants: _Variants, names: Sequence[str]) -> None:
    """``Q4_0 (RusTorch)``: the word in brackets behind the variant's name is the engine."""
    for text in above:
        if QUANT_NAME.search(text) and (found := re.search(r"\(([A-Za-z][\w.+-]*)\)\s*$", text)):
            for name in names:
                variants.engines.setdefault(name, found[1])
            return


def _read_cell(text: str, column: Column, place: str, by_tap: bool, draft: Draft) -> None:
    parts = text.split("/") if len(column.quantities) > 1 else [text]
    if len(parts) != len(column.quantities):
        return
    for part, (where, statistic) in zip(parts, column.quantities, strict=True):
        tap = _tap(where, place, by_tap)
        found = re.search(NUMBER, part.strip("* `"), re.IGNORECASE)
        if tap is None or found is None or UNKNOWN_CELLS.fullmatch(part):
            continue
        digits = decimals(found[0])
        draft.add(tap, Stats({statistic: number(found[0])}, None, {} if digits is None else {statistic: digits}))


def _tap(where: str, place: str, by_tap: bool) -> str | None:
    if by_tap:
        return place if split_tap(place) else None
    found = re.search(r"\d{1,4}", place)
    if found is None:
        return None
    return input_tap(int(found[0])) if where == INPUT else f"{where}-{int(found[0])}"


def layers_of(taps: Mapping[str, object]) -> list[int]:
    """The layers whose output a trace has, rising."""
    found = (split_tap(t) for t in taps)
    return sorted(s[1] for s in found if s is not None and s[0] == "l_out" and s[1] is not None)
