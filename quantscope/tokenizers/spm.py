"""``llama`` vocabularies: SentencePiece BPE, where the pair whose token has the highest score merges first, the leftmost of equals.

The `sentencepiece` package does the merging, on a model made from the GGUF's tokens and scores.  Every token is a plain piece there,
because llama.cpp lets control, byte and unused tokens take part in merges like any other; special tokens are cut out beforehand.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

import sentencepiece

from quantscope.errors import CorruptFileError
from quantscope.sources.base import show
from quantscope.tokenizers.vocabulary import Vocabulary

SPACE = "▁"
BPE = 2  # TrainerSpec.model_type
UNKNOWN = 2  # ModelProto.SentencePiece.type
# A model needs one piece for the unknown; no text holds the byte 0xFF, so this one takes part in nothing.
_UNKNOWN_PIECE = b"\xff"


class SpmEncoder:
    """Text without special tokens → ids."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._index = vocabulary.index
        unknown = [] if vocabulary.unk_id is None else [vocabulary.unk_id]
        self._bytes = [[self._index[name]] if (name := f"<0x{b:02X}>") in self._index else unknown for b in range(256)]
        scores = vocabulary.scores.tolist() or [0.0] * len(vocabulary.tokens)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model_proto(vocabulary.tokens, scores))
        except RuntimeError as error:
            raise CorruptFileError(
                f"{show(vocabulary.path)}: sentencepiece refuses the vocabulary ({error}). It was damaged or written by a faulty converter: "
                f"convert the model again, or give token ids with `--tokens`."
            ) from None

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in self._processor.encode(text.replace(" ", SPACE), out_type=str):
            token = self._index.get(piece)
            if token is None:  # characters of no token, as bytes
                for byte in piece.encode("utf-8"):
                    ids += self._bytes[byte]
            else:
                ids.append(token)
        return ids


def model_proto(tokens: Sequence[str], scores: Sequence[float]) -> bytes:
    """A serialised ``sentencepiece.ModelProto``: BPE, no normalisation, the tokens in order and one unknown piece after them.

    Field numbers as in sentencepiece_model.proto: pieces 1 {piece 1, score 2, type 3}, trainer_spec 2 {model_type 3},
    normalizer_spec 3 {name 1, add_dummy_prefix 3, remove_extra_whitespaces 4, escape_whitespaces 5}.
    """
    pieces = [_bytes_field(1, piece) for piece in _pieces(tokens, scores)]
    unknown = _bytes_field(1, _bytes_field(1, _UNKNOWN_PIECE) + _varint_field(3, UNKNOWN))
    trainer = _bytes_field(2, _varint_field(3, BPE))
    normalizer = _bytes_field(3, _bytes_field(1, b"identity") + _varint_field(3, 0) + _varint_field(4, 0) + _varint_field(5, 0))
    return b"".join((*pieces, unknown, trainer, normalizer))


def _pieces(tokens: Sequence[str], scores: Sequence[float]) -> Iterator[bytes]:
    for token, score in zip(tokens, scores, strict=True):
        yield _bytes_field(1, token.encode("utf-8", "surrogateescape")) + struct.pack("<Bf", 2 << 3 | 5, score)


def _bytes_field(number: int, value: bytes) -> bytes:
    return bytes((number << 3 | 2,)) + _varint(len(value)) + value  # tag: field number, wire type in the low 3 bits


def _varint_field(number: int, value: int) -> bytes:
    return bytes((number << 3,)) + _varint(value)


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the top bit says that more follow."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
