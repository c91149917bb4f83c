"""Write ``quantscope/tokenizers/unicode_classes.txt``: the character classes the pre-tokenizers' regular expressions use.

    pip install unicodedata2==15.1.0 && python -m tools.unicode_classes

Token ids must not depend on the Unicode version of the Python that runs the program, so the classes are frozen at the version
llama.cpp's tables have.  Python 3.13's own ``unicodedata`` serves as well.
"""

from __future__ import annotations

import importlib
import sys
import textwrap
from itertools import groupby
from pathlib import Path
from types import ModuleType

VERSION = "15.1.0"
TARGET = Path(__file__).resolve().parent.parent / "quantscope" / "tokenizers" / "unicode_classes.txt"
HEADER = f"""\
# Code point ranges (hexadecimal, inclusive) of the classes that tokenizers ask for, Unicode {VERSION}: general categories L N P S M,
# C without the unassigned ones, and W for the property White_Space.  Then `lower first-last/step+distance`: the simple lower case.
# Written by tools/unicode_classes.py; derived from the Unicode Character Database, https://www.unicode.org/license.txt
"""
WHITE_SPACE = {*range(0x09, 0x0E), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000}


def class_ranges(database: ModuleType) -> dict[str, list[tuple[int, int]]]:
    """Class letter → inclusive ranges in ascending order."""

    def letter(code: int) -> str:
        category = database.category(chr(code))
        return "W" if code in WHITE_SPACE else "" if category == "Cn" else category[0]

    ranges: dict[str, list[tuple[int, int]]] = {name: [] for name in "LNPSMCW"}
    start = 0
    for name, run in groupby(range(sys.maxunicode + 1), letter):
        end = start + sum(1 for _ in run)
        if name in ranges:
            ranges[name].append((start, end - 1))
        start = end
    return ranges


def lower_runs(database: ModuleType) -> list[str]:
    """``first-last/step+distance``: evenly spaced characters whose simple lower case is equally far from each."""
    runs: list[list[int]] = []  # first, last, step, distance
    for code in range(sys.maxunicode + 1):
        lower = chr(code).lower()  # the first character of a longer one is the simple lower case: only İ has one
        if ord(lower[0]) == code or database.category(chr(code)) == "Cn":
            continue
        distance = ord(lower[0]) - code
        if runs and runs[-1][3] == distance and code - runs[-1][1] <= 2 and runs[-1][2] in (0, code - runs[-1][1]):
            runs[-1][1:3] = [code, code - runs[-1][1]]
        else:
            runs.append([code, code, 0, distance])
    return [f"{first:X}-{last:X}/{step or 1}{distance:+X}" for first, last, step, distance in runs]


def unicode_database() -> ModuleType:
    """Whichever database has the VERSION; ``str.lower`` knows every character of it from Python 3.11 on."""
    database = next((m for m in map(_import, ("unicodedata", "unicodedata2")) if m and m.unidata_version == VERSION), None)
    if database is None or sys.version_info < (3, 11):
        raise SystemExit(f"expected Python 3.11 and Unicode {VERSION}: run `pip install unicodedata2=={VERSION}` with it first")
    return database


def _import(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def main() -> None:
    database = unicode_database()
    named = {name: " ".join(f"{a:X}" if a == b else f"{a:X}-{b:X}" for a, b in r) for name, r in class_ranges(database).items()}
    named["lower"] = " ".join(lower_runs(database))
    lines = [f"{name} {line}\n" for name, text in named.items() for line in textwrap.wrap(text, 118, break_on_hyphens=False)]
    TARGET.write_text(HEADER + "".join(lines), "utf-8")


if __name__ == "__main__":
    main()
