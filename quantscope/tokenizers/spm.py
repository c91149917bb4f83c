"""``llama`` vocabularies: SentencePiece BPE, where the pair whose token has the highest score merges first, the leftmost of equals.

The `sentencepiece` package does the merging, on a model made from the GGUF's tokens and scores.  Every token is a plain piece there,
because llama.cpp lets control, byte and unused tokens take part in merges like any other; special tokens are cut out beforehand.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece

from quantscope.errors import CorruptFileError, VocabularyError
from quantscope.sources.base import show
from quantscope.sources.files import raise_os_error
from quantscope.tokenizers.vocabulary import Kind, Vocabulary

SPACE = "▁"
BPE, UNIGRAM = 2, 1  # TrainerSpec.model_type; the default is unigram


@dataclass(frozen=True)
class SpmModel:
    """What a tokenizer.model says: pieces by id, their scores and kinds (GGUF has taken over their numbers)."""

    tokens: Sequence[str]
    scores: Sequence[float]
    kinds: Sequence[int]
    add_space_prefix: bool


class SpmEncoder:
    """Text without special tokens → ids."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        index = vocabulary.index
        unknown = () if vocabulary.unk_id is None else (vocabulary.unk_id,)
        self._bytes = [(index[name],) if (name := f"<0x{b:02X}>") in index else unknown for b in range(256)]
        self._unknown = len(vocabulary.tokens)  # the piece after them
        scores = vocabulary.scores.tolist() or [0.0] * len(vocabulary.tokens)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model_proto(vocabulary.tokens, scores))
        except (RuntimeError, ValueError) as error:  # ValueError: its message is no UTF-8
            raise CorruptFileError(
                f"{show(vocabulary.path)}: sentencepiece refuses the vocabulary ({error}). It was damaged or written by a faulty "
                f"converter: convert the model again, or give token ids with `--tokens`."
            ) from None

    def __call__(self, text: str) -> list[int]:
        text = text.replace(" ", SPACE)
        ids: list[int] = self._processor.encode(text)
        if self._unknown not in ids:
            return ids
        out: list[int] = []  # a run of characters that are no tokens is one unknown piece: write its bytes
        for token, piece in zip(ids, self._processor.encode(text, out_type=str), strict=True):
            out += (i for byte in piece.encode("utf-8") for i in self._bytes[byte]) if token == self._unknown else (token,)
        return out


# The Protocol Buffers fields used here, as numbered in sentencepiece_model.proto:
#   ModelProto: pieces 1 {piece 1, score 2, type 3}, trainer_spec 2 {model_type 3},
#   normalizer_spec 3 {name 1, add_dummy_prefix 3, remove_extra_whitespaces 4, escape_whitespaces 5}.


def model_proto(tokens: Sequence[str], scores: Sequence[float]) -> bytes:
    """A serialised ``ModelProto``: BPE, no normalisation, the tokens in order and one unknown piece after them."""
    pieces = [_bytes_field(1, piece) for piece in _pieces(tokens, scores)]
    nowhere = b"\xff" * (1 + max(map(len, tokens)))  # a model needs an unknown piece: this one is no token, and in no text
    unknown = _bytes_field(1, _bytes_field(1, nowhere) + _varint_field(3, Kind.UNKNOWN))
    trainer = _bytes_field(2, _varint_field(3, BPE))
    normalizer = _bytes_field(3, _bytes_field(1, b"identity") + _varint_field(3, 0) + _varint_field(4, 0) + _varint_field(5, 0))
    return b"".join((*pieces, unknown, trainer, normalizer))


def read_model(path: Path) -> SpmModel:
    """Read a tokenizer.model.  VocabularyError when it is none, or no BPE model."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise_os_error(path, error)
    try:
        fields = list(_fields(data))
        pieces = [dict(_fields(value)) for number, value in fields if number == 1]
        (trainer,) = [dict(_fields(value)) for number, value in fields if number == 2]
        normalizer = dict(item for number, value in fields if number == 3 for item in _fields(value))
        tokens = [piece[1].decode("utf-8", "surrogateescape") for piece in pieces]
        scores = [struct.unpack("<f", piece.get(2, bytes(4)))[0] for piece in pieces]
        kinds = [Kind(piece.get(3, Kind.NORMAL)) for piece in pieces]
    except (IndexError, KeyError, ValueError, TypeError, AttributeError, struct.error):
        raise VocabularyError(
            f"{show(path)}: not a SentencePiece model. It is damaged, a Git LFS pointer, or of another kind (tiktoken): fetch it again, or "
            f"fetch tokenizer.json beside it, or give token ids with `--tokens 1,2,3`."
        ) from None
    if trainer.get(3, UNIGRAM) != BPE:
        raise VocabularyError(
            f"{show(path)}: a SentencePiece model of type {trainer.get(3, UNIGRAM)}, expected {BPE} (BPE). Unigram and word models are not "
            f"supported: save the tokenizer as tokenizer.json with Transformers, or give token ids with `--tokens 1,2,3`."
        )
    return SpmModel(tokens, scores, kinds, bool(normalizer.get(3, 1)))


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a message: int for varints, bytes for everything else."""
    pos = 0
    while pos < len(message):
        tag, pos = _read_varint(message, pos)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == 0:
            value, pos = _read_varint(message, pos)
            yield number, value
            continue
        length, pos = ({1: 8, 5: 4}[wire_type], pos) if wire_type != 2 else _read_varint(message, pos)
        if pos + length > len(message):
            raise ValueError("the message ends inside a field")
        yield number, message[pos : pos + length]
        pos += length


def _read_varint(message: bytes, pos: int) -> tuple[int, int]:
    """(value, position after it)"""
    value = shift = 0
    while message[pos] & 0x80:
        value |= (message[pos] & 0x7F) << shift
        shift += 7
        pos += 1
    return value | message[pos] << shift, pos + 1


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
