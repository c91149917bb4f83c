"""Results as plain tables: named columns with a type each, one row a thing.  What pandas frames, CSV and Parquet files are made of.

    frames(study)  →  {"variants": Frame, "layers": Frame, ...}

A column is a scalar field of a result's dataclass, under the field's name and unit suffix; what holds several values has a table of its
own.  A cell is None where nothing was measured.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

from quantscope.results import EngineRow, EngineRun, Generated, LayerRow, LogitStats, OpRow, Paired, Study, Variant
from quantscope.sources.base import printable

Kind: TypeAlias = Literal["int", "float", "str", "bool"]
Cell: TypeAlias = int | float | str | bool | None
_KINDS: dict[type, Kind] = {int: "int", float: "float", str: "str", bool: "bool"}


@dataclass(frozen=True)
class Frame:
    """Column name → type of its cells, and the rows in that order."""

    columns: dict[str, Kind]
    rows: tuple[tuple[Cell, ...], ...]

    def column(self, name: str) -> list[Cell]:
        at = list(self.columns).index(name)
        return [row[at] for row in self.rows]


def frames(study: Study) -> dict[str, Frame]:
    """Every table of a study, also those without rows.  The first column names the variant."""
    return {
        "variants": _variants(study),
        "types": _types(study.variants),
        "layers": _of_variants(LayerRow, ((v.name, v.layers) for v in study.variants)),
        "ops": _of_variants(OpRow, ((v.name, v.ops) for v in study.variants)),
        "logits": _of_variants(LogitStats, ((v.name, () if v.logits is None else (v.logits,)) for v in study.variants)),
        "generated": _generated(study.variants),
        "paired": table(Paired, study.paired),
        "engines": _engines(study.engines),
    }


def table(kind: type, rows: Iterable[Any], lead: Mapping[str, Kind] | None = None, before: Sequence[Sequence[Cell]] = ()) -> Frame:
    """The scalar fields of dataclass instances.  lead: columns in front of them, whose cells are in ``before``, one tuple a row."""
    fields = scalars(kind)
    given = list(rows)
    heads = before or [()] * len(given)
    cells = tuple((*map(_cell, head), *(_cell(getattr(r, name)) for name in fields)) for head, r in zip(heads, given, strict=True))
    return Frame({**(lead or {}), **fields}, cells)


def scalars(kind: type) -> dict[str, Kind]:
    """The fields of a dataclass that hold a number, a word or a truth value (or None), in order."""
    hints = get_type_hints(kind)
    found = {f.name: _scalar(hints[f.name]) for f in dataclasses.fields(kind)}
    return {name: k for name, k in found.items() if k is not None}


def _scalar(hint: Any) -> Kind | None:
    if get_origin(hint) in (Union, types.UnionType):
        inner = [a for a in get_args(hint) if a is not type(None)]
        return _scalar(inner[0]) if len(inner) == 1 else None
    if get_origin(hint) is Literal:
        return "str"
    return _KINDS.get(hint)


def _cell(value: Cell) -> Cell:
    """Bytes of a token that are no UTF-8 become escapes: no file format and no frame takes lone surrogates."""
    return printable(value) if isinstance(value, str) else value


def _variants(study: Study) -> Frame:
    """One row a variant, with its position in the study's order and whether it is the original."""
    lead: dict[str, Kind] = {"is_original": "bool", "n_tensors": "int"}
    heads = [(v.name == study.original, len(v.types)) for v in study.variants]
    made = table(Variant, study.variants, lead, heads)
    names = {"name": "variant"}
    order = ["name", *(c for c in made.columns if c != "name")]
    at = [list(made.columns).index(c) for c in order]
    return Frame({names.get(c, c): made.columns[c] for c in order}, tuple(tuple(row[i] for i in at) for row in made.rows))


def _types(variants: Sequence[Variant]) -> Frame:
    rows = tuple((_cell(v.name), _cell(name), t) for v in variants for name, t in v.types.items())
    return Frame({"variant": "str", "tensor": "str", "type": "str"}, rows)


def _of_variants(kind: type, rows: Iterable[tuple[str, Sequence[Any]]]) -> Frame:
    pairs = [(name, r) for name, many in rows for r in many]
    return table(kind, [r for _, r in pairs], {"variant": "str"}, [(name,) for name, _ in pairs])


def _generated(variants: Sequence[Variant]) -> Frame:
    pairs = [((v.name, i), g) for v in variants for i, g in enumerate(v.generated)]
    return table(Generated, [g for _, g in pairs], {"variant": "str", "step": "int"}, [head for head, _ in pairs])


def _engines(runs: Sequence[EngineRun]) -> Frame:
    """One row a tap of an engine's run; a run that failed has one row, without a tap."""
    about = scalars(EngineRun)
    nmse = {name: f"{name}_nmse" for name in scalars(EngineRow) if name != "tap"}
    columns: dict[str, Kind] = {**about, "tap": "str", **dict.fromkeys(nmse.values(), "float")}
    rows: list[tuple[Cell, ...]] = []
    for run in runs:
        head = tuple(_cell(getattr(run, name)) for name in about)
        rows += [(*head, r.tap, *(getattr(r, name) for name in nmse)) for r in run.rows] or [(*head, *[None] * (1 + len(nmse)))]
    return Frame(columns, tuple(rows))
