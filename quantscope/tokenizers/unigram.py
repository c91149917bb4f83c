"""``t5`` vocabularies: SentencePiece unigram models, where the tokens with the highest sum of scores are taken (Viterbi).

    text → characters replaced by the compiled rules → ▁ for spaces → best path over the tokens → ids

Everything runs over bytes, as in llama.cpp: its rules for user-defined tokens may cut inside a character.

Source: ``llm_tokenizer_ugm_session`` in src/llama-vocab.cpp; Kanda, "Space- and Time-Efficient String Dictionaries" (2018) for the
XOR-compressed double array.
"""

from __future__ import annotations

import numpy as np

from quantscope.errors import CorruptFileError
from quantscope.sources.base import show
from quantscope.tokenizers.vocabulary import Kind, Vocabulary

SPACE = "▁".encode()
_UNKNOWN_PENALTY = np.float32(10.0)
_MATCHED = (Kind.NORMAL, Kind.USER_DEFINED, Kind.UNUSED)
_NOWHERE = float(-np.finfo(np.float64).max)


class UnigramEncoder:
    """Text without special tokens → ids."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        kinds = vocabulary.stored_kinds.tolist() or [int(Kind.NORMAL)] * len(vocabulary.tokens)
        scores = vocabulary.scores.tolist() or [0.0] * len(vocabulary.tokens)
        names = [token.encode("utf-8", "surrogateescape") for token in vocabulary.index]
        self._index = {
            name: (i, 0.0 if kind == Kind.USER_DEFINED else score)
            for i, (name, kind, score) in enumerate(zip(names, kinds, scores, strict=True))
            if kind in _MATCHED
        }
        self._longest: dict[bytes, int] = {}  # first character → bytes of the longest token that starts with it
        for name in self._index:
            first = name[: _char_bytes(name[0])]
            self._longest[first] = max(self._longest.get(first, 0), len(name))
        normal = np.array([score for kind, score in zip(kinds, scores, strict=True) if kind == Kind.NORMAL] or [np.finfo("f4").max], "f4")
        self._unknown = (-1 if vocabulary.unk_id is None else vocabulary.unk_id, float(normal.min() - _UNKNOWN_PENALTY))
        self._rules = _Rules(vocabulary)
        user = (name for name, kind in zip(names, kinds, strict=True) if kind == Kind.USER_DEFINED)
        self._prefixes = {name[:n] for name in user for n in range(1, len(name) + 1)}

    def __call__(self, text: str) -> list[int]:
        return self._best_path(self._normalized(text.encode("utf-8")))

    def _normalized(self, text: bytes) -> bytes:
        """The replaced text with ▁ for spaces, one before the first word, runs of them merged where the file asks for it."""
        prefix, merge = self._vocabulary.add_space_prefix, self._vocabulary.merge_spaces
        out, started, in_word, at = bytearray(), False, False, 0
        while at < len(text):
            piece, used = self._replace(text, at)
            at += used
            for byte in piece:
                if byte != 0x20:
                    if not in_word and ((prefix and not started) or merge):
                        out += SPACE
                        started = True
                    in_word = True
                    out.append(byte)
                else:
                    in_word = False
                    out += b"" if merge else SPACE
        return bytes(out)

    def _replace(self, text: bytes, at: int) -> tuple[bytes, int]:
        """(what stands for the beginning of text[at:], bytes of it used)"""
        end = at
        while end < len(text) and text[at : end + 1] in self._prefixes:  # of user-defined tokens, also incomplete ones
            end += 1
        if end > at:
            return text[at:end], end - at
        found = self._rules.longest(text, at)
        if found is not None:
            return found
        if 0x80 <= text[at] < 0xC0:  # inside a character
            return "\ufffd".encode(), 1
        n = _char_bytes(text[at])
        return text[at : at + n], n

    def _best_path(self, text: bytes) -> list[int]:
        """argmax Σ score over the ways to write the text as tokens; a character in none costs the unknown score."""
        best: list[tuple[float, int, int]] = [(_NOWHERE, self._unknown[0], 0)] * (len(text) + 1)  # score, token, where it starts
        best[0] = (0.0, self._unknown[0], 0)
        index, at = self._index, 0
        while at < len(text):
            n = min(_char_bytes(text[at]), len(text) - at)
            score, covered = best[at][0], False
            for end in range(at + 1, min(len(text), at + self._longest.get(text[at : at + n], 0)) + 1):
                found = index.get(text[at:end])
                if found is not None:
                    covered = covered or end - at == n
                    if score + found[1] > best[end][0]:
                        best[end] = (score + found[1], found[0], at)
            if not covered and score + self._unknown[1] > best[at + n][0]:
                best[at + n] = (score + self._unknown[1], self._unknown[0], at)
            at += n
        return self._path(best) if text else []

    def _path(self, best: list[tuple[float, int, int]]) -> list[int]:
        """The tokens from the last back to the first; unknown ones in a row are one."""
        ids: list[int] = []
        at, after_unknown = len(best) - 1, False
        while True:
            _, token, start = best[at]
            unknown = token == self._unknown[0]
            if not (unknown and after_unknown):
                ids.append(token)
            if start == 0:
                break
            at, after_unknown = start, unknown
        return [token for token in reversed(ids) if token >= 0]


class _Rules:
    """SentencePiece's compiled replacements.

    size u32 | size bytes of nodes, u32 each | zero-terminated replacements
    a node:  bits 0-7 and 31: the byte that leads here   bit 8: it has a value   bits 10-30: offset of its children, ·256 if bit 9
             with bit 31: bits 0-30: start of the replacement
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        blob = vocabulary.charsmap
        size = int.from_bytes(blob[:4], "little")
        if blob and size + 4 >= len(blob):
            raise CorruptFileError(
                f"{show(vocabulary.path)}: tokenizer.ggml.precompiled_charsmap has {len(blob):,} bytes, expected more than {size + 4:,}. "
                f"The vocabulary was damaged: convert the model again, or give token ids with `--tokens`."
            )
        self._path = vocabulary.path
        self._nodes: list[int] = np.frombuffer(blob[4 : 4 + size // 4 * 4], "<u4").tolist()
        self._texts = blob[4 + size :]

    def longest(self, text: bytes, at: int) -> tuple[bytes, int] | None:
        """(replacement, bytes of the text it replaces) for the longest beginning of text[at:] that has one."""
        if not self._nodes:
            return None
        found = None
        try:
            node = _children(self._nodes[0])
            for end in range(at, len(text)):
                byte = text[end]
                node ^= byte
                if byte == 0 or self._nodes[node] & 0x800000FF != byte:
                    break
                has_value = self._nodes[node] >> 8 & 1
                node ^= _children(self._nodes[node])
                if has_value:
                    found = self._nodes[node] & 0x7FFFFFFF, end + 1 - at
            return None if found is None else (self._texts[found[0] : self._texts.index(0, found[0])], found[1])
        except (IndexError, ValueError):
            raise CorruptFileError(
                f"{show(self._path)}: tokenizer.ggml.precompiled_charsmap points past its end. The vocabulary was damaged: convert the "
                f"model again, or give token ids with `--tokens`."
            ) from None


def _children(node: int) -> int:
    return node >> 10 << ((node & 1 << 9) >> 6)


def _char_bytes(first: int) -> int:
    """Bytes of the UTF-8 character that starts with this one; 1 for a byte inside a character."""
    return (1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 3, 4)[first >> 4]
