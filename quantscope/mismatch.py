"""Where two identities of a study differ, in words: ``--ctx: 512 → 256``, ``the content of m.gguf has changed (SHA-256 …)``.

An identity is nested JSON; its leaves are compared one by one, a list being one leaf.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, TypeAlias

from quantscope.wording import printable, quoted

Leaves: TypeAlias = dict[tuple[str, ...], Any]

WIDTH = 60  # [characters] of one value
AROUND = 12  # [characters] shown before the place where two long values part
SHA256 = re.compile("[0-9a-f]{64}")
NAMES: dict[tuple[str, ...], str] = {
    ("quantscope",): "version of quantscope",
    ("format",): "format of the records",
    ("text",): "the text",
}


class _Absent:
    def __str__(self) -> str:
        return "absent"


ABSENT = _Absent()


def differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One phrase per differing leaf, ``what: there → now``, in the order of ``now`` and then of ``there``; empty for equal identities."""
    a, b = leaves(there), leaves(now)
    keys = [key for key in {**b, **a} if key not in a or key not in b or json.dumps(a[key]) != json.dumps(b[key])]
    return [_phrase(key, a.get(key, ABSENT), b.get(key, ABSENT)) for key in keys]


def leaves(value: Mapping[str, Any], path: tuple[str, ...] = ()) -> Leaves:
    """Path of keys → everything that is not a (filled) object."""
    out: Leaves = {}
    for key, inner in value.items():
        here = (*path, key)
        out |= leaves(inner, here) if isinstance(inner, Mapping) and inner else {here: inner}
    return out


def _phrase(key: tuple[str, ...], there: Any, now: Any) -> str:
    if _is_hash(there) and _is_hash(now):
        return f"the content of {NAMES.get(key) or printable(key[-1])} has changed (SHA-256 {there[:12]}… → {now[:12]}…)"
    first, second = _apart(_shown(there), _shown(now))
    return f"{_name(key)}: {first} → {second}"


def _name(key: tuple[str, ...]) -> str:
    """``--ctx``, ``models m.gguf``, ``plan of text (--memory)``."""
    if key[0] == "plan":
        return printable(" of ".join(["plan", " ".join(key[1:])]) if key[1:] else "plan") + " (--memory)"
    if key[0] == "options":
        return printable(" ".join(key[1:]) or "options")
    return NAMES.get(key) or printable(" ".join(key))


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and SHA256.fullmatch(value) is not None


def _shown(value: Any) -> str:
    """A leaf on one line.  A plain word stands as it is, other text in quotes: ``none`` is no text."""
    if _is_hash(value):
        return f"SHA-256 {value[:12]}…"
    if isinstance(value, str):
        return value if re.fullmatch(r"[\w.+-]+", value, re.ASCII) else quoted(value)
    if isinstance(value, list):
        return ",".join(_shown(item) for item in value) or "empty"
    return "none" if value is None else str(value) if value is ABSENT else json.dumps(value)


def _apart(a: str, b: str) -> tuple[str, str]:
    """Both cut to WIDTH, such that where they part can be seen."""
    if max(len(a), len(b)) <= WIDTH:
        return a, b
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    start = max(0, same - AROUND)
    return _cut(a, start), _cut(b, start)


def _cut(text: str, start: int) -> str:
    return ("…" if start else "") + text[start : start + WIDTH] + ("…" if len(text) > start + WIDTH else "")
