"""A language made of the English templates in ⟦brackets⟧: whatever stands outside of them was never said through the catalogue."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from string import Formatter

import pytest

from quantscope import language
from tools.check_catalogue import said

NAME = "ja"  # the language whose place it takes


class Pseudo(Mapping[str, str]):
    """Every template that the package says, its words in brackets and its fields between them; another one is an error."""

    def __init__(self) -> None:
        self.keys_said = said()

    def __getitem__(self, template: str) -> str:
        assert template in self.keys_said, f"said, but no literal of say() or mark(): {template!r}"
        out = ""
        for words, field, _, _ in Formatter().parse(template):
            out += f"⟦{words}⟧".replace("{", "{{").replace("}", "}}") if words else ""
            out += f"{{{field}}}" if field is not None and not field.startswith("_") else ""
        return out

    def get(self, key: str, default: str | None = None) -> str:  # type: ignore[override]
        return self[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_said)

    def __len__(self) -> int:
        return len(self.keys_said)


@contextmanager
def pseudo_language(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything inside is said in the pseudo-language."""
    catalogue = Pseudo()
    with monkeypatch.context() as patch, language.language(NAME):
        patch.setattr(language, "catalogue", lambda name: catalogue)
        yield


def words_outside(text: str) -> set[str]:
    """Words of two letters or more in no bracket, nor in `code`, "quotes", a command, or a name with digits or punctuation in it."""
    assert "⟦" in text
    text = re.sub(r"→ quantscope[^|\n]*|^ {4}.*$", " ", text, flags=re.M)  # the command of a hypothesis, code in Markdown
    text = re.sub(r"⟦[^⟧]*⟧", " ", text)
    text = re.sub(r"`[^`]*`|\"[^\"]*\"", " ", text)
    return set(re.findall(r"[^\W\d_]{2,}", re.sub(r"[\w./-]*[\d_./-][\w./-]*", " ", text)))
