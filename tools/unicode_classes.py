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
# Code point ranges (hexadecimal, inclusive) of the classes in pre-tokenizer regular expressions, Unicode {VERSION}: general
# categories L N P S M, and W for the property White_Space.  Written by tools/unicode_classes.py; derived from the Unicode
# Character Database, https://www.unicode.org/license.txt
"""
WHITE_SPACE = {*range(0x09, 0x0E), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000}


def class_ranges() -> dict[str, list[tuple[int, int]]]:
    """Class letter → inclusive ranges in ascending order."""
    database = next((m for m in map(_import, ("unicodedata", "unicodedata2")) if m and m.unidata_version == VERSION), None)
    if database is None:
        raise SystemExit(f"neither unicodedata nor unicodedata2 has Unicode {VERSION}; run `pip install unicodedata2=={VERSION}` first")
    ranges: dict[str, list[tuple[int, int]]] = {name: [] for name in "LNPSMW"}
    start = 0
    for name, run in groupby(range(sys.maxunicode + 1), lambda c: "W" if c in WHITE_SPACE else database.category(chr(c))[0]):
        end = start + sum(1 for _ in run)
        if name in ranges:
            ranges[name].append((start, end - 1))
        start = end
    return ranges


def _import(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def main() -> None:
    lines = [HEADER]
    for name, ranges in class_ranges().items():
        text = " ".join(f"{a:X}" if a == b else f"{a:X}-{b:X}" for a, b in ranges)
        lines += [f"{name} {line}\n" for line in textwrap.wrap(text, 118, break_on_hyphens=False)]
    TARGET.write_text("".join(lines), "utf-8")


if __name__ == "__main__":
    main()
