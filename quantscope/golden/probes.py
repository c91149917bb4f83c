"""What is run: few tokens first, so that each probe adds one thing that can be wrong; and the texts for the tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantscope.errors import PromptError
from quantscope.tokenizers import Tokenizer

N_REPEATED = 4


@dataclass(frozen=True)
class Probe:
    """Token ids, and what it adds to the probes before it."""

    name: str
    ids: tuple[int, ...]
    adds: str


def make_probes(ids: Sequence[int]) -> tuple[Probe, ...]:
    """The probes of a text's ids, in the order in which to check them.  Raises PromptError for fewer than three ids."""
    ids = tuple(ids)
    if len(ids) < 3:
        raise PromptError(
            f"a text of {len(ids)} tokens, expected at least three: one token, two and the whole text are probes of their own. Give a "
            f"longer one with `--prompt TEXT` or `--tokens 1,2,3`."
        )
    return (
        Probe("one", ids[:1], "one token at position 0: RoPE turns by nothing, the softmax has one term, there is no past"),
        Probe("two", ids[:2], "a second position: RoPE, the causal mask, the softmax over two keys"),
        Probe(
            "repeated",
            (ids[1],) * N_REPEATED,
            "one token several times: in layer 0 all values are equal, so every row of kqv_out-0 and l_out-0 must be the same",
        ),
        Probe("text", ids, "a text in one batch"),
        Probe("decode", ids, "the same text token by token over the key/value cache: the values must be those of the batch"),
    )


@dataclass(frozen=True)
class TokenizerCase:
    """A text and whether control tokens spelled out in it become those tokens (llama.cpp's parse_special)."""

    name: str
    text: str
    parse_special: bool = False


TEXTS: dict[str, str] = {
    "empty": "",
    "word": "Hello",
    "words": "Hello world",
    "leading-space": " Hello",
    "two-leading-spaces": "  Hello",
    "trailing-space": "Hello ",
    "inner-spaces": "a b  c   d    e",
    "only-spaces": "   ",
    "newline": "\n",
    "newlines": "one\ntwo\n\nthree\n",
    "carriage-return": "one\r\ntwo\r\n",
    "tab": "\tone\ttwo",
    "digits": "3.14159, 2026 and 1234567890",
    "punctuation": "Wait... \"what?\" (I'll see, they've said.)",
    "code": "def f(x):\n    return x * 2  # twice\n",
    "capitals": "HELLO Hello hELLO",
    "accents": "Crème brûlée, naïve façade, Ångström",
    "combining-accent": "e\u0301",  # e and an accent, two code points
    "greek-cyrillic": "Ελληνικά и русский",
    "cjk": "你好，世界。日本語のテスト",
    "hangul": "안녕하세요",
    "right-to-left": "שלום مرحبا",
    "emoji": "😀 👍🏽 👩‍👩‍👧‍👦 🇯🇵",
    "zero-width": "a\u200bb\ufeffc",
}


def tokenizer_cases(tokenizer: Tokenizer) -> tuple[TokenizerCase, ...]:
    """``TEXTS``, then the vocabulary's own BOS and EOS spelled out in a text, as text and as tokens."""
    cases = [TokenizerCase(name, text) for name, text in TEXTS.items()]
    for label, token in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id)):
        if token is not None:
            spelled = tokenizer.piece(token)
            text = f"before {spelled} after{spelled}"
            cases += [TokenizerCase(f"{label}-as-text", text), TokenizerCase(f"{label}-as-token", text, parse_special=True)]
    return tuple(cases)
