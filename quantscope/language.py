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


def translated(template: str) -> str:
    """The template in the current language, its fields still open.

    One without a translation stays English: a missing key is a defect that the tests find, no reason to lose a report.
    """
    return catalogue(current()).get(template, template)


def say(template: str, /, **values: Any) -> str:
    """The template of the current language with its fields filled in."""
    return translated(template).format(**values)


def english(template: str, /, **values: Any) -> str:
    """The sentence in English, whatever the language: for files and data that are kept; ``retold`` says it to a reader."""
    return template.format(**values)


def retold(text: str) -> str:
    """Sentences, or one heading or name, that were said in English and kept, as in study.json, said again in the current language.

    Their templates are found by their words, the fields by what stands between them, and these are told again in turn.  A sentence of no
    template stays as it is, as all do in English.
    """
    if current() == ENGLISH:
        return text
    ends = [i + 1 for i in range(len(text)) if text.startswith(". ", i)]
    for end in (*ends, len(text)):
        first = _said_again(text[:end], sentence=True)
        if first is not None:
            rest = text[end:].lstrip()
            return f"{first}{say(' ')}{retold(rest)}" if rest else first
    if ends:
        return f"{text[: ends[0]]} {retold(text[ends[0] :].lstrip())}"
    return _said_again(text, sentence=False) or text


def _said_again(text: str, *, sentence: bool) -> str | None:
    """The text of one template in the current language; sentence: only of a whole one."""
    for pattern, template in _patterns(current()):
        if sentence and not template.endswith("."):
            continue
        if (found := pattern.fullmatch(text)) is not None:
            again = {field: _said_again(value, sentence=False) or _list_again(value) for field, value in found.groupdict().items()}
            return say(template, **again)
    return None


def _list_again(text: str) -> str:
    """Names in a list, as ``phrases.listed`` says it; other text stays as it is."""
    found = re.fullmatch(r"(\S+(?:, \S+)*?)(?: and (\S+))?", text)
    if found is None:
        return text
    first = translated(", ").join(found[1].split(", "))
    return first if found[2] is None else say("{first} and {last}", first=first, last=found[2])


ENOUGH = 5  # letters that tell a template with fields apart from other words with something between them
_FIELD = re.compile(r"\\{(\w+)\\}")


@cache
def _patterns(name: str) -> list[tuple[re.Pattern[str], str]]:
    """A regular expression for each template of a catalogue that can be told by its words, those with most of them first."""
    words = {key: sum(c.isalpha() for c in re.sub(r"\{\w+\}", "", key)) for key in catalogue(name)}
    keys = [key for key, n in words.items() if n >= ENOUGH or "{" not in key or re.fullmatch(r"\{n\} \w+", key)]
    return [(re.compile(_pattern(key), re.DOTALL), key) for key in sorted(keys, key=lambda key: -words[key])]


def _pattern(template: str) -> str:
    seen: set[str] = set()

    def group(field: re.Match[str]) -> str:
        again = field[1] in seen
        seen.add(field[1])
        number = template.startswith("{n} ") and field[1] == "n"
        shape = r"[\d,]+" if number else r"\w+" if field[1].startswith("_") else ".+?"
        return f"(?P={field[1]})" if again else f"(?P<{field[1]}>{shape})"

    return _FIELD.sub(group, re.escape(template))
