"""Numbers and names as people read them: ``10.3×``, ``0.0123``, ``−0.0000180``, ``4.6 MB``, ``"\\n"``, ``a, b and c``, ``a, b and 3 more``.

A minus is U+2212 (−), a value that is no finite number says which (``NaN``, ``∞``), and a missing one is an en dash.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

MISSING = "–"


def _special(x: float | None) -> str | None:
    if x is None:
        return MISSING
    if math.isnan(x):
        return "NaN"
    return None if math.isfinite(x) else "∞" if x > 0 else "−∞"


def minus(text: str) -> str:
    """The same number with U+2212 for its minus, and no minus on a rounded zero."""
    return text.removeprefix("-") if not text.strip("-0.") else text.replace("-", "−")


def fixed(x: float | None, digits: int) -> str:
    """A fixed number of decimals, thousands separated: ``1,234.50``."""
    return _special(x) or minus(f"{x:,.{digits}f}")


def sig(x: float | None, digits: int = 3, smallest: float = 1e-4) -> str:
    """Significant digits, plain from ``smallest`` to a million: ``0.0123``, ``123``, otherwise ``1.23e−7``."""
    special = _special(x)
    if special or x is None:
        return special or MISSING
    if x == 0:
        return "0"
    rounded = float(f"{x:.{digits - 1}e}")
    if not smallest <= abs(rounded) < 1e6:
        return sci(x, digits)
    return fixed(x, max(0, digits - 1 - math.floor(math.log10(abs(rounded)))))


def mean(x: float | None) -> str:
    """A mean of activations: three significant digits, plain down to a millionth, so that a column can be read: ``−0.0000180``."""
    return sig(x, 3, 1e-6)


def sci(x: float | None, digits: int = 3) -> str:
    """Significant digits and a power of ten: ``1.23e−4``."""
    special = _special(x)
    if special or x is None:
        return special or MISSING
    if x == 0:
        return "0"
    mantissa, exponent = f"{x:.{digits - 1}e}".split("e")
    return minus(f"{mantissa}e{int(exponent)}")


def times(x: float | None) -> str:
    """A multiple, as the seed document prints it: one decimal below 100, none from there on: ``10.3×``, ``211×``."""
    special = _special(x)
    return special or f"{fixed(x, 1 if abs(x or 0) < 99.95 else 0)}×"


def percent(x: float | None, digits: int = 2) -> str:
    """A fraction in significant digits: ``0.0123`` → ``1.2%``."""
    return _special(x) or f"{sig(100 * (x or 0), digits)}%"


def with_sign(x: float, digits: int) -> str:
    """Fixed decimals with its sign always shown: ``+1.2``, ``−0.3``."""
    return ("+" if x >= 0 else "") + fixed(x, digits)


def size(n_bytes: int | None) -> str:
    """A file size in decimal units: ``637 MB``."""
    if n_bytes is None:
        return MISSING
    value, unit = float(n_bytes), "bytes"
    for bigger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, bigger
    return f"{n_bytes} bytes" if unit == "bytes" else f"{sig(value)} {unit}"


def count(n: int, singular: str, plural: str | None = None) -> str:
    """``1 layer``, ``2 layers``."""
    return f"{n:,} {singular if n == 1 else plural or singular + 's'}"


def listed(items: Iterable[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    *first, last = list(items) or [""]
    return f"{', '.join(first)} and {last}" if first else last


def some(items: Iterable[str], most: int) -> str:
    """``a, b``; of more than ``most`` the first: ``a, b and 3 more``."""
    names = list(items)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def quoted(text: str) -> str:
    """A token's text in double quotes, quotes and backslashes escaped, and ``printable``."""
    return '"' + printable(text.replace("\\", "\\\\").replace('"', '\\"')) + '"'


def printable(text: str) -> str:
    """The text with every character that would not show as itself (newline, escape, direction marks ...) as an escape."""
    return "".join(_shown(c) for c in text)


_NAMED = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}


def _shown(c: str) -> str:
    if c.isprintable():  # not so: control, format (direction marks), surrogates, unassigned, line breaks, spaces but " "
        return c
    return _NAMED.get(c) or (f"\\x{ord(c):02x}" if ord(c) < 0x100 else f"\\u{ord(c):04x}" if ord(c) < 0x10000 else f"\\U{ord(c):08x}")


MOST_NAMED = 3  # places in a note


def idle_experts(idle: Iterable[tuple[str, int, int]]) -> str:
    """The first places where experts are idle, for a note: of (place, idle experts, experts); "" where all are reached."""
    some = [f"{place}: {k}/{n}" for place, k, n in idle if k]
    return ", ".join(some[:MOST_NAMED]) + (", …" if len(some) > MOST_NAMED else "")
