"""Sentences in the reader's language.  The English template in the code is the key; other languages are catalogues in ``strings/``.

    say("{n} of {total} layers shown", n=12, total=80)      in Japanese the catalogue's template with the same fields
    mark("variant")                                         a template kept in a table, said when the table is drawn

Only whole sentences and headings are said: fragments joined together have an order that other languages do not share.  Names of tensors,
taps, types, commands and options stay as they are.  A field whose name begins with an underscore ({_are}: "is" or "are") is English grammar
that other languages leave out.  The language is that of the current context: threads and tasks do not disturb each other.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

from quantscope.errors import UsageError

ENGLISH = "en"
LANGUAGES = (ENGLISH, "ja")

_current: ContextVar[str] = ContextVar("quantscope_language", default=ENGLISH)


def current() -> str:
    """The language of this context, one of LANGUAGES."""
    return _current.get()


@contextmanager
def language(name: str) -> Iterator[None]:
    """Say everything inside in this language.  Raises UsageError for a language that has no catalogue."""
    if name not in LANGUAGES:
        raise UsageError(f"--lang {name}: expected one of {', '.join(LANGUAGES)}.")
    token = _current.set(name)
    try:
        yield
    finally:
        _current.reset(token)


@cache
def catalogue(name: str) -> Mapping[str, str]:
    """English template → template of a language; empty for English."""
    if name == ENGLISH:
        return {}
    found: Mapping[str, str] = importlib.import_module(f"quantscope.strings.{name}").STRINGS
    return found


def mark(template: str) -> str:
    """The same template: notes for the catalogue's test that it will be said."""
    return template


def say(template: str, /, **values: Any) -> str:
    """The template of the current language with its fields filled in.

    A template without a translation is said in English: a missing key is a defect that the tests find, no reason to lose a report.
    """
    return catalogue(current()).get(template, template).format(**values)


def retold(sentence: str) -> str:
    """A sentence that was said in English and kept, as in study.json, said again in the current language.

    Its template is found by its words, the fields by what stands between them, and these are told again in turn.  A sentence of no
    template stays as it is, as all do in English.
    """
    name = current()
    for pattern, template in _patterns(name) if sentence and name != ENGLISH else ():
        if (found := pattern.fullmatch(sentence)) is not None:
            return say(template, **{field: retold(value) for field, value in found.groupdict().items()})
    return sentence


_FIELD = re.compile(r"\\{(\w+)\\}")


@cache
def _patterns(name: str) -> list[tuple[re.Pattern[str], str]]:
    """A regular expression for each template of a catalogue that has words, those with most words first."""
    keys = [key for key in catalogue(name) if sum(c.isalpha() for c in re.sub(r"\{\w+\}", "", key)) > 1]
    return [(re.compile(_pattern(key), re.DOTALL), key) for key in sorted(keys, key=lambda key: -len(re.sub(r"\{\w+\}", "", key)))]


def _pattern(template: str) -> str:
    seen: set[str] = set()

    def group(field: re.Match[str]) -> str:
        again = field[1] in seen
        seen.add(field[1])
        return f"(?P={field[1]})" if again else f"(?P<{field[1]}>.+?)"

    return _FIELD.sub(group, re.escape(template))
