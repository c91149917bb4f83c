"""llama.cpp's own tokenizer as an oracle, and the writing of vocabulary-only GGUF files to ask it about.

with LlamaVocab(path) as llama:
    llama.encode("text", add_special=True, parse_special=False)      # llama_tokenize
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import gguf
import llama_cpp
import numpy as np

MAX_PIECE = 4096  # [bytes]


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, data: Any) -> None:
    """llama.cpp writes pages to stderr for every vocabulary it loads."""


class LlamaVocab:
    """The vocabulary of one GGUF file."""

    def __init__(self, path: Path) -> None:
        llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        assert self._model, f"llama.cpp cannot load {path}"
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.n_vocab: int = llama_cpp.llama_vocab_n_tokens(self._vocab)

    def __enter__(self) -> LlamaVocab:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        llama_cpp.llama_model_free(self._model)

    def encode(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        data = text.encode("utf-8")
        room = len(data) + 16
        ids = (llama_cpp.llama_token * room)()
        n = llama_cpp.llama_tokenize(self._vocab, data, len(data), ids, room, add_special, parse_special)
        assert n >= 0
        return list(ids[:n])

    def decode(self, ids: Sequence[int], remove_special: bool, unparse_special: bool) -> bytes:
        room = 64 + MAX_PIECE * len(ids)
        text = ctypes.create_string_buffer(room)
        array = (llama_cpp.llama_token * max(1, len(ids)))(*ids)
        n = llama_cpp.llama_detokenize(self._vocab, array, len(ids), text, room, remove_special, unparse_special)
        assert n >= 0
        return text.raw[:n]

    def piece(self, token: int) -> bytes:
        text = ctypes.create_string_buffer(MAX_PIECE)
        n = llama_cpp.llama_token_to_piece(self._vocab, token, text, MAX_PIECE, 0, True)
        assert n >= 0
        return text.raw[:n]


def write_vocabulary(path: Path, model: str, tokens: Sequence[str], name: str = "test", **keys: Any) -> Path:
    """A GGUF file of the llama architecture without tensors.

    keys: ``tokenizer.ggml.<key>``; str, bool and int become values, a sequence becomes an array of its first element's type.
    """
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model(model)
    writer.add_token_list(list(tokens))
    add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}
    for key, value in keys.items():
        (add.get(type(value)) or writer.add_array)(f"tokenizer.ggml.{key}", value.tolist() if isinstance(value, np.ndarray) else value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path
