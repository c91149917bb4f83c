"""``gpt2`` vocabularies: words of bytes, where the pair of the earliest merge rule merges first, the leftmost of equals.

The `tokenizers` package does the merging.  Tokens and merges are written in the byte alphabet: each byte is one printable character.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import chain

from tokenizers.models import BPE

from quantscope.tokenizers.pretokenize import split
from quantscope.tokenizers.vocabulary import BYTE_TO_CHAR, Vocabulary

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
        named = {*BYTE_TO_CHAR.values(), *chain.from_iterable(merges), *map("".join, merges)}
        strays = {text: i for i, text in enumerate(sorted(named - self._index.keys()), len(vocabulary.tokens))}
        self._letters = {i: [self._index[c] for c in text if c.isascii() and c in self._index] for text, i in strays.items()}
        self._bpe = BPE({token: self._index[token] for token in _decodable(self._index)} | strays, merges)
        self._words: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = []
        known = self._words
        for word in split(text, self._row):
            tokens = known.get(word)
            if tokens is None:
                tokens = self._word(word)
                if len(known) < _CACHED_WORDS and len(word) <= _CACHED_LENGTH:
                    known[word] = tokens
            ids += tokens
        return ids

    def _word(self, word: str) -> list[int]:
        letters = word.encode("utf-8").decode("latin-1").translate(BYTE_TO_CHAR)
        if self._row.ignore_merges and letters in self._index:
            return [self._index[letters]]
        return [i for token in self._bpe.tokenize(letters) for i in self._letters.get(token.id, (token.id,))]


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
