"""Text ↔ ids with the vocabulary inside a GGUF file, equal to llama.cpp's ``llama_tokenize``.

    text → cut out special tokens → each stretch of plain text through the model's BPE → ids

Source: ``tokenizer_st_partition`` and ``tokenize`` in src/llama-vocab.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property

from quantscope.tokenizers.base import check_text
from quantscope.tokenizers.pieces import PieceDecoder
from quantscope.tokenizers.vocabulary import Vocabulary

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
        ids = [v.bos_id] if add_special and self.add_bos and v.bos_id is not None else []
        for part in self._partition(check_text(text), parse_special):
            ids += [part] if isinstance(part, int) else self._encoder(prefix + part)
        if add_special and self.add_eos and v.eos_id is not None:
            ids.append(v.eos_id)
        return ids

    def _partition(self, text: str, parse_special: bool) -> list[str | int]:
        """The text cut at its special tokens, longest tokens first: plain stretches as str, tokens as ids."""
        parts: list[str | int] = [text] if text else []
        for token, only_parsed in self.vocabulary.special.items():
            spelling = self.vocabulary.tokens[token]
            if (parse_special or not only_parsed) and spelling in text:
                strip = self.vocabulary.swallows_space(token)
                parts = [piece for part in parts for piece in (_cut(part, spelling, token, strip) if isinstance(part, str) else (part,))]
        return parts


def _cut(text: str, spelling: str, token: int, strip_right: bool) -> Iterator[str | int]:
    """The stretches between the occurrences of a token, and the token at each; empty stretches are left out."""
    start = 0
    while (hit := text.find(spelling, start)) >= 0:
        if start < hit:
            yield text[start:hit]
        yield token
        start = hit + len(spelling)
        while strip_right and start < len(text) and text[start] in _ASCII_SPACES:
            start += 1
    if start < len(text):
        yield text[start:]
