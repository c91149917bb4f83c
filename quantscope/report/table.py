"""What a report is made of: tables of ready strings and the sections they stand in."""

from __future__ import annotations

from dataclasses import dataclass

from quantscope.language import say
from quantscope.results import Study, Variant
from quantscope.wording import printable

FLAG = "⚠"
DIFFERS = "≠"


@dataclass(frozen=True)
class Table:
    """Rows of ready strings.  ``layers`` gives the layer of each row when rows are layers; ``important`` ones must be shown."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    footnotes: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    important: frozenset[int] = frozenset()
    text_columns: frozenset[int] = frozenset({0})  # left-aligned; all others hold numbers


@dataclass(frozen=True)
class Section:
    """A heading, a line for the newcomer, and tables."""

    title: str
    explanation: str
    tables: tuple[Table, ...]


def label(study: Study, variant: Variant) -> str:
    """The variant's name in a table; the original is marked."""
    name = printable(variant.name)
    return say("{name} (original)", name=name) if variant.name == study.original else name
