"""``gpt2`` and ``gemma4`` vocabularies: words, where the pair of the earliest merge rule merges first, the leftmost of equals.

The `tokenizers` package does the merging.  Tokens and merges are written in the byte alphabet, where each byte is one printable
character, or (*raw* pre-tokenizers) in plain text with ▁ for a space.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import chain, groupby

from tokenizers.models import BPE

from quantscope.tokenizers.pretokenize import split
from quantscope.tokenizers.vocabulary import BYTE_TO_CHAR, Vocabulary

SPACE = "▁"
_SURROGATES = re.compile("[\ud800-\udfff]")
_CACHED_WORDS, _CACHED_LENGTH = 100_000, 64  # words kept, and the longest one [characters]


class BpeEncoder:
    """Text without special tokens → ids."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._row = vocabulary.pre_tokenizer
        self._index = vocabulary.index
        merges = _rules(vocabulary.merges)
        # llama.cpp merges whatever the rules name, also from and to strings that are no tokens.  Such strings get ids past the
        # vocabulary here, and end up as the single letters that are tokens.
        letters: Iterable[str] = [] if self._row.raw else BYTE_TO_CHAR.values()
        named = {*letters, *chain.from_iterable(merges), *map("".join, merges)}
        strays = {text: i for i, text in enumerate(sorted(named - self._index.keys()), len(vocabulary.tokens))}
        self._letters = {i: self._parts(text) for text, i in strays.items()}
        model = {token: self._index[token] for token in _decodable(self._index)} | strays
        self._mergeable = {letter for letter in model if len(letter) == 1}
        self._bpe = BPE(model, merges)
        self._words: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = []
        known = self._words
        for word in split(text.replace(" ", SPACE) if self._row.raw else text, self._row):
            tokens = known.get(word)
            if tokens is None:
                tokens = self._word(word)
                if len(known) < _CACHED_WORDS and len(word) <= _CACHED_LENGTH:
                    known[word] = tokens
            ids += tokens
        return ids

    def _word(self, word: str) -> list[int]:
        letters = word if self._row.raw else word.encode("utf-8").decode("latin-1").translate(BYTE_TO_CHAR)
        whole = self._row.ignore_merges or (self._row.newline_runs and not word.strip("\n"))
        if whole and letters in self._index:
            return [self._index[letters]]
        return [i for part in self._known_runs(letters) for i in self._merge(part)]

    def _known_runs(self, letters: str) -> list[str]:
        """Cut around the characters that no token or rule names: a merge cannot cross them, and `tokenizers` would drop them."""
        if not self._row.raw or self._mergeable.issuperset(letters):
            return [letters]
        return ["".join(run) for _, run in groupby(letters, lambda c: c in self._mergeable or c)]

    def _merge(self, letters: str) -> list[int]:
        if self._row.raw and letters[0] not in self._mergeable:
            return self._parts(letters)
        return [i for token in self._bpe.tokenize(letters) for i in self._letters.get(token.id, (token.id,))]

    def _parts(self, text: str) -> list[int]:
        """What text that is no token becomes: the tokens of its bytes, as far as there are any."""
        if self._row.raw:
            names = [f"<0x{byte:02X}>" for byte in text.encode("utf-8", "surrogateescape")]
        else:
            names = [letter for letter in text if letter.isascii()]
        return [self._index[name] for name in names if name in self._index]


def _rules(merges: Iterable[str]) -> list[tuple[str, str]]:
    """The two sides of every rule, in order; of equal rules the first counts.  No letter is a space, so the first one separates."""
    sides = (rule.partition(" ") for rule in _decodable(merges))
    return list(dict.fromkeys((left, right) for left, _, right in sides if left and right))


def _decodable(texts: Iterable[str]) -> list[str]:
    """Without those that hold undecodable bytes of the file: no prompt matches them."""
    kept = list(texts)
    if _SURROGATES.search("".join(kept)):
        return [text for text in kept if not _SURROGATES.search(text)]
    return kept
