"""The tokenizer verdict: are the engine's token ids right, where do they part, and which mistake makes exactly these?

    ids_verdict(source, text, None, found)         found against what the file's own vocabulary makes of the text
    ids_verdict(source, None, expected, found)     against ids that are known to be right
    ids_verdict(source, None, None, found)         against themselves: the text they spell, tokenized again

A rule is *verified* when it gives exactly the ids that were found; otherwise it is only likely.  Different ids are not comparable by any
tap, so this comes before all arithmetic.  The rules are a table in ``token_rules``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from itertools import groupby
from typing import Literal, TypeAlias, cast

from quantscope.diagnose.token_rules import Bench, Rule, Scheme, VocabularyTokenizer, candidates, ends_of, explanations
from quantscope.errors import PromptError, VocabularyError
from quantscope.language import mark, say
from quantscope.phrases import count, listed
from quantscope.sources.base import Source
from quantscope.tokenizers import from_source
from quantscope.tokenizers.pieces import PieceDecoder
from quantscope.wording import quoted

Basis: TypeAlias = Literal["text", "ids", "round trip"]

MOST_NAMED = 3  # explanations in a sentence
COMPARED = 512  # ids, when likeness is measured
REPLACEMENT = "\ufffd"
FOREIGN = "other-vocabulary"
NOT_TRIED = mark("no rule was tried, as the vocabulary or the text is not known")


@dataclass(frozen=True)
class IdsVerdict:
    """position: the first difference; None where the ids are the same.  *_id: None past an end.
    *_piece: the token as the vocabulary has it.

    rules: names of the mistakes that together give these ids, one tuple for each explanation (they are equally good).  verified: they give
    exactly the ids found.  basis: what the ids were compared with.
    """

    same: bool
    basis: Basis
    sentence: str
    position: int | None = None
    expected_id: int | None = None
    expected_piece: str | None = None
    found_id: int | None = None
    found_piece: str | None = None
    rules: tuple[tuple[str, ...], ...] = ()
    verified: bool = False
    expected: tuple[int, ...] = ()


def ids_verdict(source: Source, text: str | None, expected: Sequence[int] | None, found: Sequence[int]) -> IdsVerdict:
    """Judge the ids an engine ran.

    text: what was given to the engine.  expected: the right ids, where they are not those of the file's own vocabulary.
    Raises VocabularyError where the vocabulary cannot be used and there are no expected ids, PromptError for a text that is none.
    """
    try:
        tokenizer: VocabularyTokenizer | None = cast(VocabularyTokenizer, from_source(source))
        assert tokenizer is not None
        Bench(tokenizer).ids(Scheme("a"))  # an unknown kind shows here
    except VocabularyError:
        if expected is None:
            raise
        tokenizer = None
    if tokenizer is None:
        return _verdict(None, "ids", list(expected or ()), list(found), None)
    basis: Basis = "text" if text is not None and expected is None else "ids" if expected is not None else "round trip"
    if basis == "round trip" and any(not 0 <= i < tokenizer.n_vocab for i in found):
        return _foreign_ids(tokenizer, found)
    words = text if text is not None else _spelled(tokenizer, found if expected is None else expected)
    right = list(expected) if expected is not None else _encode(tokenizer, words, parse=text is None)
    return _verdict(tokenizer, basis, right, list(found), None if words is None else _base(tokenizer, words, right))


def _spelled(tokenizer: VocabularyTokenizer, ids: Sequence[int]) -> str | None:
    """The text that ids stand for, special tokens spelled out but for BOS and EOS at the ends; None where it is no text.

    Whether a space after a special token belongs to the text or is the space prefix does not show: the reading that gives these ids again
    is taken.
    """
    core = list(ids)
    while core and core[0] == tokenizer.bos_id:
        core = core[1:]
    if core and core[-1] == tokenizer.eos_id:
        core = core[:-1]
    decoder, special = PieceDecoder(replace(tokenizer.vocabulary, clean_spaces=False)), tokenizer.vocabulary.special
    whole = decoder.decode(core, unparse_special=True)
    if REPLACEMENT in whole or any(not 0 <= i < tokenizer.n_vocab for i in core):
        return None
    stretches = "".join(decoder.decode(part, unparse_special=True) for _, part in groupby(core, key=special.__contains__))
    fits = [text for text in (whole, stretches) if tokenizer.encode(text, add_special=False, parse_special=True) == core]
    return (fits or [whole])[0]


def _encode(tokenizer: VocabularyTokenizer, text: str | None, parse: bool) -> list[int]:
    return [] if text is None else list(tokenizer.encode(text, parse_special=parse))


def _base(tokenizer: VocabularyTokenizer, text: str, right: Sequence[int]) -> Scheme | None:
    """The scheme that gives the right ids: special tokens parsed or not; None where neither does."""
    try:
        return next((Scheme(text, parse) for parse in (False, True) if _encode(tokenizer, text, parse) == list(right)), None)
    except PromptError:
        return None


def _verdict(tokenizer: VocabularyTokenizer | None, basis: Basis, right: list[int], found: list[int], base: Scheme | None) -> IdsVerdict:
    if basis == "round trip" and base is None:
        text = say("The engine's {ids} spell no text that can be tokenized again: nothing shows whether they are right.", ids=_ids(found))
        return IdsVerdict(True, basis, text)
    if right == found:
        return IdsVerdict(True, basis, _same(basis, found), expected=tuple(right))
    at = next((i for i, (a, b) in enumerate(zip(right, found, strict=False)) if a != b), min(len(right), len(found)))
    a, b = (ids[at] if at < len(ids) else None for ids in (right, found))
    pieces = [_piece(tokenizer, i) for i in (a, b)]
    bench = None if tokenizer is None else Bench(tokenizer)
    names, why, verified = _reason(bench, base, right, found)
    facts = {"position": at, "expected": _shown(a, pieces[0]), "found": _shown(b, pieces[1]), "why": why}
    if basis == "round trip" and verified:
        text = say(
            "The ids part at position {position}: expected {expected}, found {found}: {why}, if the text is the one they spell.", **facts
        )
    else:
        text = say("The ids part at position {position}: expected {expected}, found {found}: {why}.", **facts)
    return IdsVerdict(False, basis, text, at, a, pieces[0], b, pieces[1], names, verified, tuple(right))


def _same(basis: Basis, found: Sequence[int]) -> str:
    return say(_SAME[basis], ids=_ids(found))


_SAME: dict[Basis, str] = {
    "text": mark("The engine's {ids} are those of the file's own vocabulary for this text."),
    "ids": mark("The engine's {ids} are the expected ones."),
    "round trip": mark(
        "The engine's {ids} are those of the file's own vocabulary for the text they spell; whether it is the text that was meant, only "
        "the text shows."
    ),
}


def _ids(ids: Sequence[int]) -> str:
    return count(len(ids), "token id")


def _piece(tokenizer: VocabularyTokenizer | None, token: int | None) -> str | None:
    """The token as a reader knows it: of ``llama`` as it is stored (▁, <0x0A>), of ``gpt2`` decoded."""
    if tokenizer is None or token is None:
        return None
    v = tokenizer.vocabulary
    return v.tokens[token] if v.model == "llama" and 0 <= token < len(v.tokens) else tokenizer.piece(token)


def _shown(token: int | None, piece: str | None) -> str:
    if token is None:
        return say("no more ids")
    return f"{token}" if piece is None else f"{token} ({quoted(piece)})"


# ---- Why ---------------------------------------------------------------------------------------------------------------------

Reason: TypeAlias = tuple[tuple[tuple[str, ...], ...], str, bool]  # names of rules, the end of the sentence, verified


def _reason(bench: Bench | None, base: Scheme | None, right: Sequence[int], found: Sequence[int]) -> Reason:
    if bench is not None and base is not None:
        exact = explanations(bench, base, found)
        if exact:
            return (
                tuple(tuple(r.name for r in rules) for rules in exact),
                say("{faults} (gives exactly these ids)", faults=_said(exact)),
                True,
            )
    length = _length(right, found)
    if length is not None:
        return length
    if bench is not None:
        outside = [i for i in found if not 0 <= i < bench.tokenizer.n_vocab]
        if outside:
            return ((FOREIGN,),), _foreign(bench.tokenizer, outside[0]), False
        ends = ends_of(bench.tokenizer, _without_ends(bench.tokenizer, right), found) if base is None else None
        if ends:
            return (tuple(r.name for r in ends),), say("{faults} (gives exactly these ids)", faults=_said([ends])), True
    inside = _inside(bench, base, found)
    if inside is not None:
        return inside
    likely = _likely(bench, base, right, found) if bench is not None and base is not None else ()
    if likely:
        names = (tuple(r.name for r in likely),)
        return names, say("probably {faults} (nearer to these ids, but does not give exactly them)", faults=_said([likely])), False
    return (), say("none of the known mistakes gives these ids") if base is not None else say(NOT_TRIED), False


def _foreign(tokenizer: VocabularyTokenizer, token: int) -> str:
    return say("id {id} is no token of this vocabulary (0 to {last}), another model's was used", id=token, last=tokenizer.n_vocab - 1)


def _foreign_ids(tokenizer: VocabularyTokenizer, found: Sequence[int]) -> IdsVerdict:
    """The first id that no token of the vocabulary has."""
    at = next(i for i, token in enumerate(found) if not 0 <= token < tokenizer.n_vocab)
    sentence = say("At position {position} {what}.", position=at, what=_foreign(tokenizer, found[at]))
    return IdsVerdict(False, "round trip", sentence, at, None, None, found[at], None, ((FOREIGN,),))


def _said(explained: Sequence[Sequence[Rule]]) -> str:
    """``the engine replaces newlines by spaces and appends EOS``; explanations that are equally good with "or"."""
    options = [
        say("the engine {faults}", faults=listed(say(rule.says, what=rule.what) for rule in rules)) for rules in explained[:MOST_NAMED]
    ]
    return say(", or ").join(options)


def _without_ends(tokenizer: VocabularyTokenizer, ids: Sequence[int]) -> list[int]:
    first = 1 if tokenizer.add_bos and list(ids[:1]) == [tokenizer.bos_id] else 0
    last = len(ids) - (1 if tokenizer.add_eos and list(ids[-1:]) == [tokenizer.eos_id] else 0)
    return list(ids[first:last])


def _length(right: Sequence[int], found: Sequence[int]) -> Reason | None:
    """One is the beginning of the other."""
    right, found = list(right), list(found)
    if found and right[: len(found)] == found:
        return (
            (("cut-short",),),
            say("the engine ran only the first {n} of {tokens}", n=len(found), tokens=count(len(right), "token")),
            True,
        )
    if right and found[: len(right)] == right:
        more = count(len(found) - len(right), "more id")
        text = say("the expected ids are all there, and {more} follow: generated tokens, or more text", more=more)
        return (("goes-on",),), text, False
    return None


def _inside(bench: Bench | None, base: Scheme | None, found: Sequence[int]) -> Reason | None:
    """The ids of the text with others around them: a chat template or a system prompt."""
    if bench is None or base is None:
        return None
    cores = [bench.ids(base)]
    bare = Scheme(base.text, base.parse_special, space_prefix=False)
    cores += [bench.ids(bare)] if bench.vocabulary.add_space_prefix and bench.can(bare) else []
    for core in cores:
        at = next((i for i in range(len(found) - len(core) + 1) if core and list(found[i : i + len(core)]) == core), None)
        if at is not None and len(found) > len(core) + 1:
            before, after = (bench.tokenizer.decode(ids, unparse_special=True) for ids in (found[:at], found[at + len(core) :]))
            text = say(
                "the ids of the text are there, with {before} before and {after} after them, a chat template or another prompt",
                before=quoted(before),
                after=quoted(after),
            )
            return (("template",),), text, False
    return None


def _likely(bench: Bench, base: Scheme, right: Sequence[int], found: Sequence[int]) -> tuple[Rule, ...]:
    """The one rule that closes more than half of the distance, if there is one."""
    known = list(_single(bench, base))
    gap = 1 - _likeness(right, found)
    rule, left = min(((r, 1 - _likeness(ids, found)) for r, ids in known), key=lambda item: item[1], default=(None, gap))
    return (rule,) if rule is not None and left < gap / 2 else ()


def _single(bench: Bench, base: Scheme) -> list[tuple[Rule, list[int]]]:
    """Each rule alone, with the BOS and EOS that belong there."""
    t, out = bench.tokenizer, []
    before = [t.bos_id] if t.add_bos and t.bos_id is not None else []
    after = [t.eos_id] if t.add_eos and t.eos_id is not None else []
    for rules, core in candidates(bench, base):
        if len(rules) > 1:
            break
        out += [(rule, [*before, *core, *after]) for rule in rules]
    return out


def _likeness(a: Sequence[int], b: Sequence[int]) -> float:
    """Share of ids that two lists have in common and in order, 0 to 1."""
    return SequenceMatcher(None, a[:COMPARED], b[:COMPARED], autojunk=False).ratio()
