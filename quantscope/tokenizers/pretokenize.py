"""Cutting text into the words that byte-pair merges may not cross: one row per published pre-tokenizer.

A row's patterns apply one after the other.  Each cuts every piece of text so far into its matches and what lies between them,
as llama.cpp does; a match never looks past its piece.  ``\\p{L}``, N, P, S, M are Unicode categories, ``\\p{Han}`` the Han blocks,
``\\s`` is White_Space.

Python's ``re`` has no ``\\p{...}``, so such a pattern runs over the *class text*, one byte per character: ASCII stays itself, any
other character becomes the byte of its class.  Ids then do not depend on the Unicode version of Python or of a library.

Source: the tokenizer.json files of the models named, in the adapted form of llama.cpp (src/llama-vocab.cpp), which decides where
the two differ.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

from quantscope.tokenizers.characters import CLASS_BYTE, ascii_members, class_text

Span: TypeAlias = tuple[int, int]  # [start, end) in characters

_WIDE_SPACES = dict.fromkeys([0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000], "\v")


@dataclass(frozen=True)
class PreTokenizer:
    """Patterns in order, and what llama.cpp ties to the same name.

    ignore_merges: a word that is itself a token is not merged from bytes.  add_bos: default when the file does not say.
    clean_spaces: spaces before punctuation are dropped from decoded text.  no_bos: the file names a BOS token, or there is none.
    raw: words are merged from characters, with ▁ for a space, and what is no token becomes its bytes <0x00> to <0xFF>; otherwise
    from the letters of the byte alphabet.  newline_runs: a run of newlines that is a token is not merged from its parts.
    strip_left: this token swallows the white space before it.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    clean_spaces: bool = True
    no_bos: bool = False
    raw: bool = False
    newline_runs: bool = False
    strip_left: str = ""


_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_PUNCTUATION_SPACES = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_PUNCTUATION_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_PUNCTUATION_SPACES}"
_QWEN35 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Upper- and lower-case letters outside ASCII fall into one class, as in llama.cpp.
_LETTER, _LETTER_MARK = r"(?=[\p{L}])", r"(?=[\p{L}\p{M}])"
_UPPER, _LOWER = rf"({_LETTER}([^a-z]))", rf"({_LETTER}([^A-Z]))"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+TAIL|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*TAIL"
_SLASH_SPACES = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"{_CASED.replace('TAIL', '')}|\p{{N}}|{_SLASH_SPACES}"
_GPT4O = rf"{_CASED.replace('TAIL', _CONTRACTIONS + '?')}|\p{{N}}{{1,3}}|{_SLASH_SPACES}"
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    r"[\u4E00-\u9FA5\u3040-\u309F\u30A0-\u30FF]+",  # Chinese and Japanese
    r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_DEEPSEEK_ASIAN = r"[\u4E00-\u9FA5\u0800-\u4E00\uAC00-\uD7FF]+"
_DEEPSEEK_LETTERS = (  # cased letters of Unicode 12, spelled out in the model's own file
    r"A-Za-z\u00B5\u00C0-\u00D6\u00D8-\u00F6\u00F8-\u01BA\u01BC-\u01BF\u01C4-\u0293\u0295-\u02AF\u0370-\u0373\u0376\u0377"
    r"\u037B-\u037D\u037F\u0386\u0388-\u038A\u038C\u038E-\u03A1\u03A3-\u03F5\u03F7-\u0481\u048A-\u052F\u0531-\u0556\u10A0-\u10C5"
    r"\u13A0-\u13F5\u13F8-\u13FD\u1C90-\u1CBA\u1CBD-\u1CBF\u1D00-\u1D2B\u1D6B-\u1D77\u1D79-\u1D9A\u1E00-\u1F15\u1F18-\u1F1D"
    r"\u1F20-\u1F45\u1F48-\u1F4D\u1F50-\u1F57\u1F59\u1F5B\u1F5D\u1F5F-\u1F7D\u1F80-\u1FB4\u1FB6-\u1FBC\u1FBE\u1FC2-\u1FC4"
    r"\u1FC6-\u1FCC\u1FD0-\u1FD3\u1FD6-\u1FDB\u1FE0-\u1FEC\u1FF2-\u1FF4\u1FF6-\u1FFC\u2102\u2107\u210A-\u2113\u2115\u2119-\u211D"
    r"\u2124\u2126\u2128\u212A-\u212D\u212F-\u2134\u2139\u213C-\u213F\u2145-\u2149\u214E\u2183\u2184\u2C00-\u2C7B\u2C7E-\u2CE4"
    r"\u2CEB-\u2CEE\u2CF2\u2CF3\uA640-\uA66D\uA680-\uA69B\uA722-\uA76F\uA771-\uA787\uA78B-\uA78E\uAB70-\uABBF\uFB00-\uFB06"
    r"\uFB13-\uFB17\uFF21-\uFF3A\uFF41-\uFF5A\U00010400-\U0001044F\U000104B0-\U000104D3\U000104D8-\U000104FB\U00010C80-\U00010CB2"
    r"\U00010CC0-\U00010CF2\U000118A0-\U000118DF\U0001E900-\U0001E943"
)
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{_DEEPSEEK_LETTERS}]+",
    r"\s?[!-/:-~\uFF01-\uFF0F\uFF1A-\uFF5E\u2018-\u201F\u3000-\u3002]+",
    r"\s+\Z",
    _DEEPSEEK_ASIAN,
    r"\p{N}+",
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_ASIAN, r"\p{N}")
_BLOOM = r" ?[^(\s|.,!?\u2026\u3002\uFF0C\u3001\u0964\u06D4\u060C)]+"
_BAILING = r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
_SEED = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
_NO_CONTRACTIONS = rf"[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_PUNCTUATION_SPACES}"
_EXAONE_MOE = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?|\s*[\r\n]"
    r"|\s+(?!\S)|\s+"
)
_SPACE_RUNS = "|".join(rf"\s{{{n}}}(?!\S)" for n in ("512", "256", "128", "64", "32", "16", "8", "4", "1,2"))
_JAIS2 = _LLAMA3.replace(r"\s+(?!\S)|\s+", rf"{_SPACE_RUNS}|\s")
_WORDS = rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+{_CONTRACTIONS}?"  # upper and lower case are one class in llama.cpp
_YOUTU = (
    r"[\uAC00-\uD7A3\u3131-\u318E]+|[\uFF01\u2026\u201C\u201D\u2018\u2019\u2014\uFF1A\uFF1B\uFF0C\u3001-\u303F\uFE30-\uFE4F]+"
    r"|[\u3105-\u312F]+|[\u4E00-\u9FA5\u3040-\u309F\u30A0-\u30FF]+",
    rf"{_WORDS}|\p{{N}}|{_SLASH_SPACES}",
)
# a1234567 → a1 234 567: in llama.cpp the first digits stay with the text before them.
_DIGITS_FROM_THE_RIGHT = r"[^\p{N}]*\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))|[^\p{N}]+\Z"
_TINY_AYA = (_DIGITS_FROM_THE_RIGHT, rf"{_WORDS}|\p{{N}}{{1,3}}|{_SLASH_SPACES}")
_AFMOE = (
    _DIGITS_FROM_THE_RIGHT,
    r"[\u4E00-\u9FFF\u3400-\u4DBF\u8C48-\uFAFF\u3040-\u30FF\uFF65-\uFF9F\u2F00-\u2FDF\u0E40-\u0EFF\u1780-\u17FF"
    r"\u1000-\u109F\uAA60-\uAA7F\uA9E0-\uA9FF\uAC00-\uD7AF\u1100-\u11FF]+",
    _DEEPSEEK3[2],
)
_KIMI = rf"\p{{Han}}+|[^\r\n\p{{L}}\p{{N}}]?(?:(?!\p{{Han}})\p{{L}})+{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_PUNCTUATION_SPACES}"
_CHAMELEON = (r"<sentinel:[0-9]+>", r"(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z", r"([\t\n]|    |  )", r"\p{N}", r"[\p{P}!-/:-@\[-`{-~]", _GPT2)
_SPARK = (r"\p{N}{1,3}", _DEEPSEEK3[1], _DEEPSEEK3[2].replace(r"[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+", r"[\p{P}\p{S}]+|[\r\n]"), r"\p{N}")
_LINES = r"[^\n]+|[\n]+"
_MINICPM5 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}+|{_PUNCTUATION_SPACES}"
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")

# fmt: off
_ROWS: tuple[tuple[str, PreTokenizer], ...] = (  # names as in tokenizer.ggml.pre, separated by spaces
    ("default", PreTokenizer(_DEFAULT)),
    ("llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
     PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True)),
    ("gpt-2 phi-2 mpt olmo jais gigachat a.x-4.0 mellum exaone4 jina-es jina-de jina-v1-en roberta-bpe modern-bert",
     PreTokenizer((_GPT2,))),
    ("jina-v2-es jina-v2-de jina-v2-code", PreTokenizer((_GPT2,), strip_left="<mask>")),
    ("trillion granite-docling", PreTokenizer((_GPT2,), clean_spaces=False)),
    ("qwen2 deepseek-r1-qwen kormo f2llmv2 hunyuan solar-open grok-2", PreTokenizer((_QWEN2,), clean_spaces=False)),
    ("stablelm2 megrez", PreTokenizer((_QWEN2,))),
    ("ufakzeka", PreTokenizer((_NO_CONTRACTIONS,), clean_spaces=False)),
    ("qwen35", PreTokenizer((_QWEN35,), clean_spaces=False)),
    ("dbrx smaug-bpe", PreTokenizer((_LLAMA3,))),
    ("glm4 glm5", PreTokenizer((_LLAMA3,), ignore_merges=True, no_bos=True)),
    ("chatglm-bpe", PreTokenizer((_LLAMA3,), no_bos=True)),
    ("jais-2", PreTokenizer((_JAIS2,))),
    ("starcoder refact codeshell exaone minerva-7b mellum2", PreTokenizer((r"\p{N}", _GPT2))),
    ("command-r smollm", PreTokenizer((r"\p{N}", _GPT2), clean_spaces=False)),
    ("falcon", PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]"))),
    ("deepseek-llm", PreTokenizer(_DEEPSEEK_LLM, clean_spaces=False)),
    ("deepseek-coder", PreTokenizer(_DEEPSEEK_CODER, clean_spaces=False)),
    ("deepseek-v3 hunyuan-dense joyai-llm hy_v4", PreTokenizer(_DEEPSEEK3, clean_spaces=False)),
    ("spark2_5", PreTokenizer(_SPARK, clean_spaces=False)),
    ("tekken", PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True, clean_spaces=False)),
    ("gpt-4o llama4 kanana2 talkie minimax-m2", PreTokenizer((_GPT4O,), clean_spaces=False)),
    ("granite-embed-multi-97m", PreTokenizer((_GPT4O.replace(_LETTER, _LETTER_MARK),), ignore_merges=True, clean_spaces=False)),
    ("tiny_aya cohere2moe", PreTokenizer(_TINY_AYA, clean_spaces=False)),
    ("youtu", PreTokenizer(_YOUTU, ignore_merges=True, clean_spaces=False)),
    ("kimi-k2", PreTokenizer((_KIMI,), clean_spaces=False)),
    ("bloom gpt3-finnish", PreTokenizer((_BLOOM,))),
    ("poro-chat", PreTokenizer((_BLOOM,), clean_spaces=False)),
    ("viking", PreTokenizer((_BLOOM, r"\p{N}"), clean_spaces=False)),
    ("bailingmoe bailingmoe2 llada-moe", PreTokenizer((_BAILING,), clean_spaces=False)),
    ("seed-coder", PreTokenizer((_SEED,), clean_spaces=False)),
    ("minicpm5", PreTokenizer((r"\p{N}{1,3}", _MINICPM5), ignore_merges=True)),
    ("exaone-moe", PreTokenizer((_EXAONE_MOE,))),
    ("afmoe", PreTokenizer(_AFMOE, clean_spaces=False)),
    ("laguna", PreTokenizer((_LINES, _QWEN2), clean_spaces=False)),
    ("superbpe", PreTokenizer((r"\p{N}+", r"(?=(\d{3})+(?!\d))"), clean_spaces=False)),
    ("chameleon", PreTokenizer(_CHAMELEON, add_bos=True, clean_spaces=False)),
    ("gemma4 granite-embed-multi-311m", PreTokenizer((_LINES,), add_bos=True, raw=True, newline_runs=True)),
    ("sarvam-moe", PreTokenizer((_LINES,), clean_spaces=False, raw=True)),
)
# fmt: on
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {name: row for names, row in _ROWS for name in names.split()}


def _members(name: str) -> str:
    """What a category is inside the brackets of a class-text pattern: its ASCII characters and its bytes."""
    parts = {"L": "LH", "Han": "Hh"}.get(name, name)
    return "".join(re.escape(ascii_members(part)) + chr(CLASS_BYTE[part]) for part in parts)


@cache
def _compile(pattern: str) -> tuple[re.Pattern[Any], bool]:
    r"""The compiled pattern, and whether it runs over the class text: it does when it names a category.

    ASCII mode keeps ``\s`` to tab ... carriage return and space; all other white space is ``\v`` in either text.
    """
    if r"\p{" not in pattern:
        return re.compile(pattern, re.ASCII), False
    in_brackets = False
    out: list[str] = []
    for token in re.findall(r"\\p\{\w+\}|\\.|.", pattern):
        if token.startswith(r"\p{"):
            members = _members(token[3:-1])
            out.append(members if in_brackets else f"[{members}]")
        else:
            in_brackets = {"[": True, "]": False}.get(token, in_brackets)
            out.append(token)
    return re.compile("".join(out).encode("latin-1")), True


def split(text: str, row: PreTokenizer) -> list[str]:
    """The words of a text without surrogates; joined they are the text again."""
    spans: list[Span] = [(0, len(text))] if text else []
    for pattern, over_classes in map(_compile, row.patterns):
        subject: Any = class_text(text) if over_classes else text.translate(_WIDE_SPACES)
        spans = [part for start, end in spans for part in _cut(pattern.finditer(subject, start, end), start, end)]
    return [text[a:b] for a, b in spans]


def _cut(matches: Iterable[re.Match[Any]], start: int, end: int) -> Iterator[Span]:
    """The matches and the gaps between them, in order, empty ones left out."""
    for match in matches:
        a, b = match.span()
        if start < a:
            yield start, a
        if a < b:
            yield a, b
        start = b
    if start < end:
        yield start, end
