"""``bert`` vocabularies: words, each cut from the left into the longest tokens; a word that cannot be cut is one unknown token.

A token that starts a word is stored with ▁ before it.

Source: ``llm_tokenizer_wpm_session`` in src/llama-vocab.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator

from quantscope.tokenizers.characters import CLASS_BYTE, classes, lower_case, without_accents
from quantscope.tokenizers.vocabulary import Vocabulary

SPACE = "▁".encode()
_CODE = {name: CLASS_BYTE[name] for name in "WCMPS"}
_REPLACEMENT = 0xFFFD
# The ideographs that BERT's own tokenizer takes for words; the gap before 0x2B920 is Hugging Face's.
_IDEOGRAPHS = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B920, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)


class WordPieceEncoder:
    """Text without special tokens → ids."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._lower, self._strip_accents = vocabulary.lower, vocabulary.strip_accents
        self._index = {token.encode("utf-8", "surrogateescape"): i for token, i in vocabulary.index.items()}
        self._longest = max(map(len, self._index))  # [bytes]
        self._unknown = [] if vocabulary.unk_id is None else [vocabulary.unk_id]
        self._words: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = []
        for word in self._split(text):
            if word not in self._words:
                self._words[word] = self._pieces(SPACE + word.encode("utf-8"))
            ids += self._words[word]
        return ids

    def _split(self, text: str) -> Iterator[str]:
        """Words in lower case without accents; punctuation and ideographs are words of one character, controls are dropped."""
        table, lower, word = classes(), lower_case(), ""
        for char in text:
            char = without_accents(char) if self._strip_accents else char
            code = ord(char)
            kind = table[code]
            if kind == _CODE["W"]:
                if word:
                    yield word
                word = ""
            elif code in (0, _REPLACEMENT) or kind == _CODE["C"] or (self._strip_accents and kind == _CODE["M"]):
                continue
            else:
                alone = kind == _CODE["P"] or (code < 0x7F and kind == _CODE["S"]) or any(a <= code <= b for a, b in _IDEOGRAPHS)
                char = chr(lower.get(code, code)) if self._lower else char
                if alone:
                    yield from (word, char) if word else (char,)
                    word = ""
                else:
                    word += char
        if word:
            yield word

    def _pieces(self, word: bytes) -> list[int]:
        ids, start = [], 0
        while start < len(word):
            for end in range(min(len(word), start + self._longest), start, -1):
                if (token := self._index.get(word[start:end])) is not None:
                    ids.append(token)
                    start = end
                    break
            else:
                return self._unknown
        return ids
