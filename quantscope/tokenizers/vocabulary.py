"""The vocabulary in a GGUF file: ``tokenizer.ggml.*`` with llama.cpp's defaults for what is not there.

Source: ``llama_vocab::impl::load`` in src/llama-vocab.cpp, docs/gguf.md of the ggml repository.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from quantscope.errors import CorruptFileError, VocabularyError
from quantscope.language import english
from quantscope.sources.base import show
from quantscope.tokenizers.pretokenize import PRE_TOKENIZERS, PreTokenizer

Scores: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]
Ints: TypeAlias = np.ndarray[Any, np.dtype[np.signedinteger[Any]]]


@dataclass(frozen=True)
class Model:
    """One kind of vocabulary (``tokenizer.ggml.model``) and llama.cpp's defaults for what its file does not say."""

    what: str
    bos: int | None = None
    eos: int | None = None
    unk: int | None = None
    sep: int | None = None
    add_bos: bool = False
    add_eos: bool = False
    always_around: bool = False  # BOS and SEP go around every text, whatever add_bos and add_eos say
    add_space_prefix: bool = False
    clean_spaces: bool = False
    merges: bool = False
    spaces: bool = True  # tokens are text with ▁ for a space; otherwise they are in the byte alphabet


MODELS: Mapping[str, Model] = {
    "llama": Model("SentencePiece BPE with byte fallback", 1, 2, 0, add_bos=True, add_space_prefix=True),
    "gpt2": Model("byte-level BPE", 11, 11, clean_spaces=True, merges=True, spaces=False),
    "gemma4": Model("BPE over characters", add_bos=True, clean_spaces=True, merges=True),
    "bert": Model("WordPiece", 101, None, 100, 102, add_bos=True, always_around=True, clean_spaces=True),
    "t5": Model("SentencePiece unigram", None, 1, 2, add_eos=True),
}
_OWN_PRE = ("gemma4",)  # models that are their own pre-tokenizer

# The byte alphabet of `gpt2`: printable characters stand for themselves, the other bytes for U+0100 onward.
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
BYTE_TO_CHAR: Mapping[int, str] = {b: chr(b) for b in _PRINTABLE} | {
    b: chr(0x100 + i) for i, b in enumerate(b for b in range(256) if b not in _PRINTABLE)
}
CHAR_TO_BYTE: Mapping[str, int] = {char: b for b, char in BYTE_TO_CHAR.items()}


class Kind(IntEnum):
    """``tokenizer.ggml.token_type``."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# fmt: off
# Tokens that llama.cpp takes for control tokens whatever the file says: they end a generation or mark a fill-in-the-middle part.
_END_TOKENS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>", "<|endoftext|>", "</s>",
    "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>",
    "<｜end▁of▁sentence｜>", "[e~[",
)
_NORMAL_BESIDE: Mapping[str, str] = {"</s>": "<|tool_response>"}  # Gemma 4: plain text although it is an end token elsewhere
_FILL_TOKENS: Mapping[str, Sequence[str]] = {  # metadata key of the role → spellings; a role the file names itself is left alone
    "fim_pre": ("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>", "<|code_prefix|>", "<|prefix|>"),
    "fim_suf": ("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>", "<|code_suffix|>", "<|suffix|>"),
    "fim_mid": ("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>", "<|code_middle|>", "<|middle|>"),
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
# fmt: on
_OLD_FILL_KEYS = {"fim_pre": "prefix", "fim_suf": "suffix", "fim_mid": "middle"}
# gpt-oss and Solar: always visible, and <|end|> separates channels instead of ending the generation.
_SHOWN_TOKENS = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")
_END_IS_SHOWN = ({"<|return|>", "<|call|>"}, {"<|call|>", "<|flush|>"}, {"<|calls|>", "<|flush|>"})
_CORRECTED = {*_END_TOKENS, *_SHOWN_TOKENS, *(token for names in _FILL_TOKENS.values() for token in names)}
_SPACE_STAYS = ("<unk>", "<s>", "<|endoftext|>")  # Phi-3: special tokens swallow the white space after them, except these


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id, what each is, and the rules for the start and end of a text.

    stored_tokens: as in the file (▁ for a space in ``llama``, the byte alphabet in ``gpt2``), decoded when first used.
    stored_kinds: one Kind per token, empty when the file has none.  scores: float32, one per token, empty when the file has none.
    merges: "left right" in order of priority.
    """

    path: Path
    model: str  # a key of MODELS
    pre: str  # tokenizer.ggml.pre; a key of PRE_TOKENIZERS when it is supported
    stored_tokens: Sequence[str]
    stored_kinds: Ints
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool  # `llama`: a space goes before a text
    clean_spaces: bool  # decoded text loses spaces before punctuation
    strip_right: bool  # special tokens swallow the white space after them
    strip_left: str = ""  # the token that swallows the white space before it
    sep_id: int | None = None
    scores: Scores = field(default_factory=lambda: np.zeros(0, np.float32))
    merges: Sequence[str] = ()
    charsmap: bytes = b""  # `t5`: SentencePiece's compiled normalisation rules
    merge_spaces: bool = False  # `t5`: runs of spaces become one
    lower: bool = True  # `bert`
    strip_accents: bool = True  # `bert`
    fill_roles: frozenset[str] = frozenset()  # keys of _FILL_TOKENS that the file names itself
    notes: tuple[str, ...] = ()

    @cached_property
    def tokens(self) -> Sequence[str]:
        """The tokens; one without text gets the name llama.cpp gives it."""
        stored = list(self.stored_tokens)
        return [token or f"[EMPTY_{i}]" for i, token in enumerate(stored)] if "" in stored else stored

    @cached_property
    def index(self) -> Mapping[str, int]:
        """Token → id.  CorruptFileError when two ids share a token: the text could be encoded in two ways."""
        index = {token: i for i, token in enumerate(self.tokens)}
        if len(index) < len(self.tokens):
            twice = next(token for i, token in enumerate(self.tokens) if index[token] != i)
            raise CorruptFileError(
                f"{show(self.path)}: tokenizer.ggml.tokens holds {twice!r} twice, expected distinct tokens. llama.cpp refuses such a file: "
                f"convert the model again, or give token ids with `--tokens`."
            )
        return index

    @cached_property
    def kinds(self) -> Sequence[int]:
        """One Kind per token, with llama.cpp's corrections."""
        kinds: list[int] = self.stored_kinds.tolist() if len(self.stored_kinds) else [int(Kind.NORMAL)] * len(self.tokens)
        where = {token: i for i, token in enumerate(self.tokens) if token in _CORRECTED}
        fill = [next((n for n in names if n in where), "") for role, names in _FILL_TOKENS.items() if role not in self.fill_roles]
        shown = [*_SHOWN_TOKENS, *(["<|end|>"] if any(all(n in where for n in names) for names in _END_IS_SHOWN) else [])]
        for names, kind in ((_END_TOKENS, Kind.CONTROL), (fill, Kind.CONTROL), (shown, Kind.USER_DEFINED)):
            for i in (where[name] for name in names if name in where):
                kinds[i] = int(kind)
        for name, beside in _NORMAL_BESIDE.items():
            if name in where and beside in where:
                kinds[where[name]] = int(Kind.NORMAL)
        return kinds

    @cached_property
    def special(self) -> Mapping[int, bool]:
        """The tokens that are looked for in a text before it is cut, longest first → whether only ``parse_special`` finds them.

        Equally long ones go by id; llama.cpp's order among them is that of an unstable sort, and shows only where two overlap.
        """
        wanted = {Kind.CONTROL: True, Kind.UNKNOWN: True, Kind.USER_DEFINED: False}
        found = [(i, wanted[Kind(kind)]) for i, kind in enumerate(self.kinds) if kind in wanted]
        return dict(sorted(found, key=lambda item: -len(self.tokens[item[0]].encode("utf-8", "surrogateescape"))))

    def swallows_space(self, token: int) -> tuple[bool, bool]:
        """Whether the special token takes the white space before it and after it along."""
        return self.tokens[token] == self.strip_left, self.strip_right and self.tokens[token] not in _SPACE_STAYS

    @property
    def spaces(self) -> bool:
        """Whether tokens are text with ▁ for a space; otherwise they are in the byte alphabet."""
        return MODELS[self.model].spaces or (self.pre in PRE_TOKENIZERS and PRE_TOKENIZERS[self.pre].raw)

    @property
    def pre_tokenizer(self) -> PreTokenizer:
        """The row of the file's pre-tokenizer; VocabularyError when there is none."""
        if self.pre not in PRE_TOKENIZERS:
            known = ", ".join(sorted(PRE_TOKENIZERS))
            raise VocabularyError(
                f"{show(self.path)}: tokenizer.ggml.pre is {self.pre!r}, expected one of {known}. How this model cuts text into words is "
                f"not known here: get the ids from the model's own tokenizer and give them with `--tokens 1,2,3`."
            )
        return PRE_TOKENIZERS[self.pre]


def gguf_vocabulary(path: Path, metadata: Mapping[str, Any]) -> Vocabulary:
    """Read ``tokenizer.ggml.*``.

    Raises VocabularyError when the file has no vocabulary or one of another kind than MODELS, CorruptFileError when its lists disagree.
    """
    get = _Getter(path, metadata)
    model = get.text("model")
    if model not in MODELS:
        raise _no_vocabulary(path, model)
    tokens, kind = _strings(get, "tokens"), MODELS[model]
    n = len(tokens)
    pre, notes = _pre_name(path, model, get.text("pre"))
    row = PRE_TOKENIZERS.get(pre, PreTokenizer(())) if kind.merges else PreTokenizer((), clean_spaces=kind.clean_spaces)
    name = str(metadata.get("general.name", "")).lower()
    lower = get.flag("normalizer.lowercase", pre != "whitespace")
    return Vocabulary(
        path=path,
        model=model,
        pre=pre,
        stored_tokens=tokens,
        stored_kinds=get.numbers("token_type", n),
        bos_id=get.token("bos", None if row.no_bos else kind.bos, n),
        eos_id=get.token("eos", kind.eos, n),
        unk_id=get.token("unknown", kind.unk, n),
        sep_id=get.token("seperator", kind.sep, n),  # as GGUF spells it
        add_bos=model == "gemma4" or get.flag("add_bos_token", kind.add_bos or row.add_bos),
        add_eos=get.flag("add_eos_token", kind.add_eos),
        add_space_prefix=get.flag("add_space_prefix", kind.add_space_prefix),
        clean_spaces=row.clean_spaces,
        strip_right="phi-3" in name or "phi3" in name,
        strip_left=_strip_left(row, str(metadata.get("general.architecture", "")), name),
        scores=get.numbers("scores", n).astype(np.float32),
        merges=_strings(get, "merges") if kind.merges else (),
        charsmap=get.octets("precompiled_charsmap"),
        merge_spaces=get.flag("remove_extra_whitespaces", False),
        lower=lower,
        strip_accents=get.flag("normalizer.strip_accents", lower),
        fill_roles=frozenset(r for r in _FILL_TOKENS if any(get.has(k) for k in (f"{r}_token_id", f"{_OLD_FILL_KEYS.get(r, r)}_token_id"))),
        notes=notes,
    )


def _strip_left(row: PreTokenizer, arch: str, name: str) -> str:
    """The token that swallows the white space before it: of the pre-tokenizer, or by the names llama.cpp goes by."""
    if arch in ("nomic-bert-moe", "jina-bert-v3"):
        return "<mask>"
    return row.strip_left or ("[MASK]" if "modern-bert" in name else "")


@dataclass(frozen=True)
class _Getter:
    """``tokenizer.ggml.*`` by short name, with checks."""

    path: Path
    metadata: Mapping[str, Any]

    def text(self, key: str) -> str:
        value = self.metadata.get(f"tokenizer.ggml.{key}", "")
        return value if isinstance(value, str) else ""

    def has(self, key: str) -> bool:
        return f"tokenizer.ggml.{key}" in self.metadata

    def flag(self, key: str, default: bool) -> bool:
        return bool(self.metadata.get(f"tokenizer.ggml.{key}", default))

    def token(self, role: str, default: int | None, n: int) -> int | None:
        """The id of a special token; an id outside the vocabulary counts as absent, as in llama.cpp."""
        given = self.metadata.get(f"tokenizer.ggml.{role}_token_id", default)
        return next((i for i in (given, default) if isinstance(i, int) and 0 <= i < n), None)

    def octets(self, key: str) -> bytes:
        """A byte array, or nothing."""
        values = self.metadata.get(f"tokenizer.ggml.{key}")
        return values.tobytes() if isinstance(values, np.ndarray) and values.dtype.itemsize == 1 else b""

    def numbers(self, key: str, n: int) -> Any:
        """A numeric array with one entry per token, or an empty one when the key is absent."""
        values = self.metadata.get(f"tokenizer.ggml.{key}")
        if values is None:
            return np.zeros(0, np.float32)
        if not isinstance(values, np.ndarray) or len(values) < n:
            found = f"{len(values)} entries" if isinstance(values, np.ndarray) else type(values).__name__
            raise CorruptFileError(
                f"{show(self.path)}: tokenizer.ggml.{key} has {found}, expected {n} numbers, one per token. The vocabulary was damaged or "
                f"written by a faulty converter: convert the model again, or give token ids with `--tokens`."
            )
        return values[:n]


def _no_vocabulary(path: Path, model: str) -> VocabularyError:
    known = ", ".join(f"{name} ({kind.what})" for name, kind in MODELS.items())
    found = f"tokenizer.ggml.model is {model!r}" if model else "there is no tokenizer.ggml.model"
    return VocabularyError(
        f"{show(path)}: {found}, expected a vocabulary of the kind {known}. The file was written without its vocabulary, or the model "
        f"has a tokenizer of another kind: get the ids from the model's own tokenizer and give them with `--tokens 1,2,3`."
    )


def _strings(get: _Getter, key: str) -> Sequence[str]:
    values = get.metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(values, Sequence) or isinstance(values, str) or (key == "tokens" and not values):
        raise VocabularyError(
            f"{show(get.path)}: tokenizer.ggml.{key} is missing or empty, expected a list of strings. The vocabulary is incomplete: "
            f"convert the model again, or give token ids with `--tokens 1,2,3`."
        )
    return values


def _pre_name(path: Path, model: str, pre: str) -> tuple[str, tuple[str, ...]]:
    if model in _OWN_PRE:
        return model, ()
    if not MODELS[model].merges or pre:
        return pre, ()
    return "default", (
        english(
            "{path} names no pre-tokenizer (tokenizer.ggml.pre); 'default' is used, as llama.cpp does, and words are probably cut "
            "otherwise than in training: convert the model again with a current converter.",
            path=show(path),
        ),
    )
