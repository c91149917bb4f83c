"""Text ↔ ids with the vocabulary inside a GGUF file, equal to llama.cpp's ``llama_tokenize``.

    text → cut out special tokens → each stretch of plain text through the model's encoder → ids

Source: ``tokenizer_st_partition`` and ``tokenize`` in src/llama-vocab.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property

from quantscope.tokenizers.base import check_text
from quantscope.tokenizers.pieces import PieceDecoder
from quantscope.tokenizers.vocabulary import MODELS, Vocabulary

_ASCII_SPACES = " \t\n\v\f\r"


class GgmlTokenizer(PieceDecoder):
    """See ``tokenizers.base.Tokenizer``; the vocabulary is read and the encoder built when first used."""

    def __init__(self, vocabulary: Vocabulary, make_encoder: Callable[[Vocabulary], Callable[[str], list[int]]]) -> None:
        super().__init__(vocabulary)
        self._make_encoder = make_encoder

    @cached_property
    def _encoder(self) -> Callable[[str], list[int]]:
        return self._make_encoder(self.vocabulary)

    def encode(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        v = self.vocabulary
        prefix = " " if v.model == "llama" and v.add_space_prefix else ""  # every plain stretch starts the text or follows a special token
        first, last = self._around() if add_special else ([], [])
        ids = [*first]
        for part in self._partition(check_text(text), parse_special):
            ids += [part] if isinstance(part, int) else self._encoder(prefix + part)
        return [*ids, *last]

    def _around(self) -> tuple[list[int], list[int]]:
        """The tokens before and after a text."""
        v = self.vocabulary
        if MODELS[v.model].always_around:
            return [v.bos_id] if v.bos_id is not None else [], [v.sep_id] if v.sep_id is not None else []
        return [v.bos_id] if self.add_bos and v.bos_id is not None else [], [v.eos_id] if self.add_eos and v.eos_id is not None else []

    def _partition(self, text: str, parse_special: bool) -> list[str | int]:
        """The text cut at its special tokens, longest tokens first: plain stretches as str, tokens as ids."""
        parts: list[str | int] = [text] if text else []
        for token, only_parsed in self.vocabulary.special.items():
            spelling = self.vocabulary.tokens[token]
            if (parse_special or not only_parsed) and spelling in text:
                strip = self.vocabulary.swallows_space(token)
                parts = [piece for part in parts for piece in (_cut(part, spelling, token, strip) if isinstance(part, str) else (part,))]
        return parts


def _cut(text: str, spelling: str, token: int, strip: tuple[bool, bool]) -> Iterator[str | int]:
    """The stretches between the occurrences of a token, and the token at each; empty stretches are left out.

    strip: whether the token swallows the white space before it, and after it.
    """
    strip_left, strip_right = strip
    start = 0
    while (hit := text.find(spelling, start)) >= 0:
        before = text[start:hit].rstrip(_ASCII_SPACES) if strip_left else text[start:hit]
        if before:
            yield before
        yield token
        start = hit + len(spelling)
        while strip_right and start < len(text) and text[start] in _ASCII_SPACES:
            start += 1
    if start < len(text):
        yield text[start:]
