"""``gpt2`` vocabularies: words of bytes, where the pair of the earliest merge rule merges first, the leftmost of equals.

The `tokenizers` package does the merging.  Tokens and merges are written in the byte alphabet: each byte is one printable character.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tokenizers.models import BPE

from quantscope.tokenizers.pretokenize import split
from quantscope.tokenizers.vocabulary import BYTE_TO_CHAR, Vocabulary

_CACHED_WORDS, _CACHED_LENGTH = 100_000, 64  # words kept, and the longest one [characters]


class BpeEncoder:
    """Text without special tokens → ids."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._row = vocabulary.pre_tokenizer
        self._index = vocabulary.index
        merges = list(dict.fromkeys(_pairs(vocabulary.merges)))  # of equal rules the first counts
        # llama.cpp merges whatever the rules name, also from and to strings that are no tokens.  Such strings get ids past the
        # vocabulary here, and end up as the single letters that are tokens.
        named = (text for left, right in merges for text in (left, right, left + right))
        strays = dict.fromkeys(text for text in (*BYTE_TO_CHAR.values(), *named) if text not in self._index)
        ids = {text: i for i, text in enumerate(strays, len(vocabulary.tokens))}
        self._letters = {i: [self._index[c] for c in text if c.isascii() and c in self._index] for text, i in ids.items()}
        self._bpe = BPE({token: i for token, i in self._index.items() if _is_text(token)} | ids, merges)
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


def _pairs(merges: Iterable[str]) -> Iterator[tuple[str, str]]:
    """The two sides of every rule; they are separated by the first space that is not the first character."""
    for rule in merges:
        cut = rule.find(" ", 1)
        if cut > 0 and _is_text(rule):
            yield rule[:cut], rule[cut + 1 :]


def _is_text(token: str) -> bool:
    """False for undecodable bytes of the file, which no text matches."""
    try:
        token.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
