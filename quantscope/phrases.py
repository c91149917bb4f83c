"""Lists, counts and paragraphs in the reader's language: what ``wording`` says in English, for sentences that are said (``language.say``).

    count(2, "layer")           2 layers          2層
    listed(["a", "b", "c"])     a, b and c        a、b、c
    some("abcde", 2)            a, b and 3 more   a、bほか3件
    times(5)                    5.0×              5.0倍

Error messages stay English and therefore use ``wording``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from quantscope import wording
from quantscope.language import ENGLISH, current, say


def count(n: int, singular: str, plural: str | None = None) -> str:
    """``1 layer``, ``2 layers``; the catalogue's key is the plural, ``{n} layers``."""
    if current() == ENGLISH:
        return wording.count(n, singular, plural)
    return say("{n} " + (plural or singular + "s"), n=f"{n:,}")


def joined(items: Iterable[str]) -> str:
    """``a, b``."""
    return say(", ").join(items)


def listed(items: Iterable[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    *first, last = list(items) or [""]
    return say("{first} and {last}", first=joined(first), last=last) if first else last


def some(items: Iterable[str], most: int) -> str:
    """``a, b``; of more than ``most`` the first: ``a, b and 3 more``."""
    names = list(items)
    shown = joined(names[:most])
    return say("{shown} and {n} more", shown=shown, n=len(names) - most) if len(names) > most else shown


def listed_some(items: Iterable[str], most: int) -> str:
    """``a and b``; of more than ``most`` the first: ``a, b and c and 3 more``."""
    names = list(items)
    shown = listed(names[:most])
    return say("{shown} and {n} more", shown=shown, n=len(names) - most) if len(names) > most else shown


def clauses(items: Iterable[str]) -> str:
    """``a; b``: parts of a sentence with commas in them."""
    return say("; ").join(items)


def paragraph(sentences: Iterable[str]) -> str:
    """Whole sentences one after the other; empty ones are left out."""
    return say(" ").join(s for s in sentences if s)


def between(low: str, high: str) -> str:
    """``1.2 to 1.4``."""
    return say("{low} to {high}", low=low, high=high)


def times(x: float | None) -> str:
    """A multiple in a sentence: ``10.3×``."""
    text = wording.times(x)
    return say("{n}×", n=text.removesuffix("×")) if text.endswith("×") else text


def span(values: Sequence[float]) -> str:
    """The range of some multiples: ``12.1× to 12.6×``; one value when all read the same."""
    low, high = times(min(values)), times(max(values))
    return low if low == high else between(low, high)


def quantity(n: int) -> str:
    """A large number in words: ``260,032``, ``8.03 million``, ``1.10 billion``."""
    if n >= 1e9:
        return say("{n} billion", n=wording.sig(n / 1e9))
    return say("{n} million", n=wording.sig(n / 1e6)) if n >= 1e6 else f"{n:,}"


def size(n_bytes: int | None) -> str:
    """A file size in decimal units: ``637 MB``."""
    text = wording.size(n_bytes)
    return say("{n} bytes", n=n_bytes) if text.endswith(" bytes") else text
