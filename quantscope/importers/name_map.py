"""``--map layers.{i}.out=l_out-{i}``: the names that an engine's arrays have → names of taps."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from quantscope.errors import ImportFormatError, UsageError
from quantscope.language import english
from quantscope.model.taps import EMBD, HEAD_TAPS, LAYER_TAPS, split_tap

MOST_NAMED = 6
TAPS = (EMBD, *(f"{stem}-{{i}}" for stem in LAYER_TAPS), *HEAD_TAPS)


@dataclass(frozen=True)
class Rule:
    """One ``--map``: names that the pattern matches whole become ``tap``, {i} being the layer."""

    text: str
    pattern: re.Pattern[str]
    tap: str

    def __call__(self, name: str) -> str | None:
        found = self.pattern.fullmatch(name)
        return None if found is None else self.tap.replace("{i}", str(int(found["i"])) if "i" in self.pattern.groupindex else "")


def parse_rule(text: str) -> Rule:
    """Raises UsageError for a rule that is none or whose right side is no tap."""
    left, equals, tap = text.rpartition("=")
    example = "as in `--map layers.{i}.out=l_out-{i}`"
    if not equals or not left or not tap:
        raise UsageError(f"--map {text!r}: expected NAME=TAP, {example}.")
    if "{i}" in tap and "{i}" not in left:
        raise UsageError(f"--map {text!r}: the tap has a layer {{i}} and the name has none, {example}.")
    if split_tap(tap.replace("{i}", "0")) is None:
        raise UsageError(f"--map {text!r}: {tap!r} is no tap, expected one of {', '.join(TAPS)}, {example}.")
    first, *more = re.escape(left).split(re.escape("{i}"))
    pattern = first + "".join((r"(?P<i>\d{1,5})" if n == 0 else "(?P=i)") + part for n, part in enumerate(more))
    return Rule(text, re.compile(pattern), tap)


def taps_of(names: Iterable[str], rules: Sequence[Rule], file: str) -> dict[str, str]:
    """Tap → name, for the names that a rule or they themselves make taps.

    Raises ImportFormatError where nothing matches (naming both sets), where a rule matches nothing, and where two names are one tap.
    """
    names = list(names)
    found: dict[str, str] = {}
    used: set[str] = set()
    for name in names:
        rule, tap = next(((r, t) for r in rules if (t := r(name)) is not None), (None, name if split_tap(name) else None))
        if tap is None:
            continue
        if tap in found:
            raise ImportFormatError(f"{file}: {found[tap]!r} and {name!r} both are {tap}. Give a `--map` for one of them only.")
        found[tap] = name
        used |= {rule.text} if rule else set()
    idle = [r.text for r in rules if r.text not in used]
    if idle or not found:
        raise ImportFormatError(
            f"{file}: {'no array is a tap' if not idle else f'--map {idle[0]} matches no array'}. The arrays are "
            f"{_shortened(names)}; the taps are {_shortened(TAPS, len(TAPS))}. Give a rule for each kind of array, as in "
            f"`--map layers.{{i}}.out=l_out-{{i}}`."
        )
    return found


def _shortened(names: Sequence[str], most: int = MOST_NAMED) -> str:
    """``a, b, c ... (12 in all)``; of names that differ in their numbers only one is shown."""
    kinds = list({re.sub(r"\d+", "#", name): name for name in reversed(names)}.values())[::-1]
    shown = ", ".join(kinds[:most]) or "none"
    return shown if len(kinds) == len(names) <= most else f"{shown} ... ({len(names)} in all)"


def unmapped_note(names: Iterable[str], found: Mapping[str, str]) -> str | None:
    """A line that counts what was left out."""
    rest = [n for n in names if n not in set(found.values())]
    return english("Arrays that are no taps, left out: {names}.", names=_shortened(rest)) if rest else None
