"""Token ids → text, equal to llama.cpp's ``llama_detokenize``.

Source: ``token_to_piece`` and ``detokenize`` in src/llama-vocab.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from quantscope.tokenizers.vocabulary import CHAR_TO_BYTE, Kind, Vocabulary

_SPACE = "▁".encode()
_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")
# What clean_up_tokenization_spaces removes, one pass after the other: "a ." → "a.", "a ' b" → "a'b", "it 's" → "it's".
_CLEANING = (
    (re.compile(rb" ([?!.,])"), rb"\1"),
    (re.compile(rb" ' "), b"'"),
    (re.compile(rb" '(?=s|m|re|ve)"), b"'"),
)


class PieceDecoder:
    """The decoding half of a ``Tokenizer``; the tokens are read when first used."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.bos_id, self.eos_id, self.notes = vocabulary.bos_id, vocabulary.eos_id, vocabulary.notes
        self.add_bos = vocabulary.add_bos and vocabulary.bos_id is not None
        self.add_eos = vocabulary.add_eos and vocabulary.eos_id is not None
        self._pieces: dict[int, bytes] = {}

    @property
    def n_vocab(self) -> int:
        return len(self.vocabulary.stored_tokens)

    def decode(self, ids: Iterable[int], *, remove_special: bool = False, unparse_special: bool = False) -> str:
        return self.decode_bytes(ids, remove_special=remove_special, unparse_special=unparse_special).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int], *, remove_special: bool = False, unparse_special: bool = False) -> bytes:
        """As ``decode``, before the bytes are read as UTF-8."""
        v, tokens = self.vocabulary, list(ids)
        drop_space = v.add_space_prefix
        if remove_special and v.add_bos and tokens[:1] == [v.bos_id]:
            drop_space = False
            tokens = tokens[1:]
        if remove_special and v.add_eos and tokens[-1:] == [v.eos_id]:
            tokens = tokens[:-1]
        pieces = [self._piece(token, unparse_special) for token in tokens]
        if pieces and drop_space:
            pieces[0] = pieces[0].removeprefix(b" ")
        text = b"".join(pieces)
        if v.clean_spaces:
            for pattern, replacement in _CLEANING:
                text = pattern.sub(replacement, text)
        return text

    def piece(self, token: int) -> str:
        return self._piece(token, True).decode("utf-8", "replace")

    def _piece(self, token: int, special: bool) -> bytes:
        """The bytes one token stands for; none for control tokens unless ``special``."""
        if not 0 <= token < self.n_vocab:
            return f"[PAD{token}]".encode()
        kind = self.vocabulary.kinds[token]
        if kind in (Kind.CONTROL, Kind.UNKNOWN) and not special:
            return b""
        if token not in self._pieces:
            self._pieces[token] = token_bytes(self.vocabulary.tokens[token], kind, self.vocabulary.spaces)
        return self._pieces[token]


def token_bytes(text: str, kind: int, spaces: bool) -> bytes:
    """The bytes a token of this kind stands for, control tokens spelled out.

    spaces: the token is text with ▁ for a space; otherwise it is in the byte alphabet.
    """
    raw = text.encode("utf-8", "surrogateescape")
    if kind in (Kind.CONTROL, Kind.UNKNOWN, Kind.USER_DEFINED):
        return raw
    if kind == Kind.BYTE:
        return bytes.fromhex(text[3:5]) if _BYTE_TOKEN.fullmatch(text) else raw
    if kind != Kind.NORMAL:
        return b""
    if spaces:
        return raw.replace(_SPACE, b" ")
    return b"".join(_letter_bytes(letter, raw) for letter in raw.decode("utf-8", "replace"))


def _letter_bytes(letter: str, token: bytes) -> bytes:
    """One letter of the byte alphabet; any other becomes a mark that shows the token, as in llama.cpp."""
    if letter in CHAR_TO_BYTE:
        return bytes((CHAR_TO_BYTE[letter],))
    return b"[UNK_BYTE_0x" + letter.encode("utf-8").hex().encode() + token + b"]"
