"""What a tokenizer is to the rest of the program, and the checks on what goes into it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from quantscope.errors import PromptError


class Tokenizer(Protocol):
    """Text ↔ token ids, with the vocabulary of one model."""

    @property
    def n_vocab(self) -> int:
        """Tokens in the vocabulary; a model's embedding may have more rows (padding)."""

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_id(self) -> int | None: ...

    @property
    def add_bos(self) -> bool:
        """Whether ``encode(..., add_special=True)`` starts with BOS."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on what the file leaves open and how it was read; for the report."""

    def encode(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of a text.

        add_special: BOS and EOS as the file asks for.  parse_special: control tokens spelled out in the text become that token;
        otherwise they are plain text.  User-defined tokens are always recognised.
        Raises PromptError for a text with lone surrogates, VocabularyError when the file's kind of tokenizer is unknown.
        """

    def decode(self, ids: Iterable[int], *, remove_special: bool = False, unparse_special: bool = False) -> str:
        """Text of token ids; bytes that are no complete UTF-8 character become U+FFFD.

        remove_special: drop the BOS and EOS that ``encode`` adds.  unparse_special: spell control tokens out instead of leaving them out.
        """

    def piece(self, token: int) -> str:
        """One token for display, control tokens spelled out; ``[PAD<id>]`` for an id past the vocabulary."""


def check_ids(ids: Sequence[int], n_vocab: int, n_ctx: int | None = None) -> list[int]:
    """The ids as a list of int when they can be run.

    Raises PromptError when there are none, when one is no integer or outside 0 ≤ id < n_vocab, or when there are more than n_ctx.
    """
    if len(ids) == 0:
        raise PromptError(
            "the prompt is empty: expected at least one token, found none. The text has no characters and the vocabulary adds no BOS, "
            "or the list of ids is empty: give a text with `--prompt TEXT`, or ids with `--tokens 1,2,3`."
        )
    out = []
    for position, value in enumerate(ids):
        try:
            token = value.__index__()
        except AttributeError:
            raise PromptError(
                f"token {position} of the prompt is {value!r}, expected an integer. Give the ids separated by commas: `--tokens 1,2,3`."
            ) from None
        if not 0 <= token < n_vocab:
            raise PromptError(
                f"token id {token} at position {position} of the prompt: expected 0 to {n_vocab - 1}, the model has n_vocab = {n_vocab}. "
                f"The ids probably come from the tokenizer of another model: tokenize the text again, or give it with `--prompt TEXT`."
            )
        out.append(token)
    if n_ctx is not None and len(out) > n_ctx:
        raise PromptError(
            f"the prompt has {len(out):,} tokens, expected at most {n_ctx:,}, the context of the model. "
            f"Shorten the prompt, or give it as a file, which is cut into chunks: `--text FILE --ctx {n_ctx}`."
        )
    return out


def check_text(text: str) -> str:
    """The text itself; PromptError when it holds lone surrogates, which no UTF-8 text can."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(
            f"the prompt cannot be encoded as UTF-8: character {error.start} is the lone surrogate U+{ord(text[error.start]):04X}. "
            f"Text in another encoding was read as UTF-8, or cut inside a character: convert it with "
            f"`iconv -f LATIN1 -t UTF-8 FILE` (or its real encoding), or give token ids with `--tokens`."
        ) from None
    return text
