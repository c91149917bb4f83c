"""Prompt, token ids or text → what walks through the model: ids [B,T] and the positions that are scored.

Text is cut as llama-perplexity cuts it: disjoint chunks of n_ctx tokens, the first token of each replaced by BOS where the
vocabulary adds one, positions n_ctx/2 … n_ctx − 2 scored.  Source: tools/perplexity/perplexity.cpp of llama.cpp.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quantscope.arch.config import ModelConfig
from quantscope.errors import MissingFileError, PromptError, QuantscopeError, UsageError
from quantscope.results import DEFAULT_PROMPT, PromptInfo, StudyOptions, TextInfo
from quantscope.sources.base import Source
from quantscope.sources.resolve import open_source
from quantscope.tokenizers import Tokenizer, check_ids, from_source

STDIN, STDIN_NAME = Path("-"), "standard input"


@dataclass(frozen=True)
class Input:
    """ids [B,T] int64; the positions first … last − 1 of each row are scored; what the report says about them.

    as_given: a text's ids before the first of each row became BOS, which is what files of other programs hold.  sha256: of a text.
    """

    ids: Tensor
    first: int
    last: int
    info: PromptInfo | TextInfo
    as_given: Tensor | None = None
    sha256: str | None = None

    @property
    def name(self) -> str:
        return "text" if self.labelled else "prompt"

    @property
    def labelled(self) -> bool:
        """Whether the token after each scored position counts (a text), or only the distribution (a prompt)."""
        return isinstance(self.info, TextInfo)


@dataclass(frozen=True)
class Inputs:
    """A prompt, a text or both, and the vocabulary (None: ids were given and the file has none)."""

    prompt: Input | None
    text: Input | None
    tokenizer: Tokenizer | None


def read_inputs(options: StudyOptions, source: Source, config: ModelConfig) -> Inputs:
    """What the options ask to run.

    Raises UsageError, PromptError (empty, too long, ids out of range, no vocabulary) and MissingFileError.
    """
    if options.prompt is not None and options.tokens is not None:
        raise UsageError("`--prompt` and `--tokens` both say what to run: give one of them.")
    ids_only = options.tokens is not None and options.text is None
    tokenizer = _tokenizer_or_none(source) if ids_only else from_source(source)
    text = None
    if options.text is not None:
        assert tokenizer is not None
        text = _text(options, options.text, tokenizer, config)
    if options.tokens is not None:
        return Inputs(_prompt(None, list(options.tokens), options, tokenizer, config), text, tokenizer)
    if text is not None and options.prompt is None:
        return Inputs(None, text, tokenizer)
    assert tokenizer is not None
    words = DEFAULT_PROMPT if options.prompt is None else options.prompt
    return Inputs(_prompt(words, tokenizer.encode(words) if words else [], options, tokenizer, config), text, tokenizer)


def prompt_ids(model: str, words: str | None = None) -> list[int]:
    """The token ids of a prompt in the vocabulary of a model file; DEFAULT_PROMPT for None.  Raises what opening the file raises."""
    source = open_source(model)
    try:
        return from_source(source).encode(DEFAULT_PROMPT if words is None else words)
    finally:
        source.close()


def _tokenizer_or_none(source: Source) -> Tokenizer | None:
    """Ids were given: a vocabulary only adds the text beside them."""
    try:
        return from_source(source)
    except QuantscopeError:
        return None


def _prompt(words: str | None, ids: list[int], options: StudyOptions, tokenizer: Tokenizer | None, config: ModelConfig) -> Input:
    check_ids(ids, config.n_vocab, config.n_ctx)
    pieces = tuple(tokenizer.piece(i) for i in ids) if tokenizer else ()
    info = PromptInfo(text=words, ids=tuple(ids), positions=options.positions, pieces=pieces)
    first = len(ids) - 1 if options.positions == "last" else 0
    return Input(torch.tensor([ids]), first, len(ids), info)


def _text(options: StudyOptions, path: Path, tokenizer: Tokenizer, config: ModelConfig) -> Input:
    raw, n = read_bytes(path), options.n_ctx
    where = text_name(path)
    if not 8 <= n <= config.n_ctx:
        raise UsageError(
            f"--ctx {n}: expected 8 to {config.n_ctx}, the context the model was trained for. Give `--ctx {min(512, config.n_ctx)}`."
        )
    if options.n_chunks is not None and options.n_chunks < 1:
        raise UsageError(f"--chunks {options.n_chunks}: expected at least 1. Leave it out to use the whole text.")
    ids = tokenizer.encode(decoded(raw, where))
    if len(ids) < 2 * n:
        raise PromptError(
            f"{where}: the text has {len(ids)} tokens, expected at least {2 * n}, two chunks of {n}. Give a longer text, or smaller chunks "
            f"with `--ctx {max(8, len(ids) // 2)}`."
        )
    given = torch.tensor(ids[: len(ids) // n * n]).reshape(-1, n)[: options.n_chunks]  # [B,T]
    rows = given.clone()
    if tokenizer.add_bos and tokenizer.bos_id is not None:
        rows[:, 0] = tokenizer.bos_id
    first, last = n // 2 if options.scoring == "llama.cpp" else 0, n - 1
    scored = len(rows) * (last - first)
    info = TextInfo(where, n_tokens=len(ids), n_ctx=n, n_chunks=len(rows), n_scored=scored, scoring=options.scoring)
    return Input(rows, first, last, info, given, hashlib.sha256(raw).hexdigest())


def text_name(path: Path) -> str:
    """How a report calls the text."""
    return STDIN_NAME if path == STDIN else str(path)


def read_bytes(path: Path) -> bytes:
    """The file, or for ``-`` what standard input holds; MissingFileError."""
    if path == STDIN:
        return sys.stdin.buffer.read()
    try:
        return path.read_bytes()
    except OSError as e:
        raise MissingFileError(
            f"{path}: expected a readable UTF-8 text file: {e.strerror}. Check the path; `quantscope demo` runs without one."
        ) from e


def decoded(raw: bytes, where: str) -> str:
    """UTF-8 text; PromptError with the byte offset of what is not UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as e:
        raise PromptError(
            f"{where}: byte {e.start:,} (0x{raw[e.start]:02x}) is not UTF-8 text. The file is binary or in another encoding: convert it "
            f"with `iconv -f LATIN1 -t UTF-8 {where if where != STDIN_NAME else 'FILE'}`."
        ) from e
