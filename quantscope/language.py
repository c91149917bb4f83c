"""Sentences in the reader's language.  The English template in the code is the key; other languages are catalogues in ``strings/``.

    say("{n} of {total} layers shown", n=12, total=80)      in Japanese the catalogue's template with the same fields
    mark("variant")                                         a template kept in a table, said when the table is drawn

Only whole sentences and headings are said: fragments joined together have an order that other languages do not share.  Names of tensors,
taps, types, commands and options stay as they are.  The language is that of the current context: threads and tasks do not disturb each
other.
"""

from __future__ import annotations

import importlib
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
