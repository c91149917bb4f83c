"""Text ↔ ids with the tokenizer files of a Hugging Face folder.

tokenizer.json runs in the `tokenizers` package, its post-processor included.  A folder with tokenizer.model only is read as the
converter of llama.cpp reads it, so that its ids are those of the GGUF file made from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from quantscope.errors import VocabularyError
from quantscope.language import english
from quantscope.sources.base import show
from quantscope.sources.files import read_json_object
from quantscope.tokenizers.base import Tokenizer, check_text
from quantscope.tokenizers.ggml import GgmlTokenizer
from quantscope.tokenizers.pieces import PieceDecoder
from quantscope.tokenizers.spm import SpmEncoder, read_model
from quantscope.tokenizers.vocabulary import Kind, Vocabulary

CONFIG = "tokenizer_config.json"
_MAX_TOKENS = 1 << 24  # a vocab_size beyond it is a damaged config.json


def folder_tokenizer(folder: Path, config: Mapping[str, Any]) -> Tokenizer:
    """tokenizer.json if there is one, else tokenizer.model.

    config: the model's config.json.  Raises VocabularyError when there is neither, or the file cannot be used.
    """
    settings = read_json_object(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if (folder / "tokenizer.json").is_file():
        return JsonTokenizer(folder / "tokenizer.json", settings, config)
    if (folder / "tokenizer.model").is_file():
        return GgmlTokenizer(model_vocabulary(folder, settings, config), SpmEncoder)
    raise VocabularyError(
        f"{show(folder)}: neither tokenizer.json nor tokenizer.model, expected one of them. They were not fetched, or the tokenizer is "
        f"kept in another form: save it with Transformers, `AutoTokenizer.from_pretrained(folder).save_pretrained(folder)`, or give token "
        f"ids with `--tokens 1,2,3`."
    )


class JsonTokenizer(PieceDecoder):
    """tokenizer.json through the `tokenizers` package; decoding as for a GGUF file."""

    def __init__(self, path: Path, settings: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises plain Exception
            raise VocabularyError(
                f"{show(path)}: the tokenizers package cannot read it ({error}). The file is damaged, or written by a newer version of "
                f"that package: fetch it again, or give token ids with `--tokens 1,2,3`."
            ) from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        super().__init__(_json_vocabulary(path, self._tokenizer, settings, config))

    def encode(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        self._tokenizer.encode_special_tokens = not parse_special
        return self._tokenizer.encode(check_text(text), add_special_tokens=add_special).ids


def _json_vocabulary(path: Path, tokenizer: tokenizers.Tokenizer, settings: Mapping[str, Any], config: Mapping[str, Any]) -> Vocabulary:
    index = tokenizer.get_vocab(with_added_tokens=True)
    added = {i: Kind.CONTROL if token.special else Kind.USER_DEFINED for i, token in tokenizer.get_added_tokens_decoder().items()}
    by_bytes = "ByteLevel" in repr(tokenizer.decoder)
    n = max(index.values(), default=-1) + 1
    tokens, kinds = [""] * n, np.full(n, Kind.UNUSED, np.int32)  # ids may have gaps
    for token, i in index.items():
        tokens[i] = token
        kinds[i] = added.get(i, Kind.NORMAL if by_bytes or not _is_byte(token) else Kind.BYTE)
    bos, eos = (_special_id(role, index, settings, config) for role in ("bos", "eos"))
    around = tokenizer.encode("", add_special_tokens=True).ids
    first = tokenizer.encode("a", add_special_tokens=False).tokens[:1]
    return Vocabulary(
        path=path,
        model="gpt2" if by_bytes else "llama",
        pre="",
        stored_tokens=tokens,
        stored_kinds=kinds,
        bos_id=bos,
        eos_id=eos,
        unk_id=None,
        add_bos=around[:1] == [bos],
        add_eos=around[-1:] == [eos],
        add_space_prefix=bool(first) and first[0].startswith("▁"),
        clean_spaces=bool(settings.get("clean_up_tokenization_spaces", False)),
        strip_right=False,
        notes=_bos_note(path, bool(settings.get("add_bos_token")), around[:1] == [bos]),
    )


def _bos_note(path: Path, wanted: bool, added: bool) -> tuple[str, ...]:
    if not wanted or added:
        return ()
    return (
        english(
            "{path} adds no BOS token although {config} has add_bos_token: true; it is followed, as Transformers 5 does, and the GGUF file "
            "of this model may add one.",
            path=show(path),
            config=CONFIG,
        ),
    )


def _is_byte(token: str) -> bool:
    """<0x00> to <0xFF>"""
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">") and all(c in "0123456789ABCDEF" for c in token[3:5])


def _special_id(role: str, index: Mapping[str, int], settings: Mapping[str, Any], config: Mapping[str, Any]) -> int | None:
    """The id of BOS or EOS: by its text in tokenizer_config.json, else by its id (the first of several) in config.json."""
    text = settings.get(f"{role}_token")
    text = text.get("content") if isinstance(text, dict) else text
    if isinstance(text, str) and text in index:
        return index[text]
    given = config.get(f"{role}_token_id")
    given = given[0] if isinstance(given, list) and given else given
    return given if isinstance(given, int) and given >= 0 else None


def model_vocabulary(folder: Path, settings: Mapping[str, Any], config: Mapping[str, Any]) -> Vocabulary:
    """tokenizer.model, filled up to the size in config.json, with the added tokens on top."""
    path = folder / "tokenizer.model"
    model = read_model(path)
    size = config.get("vocab_size")
    n = size if isinstance(size, int) and 0 < size <= _MAX_TOKENS else len(model.tokens)
    tokens = [*model.tokens[:n], *(f"[PAD{i}]" for i in range(len(model.tokens), n))]
    kinds = np.full(n, Kind.UNUSED, np.int32)
    scores = np.full(n, -10000.0, np.float32)
    kinds[: len(model.kinds)], scores[: len(model.scores)] = model.kinds[:n], model.scores[:n]
    for i, (token, kind) in added_tokens(folder, settings).items():
        if i < n:
            tokens[i], kinds[i] = token, kind
    index = {token: i for i, token in enumerate(tokens)}
    return Vocabulary(
        path=path,
        model="llama",
        pre="",
        stored_tokens=tokens,
        stored_kinds=kinds,
        bos_id=_special_id("bos", index, settings, config),
        eos_id=_special_id("eos", index, settings, config),
        unk_id=next(iter(np.flatnonzero(kinds == Kind.UNKNOWN).tolist()), None),
        add_bos=bool(settings.get("add_bos_token", True)),  # the default of Transformers' Llama tokenizer
        add_eos=bool(settings.get("add_eos_token", False)),
        add_space_prefix=model.add_space_prefix,
        clean_spaces=False,
        strip_right=False,
        scores=scores,
    )


def added_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[int, tuple[str, Kind]]:
    """Id → (token, kind) of what added_tokens.json and tokenizer_config.json put on top of the SentencePiece model."""
    path = folder / "added_tokens.json"
    plain = read_json_object(path) if path.is_file() else {}
    added = {i: (token, Kind.USER_DEFINED) for token, i in plain.items() if isinstance(i, int) and i >= 0}
    decoder = settings.get("added_tokens_decoder")
    for key, entry in decoder.items() if isinstance(decoder, dict) else ():
        if key.isdecimal() and isinstance(entry, dict) and isinstance(entry.get("content"), str):
            text = entry["content"]
            added[int(key)] = (text, Kind.CONTROL) if entry.get("special") else (text.replace("▁", " "), Kind.USER_DEFINED)
    return added
