"""How engines tokenize wrongly: a table of rules, each a change of the right way, so that rules combine.

    ids = BOS + cut(changed text) + EOS

A rule changes the text, the space prefix, what counts as a special token, or the cutting.

``explanations`` returns the fewest rules that give exactly the ids that were found.  BOS and EOS are read off the ends, so they combine
with everything at no cost.  Source of the right way: src/llama-vocab.cpp of llama.cpp; of the mistakes: notes and issues of engines.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import combinations
from typing import TYPE_CHECKING, Literal, TypeAlias

from quantscope.tokenizers.ggml import GgmlTokenizer
from quantscope.tokenizers.pretokenize import PreTokenizer, split
from quantscope.tokenizers.vocabulary import BYTE_TO_CHAR, MODELS, Kind, Vocabulary

if TYPE_CHECKING:
    from quantscope.tokenizers.huggingface import JsonTokenizer

VocabularyTokenizer: TypeAlias = "GgmlTokenizer | JsonTokenizer"
Cut: TypeAlias = Callable[[str], list[int]]  # a stretch without special tokens → ids
Part: TypeAlias = Literal["text", "prefix", "special", "template", "cut", "ends"]

SPACE = "▁"
OWN = "own"
MOST_RULES = 3  # rules of text and cutting at once
MOST_CHARACTERS = 2_000_000  # that a search tokenizes; longer texts are searched with fewer rules at once


@dataclass(frozen=True)
class Scheme:
    """A way to tokenize a text, BOS and EOS apart.  cut: a key of CUTS.  space_prefix: None is what the vocabulary says."""

    text: str
    parse_special: bool = False
    space_prefix: bool | None = None
    cut: str = OWN


@dataclass(frozen=True)
class Rule:
    """One mistake.  says: completes "the engine ...", with {what} in it.  change: None where it cannot be made with this vocabulary.

    Of two rules of one part other than "text", only one can hold.
    """

    name: str
    says: str
    part: Part
    change: Callable[[Scheme, Vocabulary], Scheme | None] = lambda scheme, vocabulary: None
    what: str = ""


# ---- Cutting -----------------------------------------------------------------------------------------------------------------


def _own(v: Vocabulary) -> Cut:
    if v.model == "llama":
        from quantscope.tokenizers.spm import SpmEncoder

        return SpmEncoder(v)
    from quantscope.tokenizers.bpe import BpeEncoder

    return BpeEncoder(v)


class _Uncut(Vocabulary):
    """A vocabulary whose texts are not cut into words."""

    @property
    def pre_tokenizer(self) -> PreTokenizer:
        return PreTokenizer(())


def _uncut(v: Vocabulary) -> Cut:
    return _own(_Uncut(**{f.name: getattr(v, f.name) for f in fields(v)}))


def _cut_as(pre: str, v: Vocabulary) -> Cut:
    """With the words of another pre-tokenizer."""
    return _own(replace(v, pre=pre))


def _letters(v: Vocabulary, text: str) -> str:
    """A text in the alphabet of the vocabulary's tokens."""
    return text.replace(" ", SPACE) if v.model == "llama" else text.encode("utf-8").decode("latin-1").translate(BYTE_TO_CHAR)


def _bytes(v: Vocabulary, text: str) -> list[int]:
    """One token a byte; the unknown token where there is none."""
    names = (f"<0x{b:02X}>" if v.model == "llama" else BYTE_TO_CHAR[b] for b in text.encode("utf-8"))
    unknown = [] if v.unk_id is None else [v.unk_id]
    return [i for name in names for i in ([v.index[name]] if name in v.index else unknown)]


def _character(v: Vocabulary, c: str) -> list[int]:
    return [v.index[c]] if c in v.index else _bytes(v, c)


def _no_merges(v: Vocabulary) -> Cut:
    return lambda text: [i for c in _letters(v, text) for i in _character(v, c)]


def _non_ascii_bytes(v: Vocabulary) -> Cut:
    own = _own(v)
    pieces = re.compile(r"[\x00-\x7f]+|[^\x00-\x7f]")
    return lambda text: [i for part in pieces.findall(text) for i in (own(part) if part.isascii() else _bytes(v, part))]


def _longest(v: Vocabulary, words: bool) -> Cut:
    """The longest token that the rest of the text begins with, again and again; ``words``: within the words of the pre-tokenizer."""
    longest = max(map(len, v.tokens))
    normal = {token: i for i, token in enumerate(v.tokens) if v.kinds[i] == Kind.NORMAL}

    def cut(text: str) -> list[int]:
        ids: list[int] = []
        for word in split(text, v.pre_tokenizer) if words else [text]:
            letters, at = _letters(v, word), 0
            while at < len(letters):
                n = next((n for n in range(min(longest, len(letters) - at), 0, -1) if letters[at : at + n] in normal), 1)
                piece = letters[at : at + n]
                ids += [normal[piece]] if piece in normal else _character(v, piece)
                at += n
        return ids

    return cut


def _bytes_unknown(v: Vocabulary) -> Cut:
    own = _own(v)
    return lambda text: [i if v.kinds[i] != Kind.BYTE or v.unk_id is None else v.unk_id for i in own(text)]


def _spaces_alone(v: Vocabulary) -> Cut:
    own, space = _own(v), _character(v, _letters(v, " "))
    return lambda text: [i for part in re.findall(r" |[^ ]+", text) for i in (space if part == " " else own(part))]


# key → (how a stretch is cut, for which kinds of vocabulary, whether it needs the vocabulary's own scores or merges)
CUTS: dict[str, tuple[Callable[[Vocabulary], Cut], tuple[str, ...], bool]] = {
    OWN: (_own, tuple(MODELS), True),
    "no-merges": (_no_merges, ("llama", "gpt2"), False),
    "bytes": (lambda v: lambda text: _bytes(v, text.replace(" ", SPACE)), ("llama",), False),
    "non-ascii-bytes": (_non_ascii_bytes, ("llama",), True),
    "bytes-unknown": (_bytes_unknown, ("llama",), True),
    "longest-match": (lambda v: _longest(v, False), ("llama", "gpt2"), False),
    "longest-match-in-words": (lambda v: _longest(v, True), ("gpt2",), True),
    "spaces-alone": (_spaces_alone, ("llama", "gpt2"), True),
    "words-not-cut": (_uncut, ("gpt2",), True),
    **{f"words-cut-as-{pre}": (partial(_cut_as, pre), ("gpt2",), True) for pre in ("gpt-2", "llama-bpe", "qwen2")},
}


class Bench:
    """Tokenizes by schemes, building each way of cutting once."""

    def __init__(self, tokenizer: VocabularyTokenizer) -> None:
        self.tokenizer, self.vocabulary = tokenizer, tokenizer.vocabulary
        self._made: dict[tuple[str, bool | None], GgmlTokenizer] = {}
        self._cuts: dict[str, Cut] = {}

    def can(self, scheme: Scheme) -> bool:
        """Whether the vocabulary says enough: a tokenizer.json keeps its merges to itself."""
        _, models, own = CUTS[scheme.cut]
        plain = scheme.cut == OWN and scheme.space_prefix is None
        return plain or (self.vocabulary.model in models and (not own or isinstance(self.tokenizer, GgmlTokenizer)))

    def ids(self, scheme: Scheme) -> list[int]:
        """The ids, without BOS and EOS."""
        if scheme.cut == OWN and scheme.space_prefix is None:
            return self.tokenizer.encode(scheme.text, add_special=False, parse_special=scheme.parse_special)
        return self._tokenizer(scheme).encode(scheme.text, add_special=False, parse_special=scheme.parse_special)

    def _tokenizer(self, scheme: Scheme) -> GgmlTokenizer:
        key = scheme.cut, scheme.space_prefix
        if key not in self._made:
            v = self.vocabulary if scheme.space_prefix is None else replace(self.vocabulary, add_space_prefix=scheme.space_prefix)
            if scheme.cut not in self._cuts:
                self._cuts[scheme.cut] = CUTS[scheme.cut][0](self.vocabulary)
            cut = self._cuts[scheme.cut]
            self._made[key] = GgmlTokenizer(v, lambda _: cut)
        return self._made[key]


# ---- The table ---------------------------------------------------------------------------------------------------------------

# chat templates: name → text around the user's words; used where their special tokens are in the vocabulary
TEMPLATES = {
    "ChatML": "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    "ChatML with a system prompt": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
    "<|im_start|>assistant\n",
    "Zephyr": "<|user|>\n{}</s>\n<|assistant|>\n",
    "Llama 2": "[INST] {} [/INST]",
    "Llama 3": "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "Gemma": "<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n",
    "Phi-3": "<|user|>\n{}<|end|>\n<|assistant|>\n",
    "Alpaca": "### Instruction:\n{}\n\n### Response:\n",
    "Vicuna": "USER: {} ASSISTANT:",
}
_SPECIAL = re.compile(r"<\|\w+\|>|<\w+_of_turn>|</s>")


def _text(change: Callable[[str], str]) -> Callable[[Scheme, Vocabulary], Scheme | None]:
    return lambda scheme, v: replace(scheme, text=change(scheme.text))


def _cutting(cut: str) -> Callable[[Scheme, Vocabulary], Scheme | None]:
    return lambda scheme, v: replace(scheme, cut=cut)


def _prefix(missing: bool) -> Callable[[Scheme, Vocabulary], Scheme | None]:
    """A missing prefix; or one before the whole text only, not after its special tokens."""

    def change(scheme: Scheme, v: Vocabulary) -> Scheme | None:
        if not v.add_space_prefix:
            return None
        return replace(scheme, space_prefix=False, text=scheme.text if missing else f" {scheme.text}")

    return change


def _around(template: str, parse: bool) -> Callable[[Scheme, Vocabulary], Scheme | None]:
    needed = [token for token in _SPECIAL.findall(template) if token not in ("<|user|>", "<|assistant|>")]

    def change(scheme: Scheme, v: Vocabulary) -> Scheme | None:
        known = all(token in v.index for token in needed)
        return replace(scheme, text=template.replace("{}", scheme.text), parse_special=parse) if known else None

    return change


def _parsing(parse: bool) -> Callable[[Scheme, Vocabulary], Scheme | None]:
    return lambda scheme, v: None if scheme.parse_special == parse else replace(scheme, parse_special=parse)


def _as_latin(text: str) -> str:
    return text.encode("utf-8").decode("latin-1")


RULES: tuple[Rule, ...] = (
    Rule("stripped", "strips white space from both ends of the text", "text", _text(str.strip)),
    Rule("stripped-start", "strips white space from the start of the text", "text", _text(str.lstrip)),
    Rule("stripped-end", "strips white space from the end of the text", "text", _text(str.rstrip)),
    Rule("newline-added", "adds a newline to the text", "text", _text(lambda t: f"{t}\n")),
    Rule("newline-as-space", "replaces newlines by spaces", "text", _text(lambda t: t.replace("\n", " "))),
    Rule("newline-missing", "drops newlines", "text", _text(lambda t: t.replace("\n", ""))),
    Rule("newline-crlf", "turns newlines into carriage return and newline", "text", _text(lambda t: re.sub(r"\r?\n", "\r\n", t))),
    Rule("newline-escaped", 'passes a newline on as the two characters "\\n"', "text", _text(lambda t: t.replace("\n", "\\n"))),
    Rule("spaces-collapsed", "makes one space of several", "text", _text(lambda t: re.sub(" +", " ", t))),
    Rule("spaces-missing", "drops spaces", "text", _text(lambda t: t.replace(" ", ""))),
    Rule("lower-cased", "turns the text into lower case", "text", _text(str.lower)),
    Rule("latin-1", "reads the UTF-8 bytes of the text as Latin-1", "text", _text(_as_latin)),
    *(
        Rule(f"unicode-{form.lower()}", "normalizes the text ({what})", "text", _text(partial(unicodedata.normalize, form)), form)
        for form in ("NFC", "NFD", "NFKC")
    ),
    Rule("space-prefix-missing", "leaves out the space that belongs before a text (add_space_prefix)", "prefix", _prefix(True)),
    Rule("space-prefix-once", "puts the space prefix before the whole text only, not after special tokens", "prefix", _prefix(False)),
    Rule("space-prefix-added", "puts one space too many before the text", "prefix", _text(lambda t: f" {t}")),
    Rule("special-as-text", "tokenizes special tokens that are spelled out in the text as plain text", "special", _parsing(False)),
    Rule("special-parsed", "reads special tokens that are spelled out in the text as those tokens", "special", _parsing(True)),
    *(
        Rule(f"template-{n.lower().replace(' ', '-')}", "puts a chat template around the text ({what})", "template", _around(t, True), n)
        for n, t in TEMPLATES.items()
    ),
    *(
        Rule(
            f"template-{n.lower().replace(' ', '-')}-as-text",
            "puts a chat template around the text ({what}), its special tokens as plain text",
            "template",
            _around(t, False),
            n,
        )
        for n, t in TEMPLATES.items()
        if _SPECIAL.search(t)
    ),
    Rule("no-merges", "does not merge: one token a character", "cut", _cutting("no-merges")),
    Rule("bytes", "makes a byte token of every byte", "cut", _cutting("bytes")),
    Rule("non-ascii-bytes", "makes byte tokens of characters beyond ASCII, although they have tokens", "cut", _cutting("non-ascii-bytes")),
    Rule("bytes-unknown", "gives the unknown token where bytes are to be written (no byte fallback)", "cut", _cutting("bytes-unknown")),
    Rule("longest-match", "takes the longest token that fits instead of merging by rank or score", "cut", _cutting("longest-match")),
    Rule("longest-match-in-words", "takes the longest token that fits within a word", "cut", _cutting("longest-match-in-words")),
    Rule("spaces-alone", "makes a token of its own of every space", "cut", _cutting("spaces-alone")),
    Rule("words-not-cut", "does not cut the text into words before it merges (no pre-tokenizer)", "cut", _cutting("words-not-cut")),
    *(
        Rule(name, "cuts the text into words as {what} does (tokenizer.ggml.pre)", "cut", _cutting(name), pre)
        for pre in ("gpt-2", "llama-bpe", "qwen2")
        for name in (f"words-cut-as-{pre}",)
    ),
)  # fmt: skip

ENDS = {
    rule.name: rule
    for rule in (
        Rule("bos-missing", "leaves out BOS", "ends"),
        Rule("bos-added", "adds BOS although the vocabulary does not ask for it", "ends"),
        Rule("bos-doubled", "adds BOS twice", "ends"),
        Rule("eos-missing", "leaves out EOS", "ends"),
        Rule("eos-appended", "appends EOS", "ends"),
    )
}


# ---- The search --------------------------------------------------------------------------------------------------------------


def explanations(bench: Bench, base: Scheme, found: Sequence[int]) -> list[tuple[Rule, ...]]:
    """The smallest sets of rules that give exactly ``found``; empty where none of up to MOST_RULES and the ends do."""
    best: list[tuple[Rule, ...]] = []
    for rules, core in candidates(bench, base):
        if best and len(rules) > len(best[0]):
            break
        ends = ends_of(bench.tokenizer, core, found)
        if ends is not None and (rules or ends):
            best.append((*rules, *ends))
            best = [b for b in best if len(b) == min(map(len, best))]
    return best


def candidates(bench: Bench, base: Scheme) -> Iterator[tuple[tuple[Rule, ...], list[int]]]:
    """(rules, ids without the ends), no rule first, then ever more of those that change something on this text."""
    right = bench.ids(base)
    yield (), right
    changing = []
    for rule in RULES:
        scheme = _applied(bench, base, (rule,))
        if scheme is not None and (ids := bench.ids(scheme)) != right:
            changing.append(rule)
            yield (rule,), ids
    spent = 0
    for n in range(2, MOST_RULES + 1):
        for rules in combinations(changing, n):
            spent += len(base.text)
            if spent > MOST_CHARACTERS:
                return
            scheme = _applied(bench, base, rules)
            if scheme is not None:
                yield rules, bench.ids(scheme)


def _applied(bench: Bench, base: Scheme, rules: Sequence[Rule]) -> Scheme | None:
    """The scheme of an engine with these rules, in the order of the table; None where two exclude each other."""
    parts = [rule.part for rule in rules if rule.part != "text"]
    if len(set(parts)) < len(parts):
        return None
    scheme: Scheme | None = base
    for rule in rules:
        scheme = None if scheme is None else rule.change(scheme, bench.vocabulary)
    return scheme if scheme is not None and bench.can(scheme) else None


def ends_of(tokenizer: VocabularyTokenizer, core: Sequence[int], found: Sequence[int]) -> tuple[Rule, ...] | None:
    """The rules that make ``found`` of ``core`` by BOS and EOS alone; None where they do not."""
    bos, eos = ([] if i is None else [i] for i in (tokenizer.bos_id, tokenizer.eos_id))
    wanted, core, found = (int(tokenizer.add_bos), int(tokenizer.add_eos)), list(core), list(found)
    for n in range(3 if bos else 1):
        for m in range(2 if eos else 1):
            if found == bos * n + core + eos * m:
                first = () if n == wanted[0] else (("bos-missing",), (("bos-added", "bos-doubled")[wanted[0]],))[n > wanted[0]]
                last = () if m == wanted[1] else ("eos-appended",) if m else ("eos-missing",)
                return tuple(ENDS[name] for name in (*first, *last))
    return None
