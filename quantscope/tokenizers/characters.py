"""What tokenizers ask about a character: its class, its lower case, the letter under its accents.

Token ids must not depend on the Unicode version of Python or of a library, so the answers come from unicode_classes.txt, which has
the version of llama.cpp's own tables.

Source: ``unicode_cpt_flags_from_cpt``, ``unicode_tolower``, ``unicode_cpts_normalize_nfd`` and ``unicode_cpt_is_han`` in src/unicode.cpp.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from itertools import chain
from typing import Any, TypeAlias

import numpy as np

Table: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]

# The byte that stands for a non-ASCII character of each class; \v is white space to `re` in bytes patterns, where no byte above 0x7F is.
# H: letters of the Han blocks, h: what else is in those blocks.
CLASS_BYTE: Mapping[str, int] = {"W": 0x0B, "N": 0xD1, "L": 0xD2, "P": 0xD3, "M": 0xD4, "S": 0xD5, "C": 0xD6, "H": 0xD7, "h": 0xD8}
OTHER = 0xD0  # unassigned
LOWER = "lower"  # the lines of unicode_classes.txt that are no class
HAN = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2EBEF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F))


@cache
def classes() -> Table:
    """Code point → the byte of its class, ASCII too.  Shape [0x110000], uint8."""
    table = np.full(0x110000, OTHER, np.uint8)
    for name, start, end in _class_ranges():
        table[start:end] = CLASS_BYTE[name]
    for first, last in HAN:
        block = table[first : last + 1]
        block[:] = np.where(block == CLASS_BYTE["L"], CLASS_BYTE["H"], CLASS_BYTE["h"])
    return table


@cache
def class_table() -> Table:
    """Code point → byte of the class text: ASCII as it is, else CLASS_BYTE of its class.  Shape [0x110000], uint8."""
    table = classes().copy()
    table[:0x80] = np.arange(0x80)
    return table


def class_text(text: str) -> bytes:
    """One byte per character of the text; no surrogates."""
    return class_table()[np.frombuffer(text.encode("utf-32-le"), np.uint32)].tobytes()


def ascii_members(name: str) -> str:
    """The ASCII characters of a class."""
    return "".join(chr(c) for c in range(0x80) if classes()[c] == CLASS_BYTE[name])


@cache
def lower_case() -> Mapping[int, int]:
    """Code point → code point of the simple lower case, for ``str.translate``."""
    return {code: code + distance for codes, distance in _lower_runs() for code in codes}


@cache
def without_accents(char: str) -> str:
    """The first character of the canonical decomposition: é → e, 가 → ᄀ.  Decompositions never change; unassigned ones are left alone."""
    return char if classes()[ord(char)] == OTHER else unicodedata.normalize("NFD", char)[0]


@cache
def _lines() -> tuple[tuple[str, tuple[str, ...]], ...]:
    """(first word, other words) of every line of unicode_classes.txt."""
    text = files("quantscope.tokenizers").joinpath("unicode_classes.txt").read_text("utf-8")
    words = (line.split() for line in text.splitlines() if not line.startswith("#"))
    return tuple((name, tuple(items)) for name, *items in words)


def _class_ranges() -> Iterator[tuple[str, int, int]]:
    """(class, first, last + 1)"""
    for name, items in _lines():
        for first, _, last in (item.partition("-") for item in items if name != LOWER):
            yield name, int(first, 16), int(last or first, 16) + 1


def _lower_runs() -> Iterator[tuple[range, int]]:
    """(code points, distance to their lower case) of every ``first-last/step+distance``"""
    for item in chain.from_iterable(items for name, items in _lines() if name == LOWER):
        codes, _, move = item.partition("/")
        first, _, last = codes.partition("-")
        yield range(int(first, 16), int(last, 16) + 1, int(move[0])), int(move[1:], 16)
