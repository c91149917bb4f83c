"""Hypotheses about a wrong or different output, each supported, refuted or untested by what was measured.

    ledger(Facts(...))  →  one Hypothesis for each of: quantization too coarse, architecture amplifies, engine bug, tokenizer, file damaged,
                           activation rounding

A hypothesis is tested by the one comparison that changes nothing else, and stays untested without it:

    quantization           the original against the quantized file, both computed exactly
    architecture           the growth of RMS in float32 against that of the quantized file
    engine                 the same file, the same token ids, exact against the engine, beyond what its arithmetic rounds
    tokenizer              the ids that both make of the same text
    file                   its tensors against another file's, beyond what their types explain
    activation rounding    the exact against the expected arithmetic, and exact activations put back at some taps

Several can hold at once, so none is refuted because another is supported.  Within expected arithmetic nothing is found; that is never
called the absence of a fault, as some faults cannot show in the evidence there is.  Source: docs of ``diagnose``; the wording follows
the lessons of a case in which every cause was in the engine and all early notes blamed the quantization (tests/data/rustorch).
"""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from quantscope.compare import PREDICTED_TIMES
from quantscope.diagnose.activation_rounding import ActivationRounding
from quantscope.diagnose.attribution import KL_FLOOR, LogitSplit, within
from quantscope.language import mark, say
from quantscope.phrases import count, listed, some, times
from quantscope.wording import percent, sci, sig

Status: TypeAlias = Literal["supported", "refuted", "untested"]

COARSE_NATS = 0.1  # KL above which sampling sees a quantization: up to √(KL/2) = 22 % of the probability is moved (Pinsker's inequality)
SIMILAR_GROWTH = 0.1  # two growths of RMS within 10 % count as the same, as in the findings of a study
MOST_NAMED = 6  # operations, tensors or faults that a sentence lists


@dataclass(frozen=True)
class Hypothesis:
    """evidence: sentences with numbers.  command: what would test it, or reproduces the evidence."""

    id: str
    text: str
    status: Status
    evidence: tuple[str, ...]
    command: str


class Divergence(NamedTuple):
    """The first tap beyond its floor."""

    tap: str
    nmse: float
    floor: float


@dataclass(frozen=True)
class Facts:
    """What is known; None where it was not measured.

    same_ids: the engine ran the same token ids as the reference.  same_tokenization: its own tokenizer made them of the same text; None
    where the ids were given to it.  first_other_id: (position, expected id, engine's id), None past an end.
    kl_quantization, kl_expected, kl_engine: nats from the original's distribution to the quantized file's by exact arithmetic, by the
    engine's expected arithmetic, and to the engine's.  kl_own_expected, kl_own_engine: from the exact execution of the quantized file;
    where these are not known, the engine is judged by the former.  token_*: greedy tokens of the last position.
    growth_*: output RMS of the last layer / of the first.  first_divergence: None with compared taps means that none is beyond its floor.
    compared_taps: how many were judged.  convicted: operations wrong by local replay; () where all were cleared.
    other_tensors: those that differ from the original's beyond their types; () where none does.
    excluded, untestable: names of faults that the evidence rules out, and that cannot show in it.
    """

    model: str = "MODEL"
    engine: str = "ENGINE"
    original: str | None = None
    same_file: bool | None = None
    same_ids: bool | None = None
    same_tokenization: bool | None = None
    first_other_id: tuple[int, int | None, int | None] | None = None
    kl_quantization: float | None = None
    kl_expected: float | None = None
    kl_engine: float | None = None
    kl_own_expected: float | None = None
    kl_own_engine: float | None = None
    token_original: int | None = None
    token_quantized: int | None = None
    token_expected: int | None = None
    token_engine: int | None = None
    growth_original: float | None = None
    growth_quantized: float | None = None
    growth_engine: float | None = None
    compared_taps: int | None = None
    first_divergence: Divergence | None = None
    convicted: tuple[str, ...] | None = None
    other_tensors: tuple[str, ...] | None = None
    rounding: ActivationRounding | None = None
    excluded: tuple[str, ...] = ()
    untestable: tuple[str, ...] = ()


def split_facts(split: LogitSplit) -> dict[str, float | int | None]:
    """The fields of Facts that a split of the logits knows: ``Facts(**split_facts(split), same_file=True, ...)``."""
    original, quantized, expected, engine = split.tokens
    known = split.quantization is not None
    return {
        "kl_quantization": split.quantization,
        "kl_expected": split.expected if known else None,
        "kl_engine": split.engine if known else None,
        "kl_own_expected": split.own_expected,
        "kl_own_engine": split.own_engine,
        "token_original": original,
        "token_quantized": quantized,
        "token_expected": expected,
        "token_engine": engine,
    }


def ledger(facts: Facts) -> tuple[Hypothesis, ...]:
    """Every hypothesis with its status, in the order in which people suspect them."""
    return tuple(test(facts) for test in (_quantization, _architecture, _engine, _tokenizer, _file, _activation_rounding))


TEXTS = {
    "quantization-too-coarse": mark(
        "The quantization is too coarse: the file itself, computed exactly, gives another output than the original."
    ),
    "architecture-amplifies": mark("The architecture makes the signal grow from layer to layer, whatever the quantization."),
    "engine-bug": mark("The engine computes something else than the file says."),
    "tokenizer": mark("The engine's tokenizer makes other ids of the prompt."),
    "file-damaged": mark("The file is damaged or was converted wrongly."),
    "activation-rounding": mark("Rounding activations, as this engine is expected to do, changes the token."),
}


def hypothesis(name: str, status: Status, evidence: tuple[str, ...], command: str) -> Hypothesis:
    """The hypothesis of this id; empty sentences are left out."""
    return Hypothesis(name, say(TEXTS[name]), status, tuple(e for e in evidence if e), command)


def diagnose_command(facts: Facts) -> str:
    """``quantscope diagnose MODEL --against ENGINE [--original MODEL]``."""
    original = f" --original {_quoted(facts.original)}" if facts.original else ""
    return f"quantscope diagnose {_quoted(facts.model)} --against {_quoted(facts.engine)}{original}"


def _original(facts: Facts) -> str:
    return _quoted(facts.original or "ORIGINAL")


def _quoted(name: str) -> str:
    return shlex.quote(name)


# ---- Quantization -------------------------------------------------------------------------------------------------------


def _quantization(f: Facts) -> Hypothesis:
    """Supported where the exact execution of the quantized file changes the token, or moves the distribution as far as COARSE_NATS."""
    command = f"quantscope diagnose {_quoted(f.model)} --against {_quoted(f.engine)} --original {_original(f)}"
    tokens_known = f.token_original is not None and f.token_quantized is not None
    if not tokens_known and f.kl_quantization is None:
        return hypothesis(
            "quantization-too-coarse", "untested", (say("The original was not computed beside the quantized file."),), command
        )
    changed = tokens_known and f.token_original != f.token_quantized
    moved = f.kl_quantization is not None and not f.kl_quantization <= COARSE_NATS
    evidence = (_quantization_kl(f), _quantization_tokens(f) if tokens_known else "")
    return hypothesis("quantization-too-coarse", "supported" if changed or moved else "refuted", evidence, command)


def _quantization_kl(f: Facts) -> str:
    if f.kl_quantization is None:
        return ""
    raised = {"kl": sig(f.kl_quantization), "coarse": sig(COARSE_NATS)}
    if f.kl_engine is None:
        return say("Quantization alone raises KL from 0 to {kl} nats ({coarse} counts as coarse).", **raised)
    if f.kl_engine <= PREDICTED_TIMES * f.kl_quantization + KL_FLOOR:
        return say(
            "Quantization alone raises KL from 0 to {kl} nats ({coarse} counts as coarse); with the engine it is {engine}.",
            engine=sig(f.kl_engine),
            **raised,
        )
    return say(
        "Quantization alone raises KL from 0 to {kl} nats ({coarse} counts as coarse); with the engine it is {engine}, which quantization "
        "does not explain.",
        engine=sig(f.kl_engine),
        **raised,
    )


def _quantization_tokens(f: Facts) -> str:
    tokens = {"original": f.token_original, "quantized": f.token_quantized}
    if f.token_original == f.token_quantized:
        del tokens["quantized"]
        if f.token_engine is None:
            return say("Computed exactly, the quantized file keeps the original's token {original}.", **tokens)
        return say(
            "Computed exactly, the quantized file keeps the original's token {original}; the engine gives {engine}.",
            engine=f.token_engine,
            **tokens,
        )
    if f.token_engine is None:
        return say("Computed exactly, the quantized file changes the original's token {original} to {quantized}.", **tokens)
    return say(
        "Computed exactly, the quantized file changes the original's token {original} to {quantized}; the engine gives {engine}.",
        engine=f.token_engine,
        **tokens,
    )


# ---- Architecture -------------------------------------------------------------------------------------------------------


def _architecture(f: Facts) -> Hypothesis:
    """Supported where RMS grows as much without quantization, or without the engine; refuted where it does not."""
    command = f"quantscope study {_original(f)} {_quoted(f.model)}"
    grown = [
        (mark("{growth} in the original in float32"), f.growth_original),
        (mark("{growth} in the quantized file computed exactly"), f.growth_quantized),
        (mark("{growth} in the engine"), f.growth_engine),
    ]
    known = [(who, g) for who, g in grown if g is not None and 0 < g < math.inf]
    if not known:
        return hypothesis("architecture-amplifies", "untested", (say("RMS was not measured."),), command)
    each = [say(who, growth=times(g)) for who, g in known]
    if len(known) < 2:
        alone = say("RMS grows {growth}; nothing was measured beside it.", growth=each[0])
        return hypothesis("architecture-amplifies", "untested", (alone,), command)
    base, reference = known[0]
    grows = {"growth": each[0], "others": listed(each[1:])}
    if all(similar(reference, g) for _, g in known[1:]):
        if base == grown[0][0]:
            nature = say(
                "RMS grows {growth}, {others}: the same growth without quantization is the model's nature, no evidence of an error.",
                **grows,
            )
        else:
            nature = say(
                "RMS grows {growth}, {others}: the same growth without the engine is the model's nature, no evidence of an error.", **grows
            )
        return hypothesis("architecture-amplifies", "supported", (nature,), command)
    far = percent(max(abs(g / reference - 1) for _, g in known[1:]))
    apart = say("RMS grows {growth}, {others}: {far} apart, so it is not the model alone.", far=far, **grows)
    return hypothesis("architecture-amplifies", "refuted", (apart,), command)


def similar(a: float, b: float) -> bool:
    """Whether two growths are within SIMILAR_GROWTH of each other: max ≤ min · (1 + SIMILAR_GROWTH)."""
    return max(a, b) <= min(a, b) * (1 + SIMILAR_GROWTH)


# ---- Engine -------------------------------------------------------------------------------------------------------------


def _engine(f: Facts) -> Hypothesis:
    """Tested by the same file on the same ids only, beyond expected arithmetic."""
    command = diagnose_command(f)
    lacking = _not_comparable(f)
    if lacking:
        return hypothesis("engine-bug", "untested", (say("Not comparable: {why}.", why=lacking),), command)
    found = tuple(s for s in (_convicted(f), _diverged(f), _kl_unexplained(f)) if s)
    if found:
        return hypothesis("engine-bug", "supported", found, command)
    return hypothesis("engine-bug", "refuted", (_nothing_found(f),), command)


def _not_comparable(f: Facts) -> str:
    """Why no statement about the engine is possible; empty where one is."""
    if f.same_file is not True:
        return say("it ran another file") if f.same_file is False else say("nothing shows that both ran the same file")
    if f.same_ids is not True:
        return say("it ran other token ids") if f.same_ids is False else say("nothing shows that both ran the same token ids")
    if f.convicted is None and f.compared_taps is None and _engine_kl(f) is None:
        return say("neither taps nor logits of the engine were compared")
    return ""


def _engine_kl(f: Facts) -> tuple[float, float] | None:
    """(KL of the engine, KL of the expected arithmetic), from the exact execution of the file where that is known."""
    if f.kl_own_engine is not None and f.kl_own_expected is not None:
        return f.kl_own_engine, f.kl_own_expected
    return None if f.kl_engine is None or f.kl_expected is None else (f.kl_engine, f.kl_expected)


def _convicted(f: Facts) -> str:
    if not f.convicted:
        return ""
    named = some(f.convicted, MOST_NAMED)
    return say(
        "Recomputed from the engine's own inputs, {operations} wrong by themselves: {named}.",
        operations=count(len(f.convicted), "operation"),
        named=named,
    )


def _diverged(f: Facts) -> str:
    d = f.first_divergence
    if d is None:
        return ""
    return say("The first tap beyond its floor is {tap}: NMSE {error}, floor {floor}.", tap=d.tap, error=sci(d.nmse), floor=sci(d.floor))


def _kl_unexplained(f: Facts) -> str:
    kl = _engine_kl(f)
    if kl is None or within(*kl):
        return ""
    facts = {"expected": sig(kl[1]), "engine": sig(kl[0]), "times": f"{PREDICTED_TIMES:g}"}
    if f.kl_own_engine is not None:
        return say(
            "From the exact execution of the same file the engine's expected arithmetic raises KL to {expected} nats, the engine measures "
            "{engine}: more than {times} times, unexplained, implementation.",
            **facts,
        )
    return say(
        "From the original the engine's expected arithmetic raises KL to {expected} nats, the engine measures {engine}: more than {times} "
        "times, unexplained, implementation.",
        **facts,
    )


def _nothing_found(f: Facts) -> str:
    """Never "no bug": what was looked at, what is excluded by it, and what could not have shown."""
    looked = []
    if f.convicted is not None:
        looked.append(say("local replay"))
    if f.compared_taps is not None:
        looked.append(count(f.compared_taps, "tap"))
    if (kl := _engine_kl(f)) is not None:
        looked.append(say("KL {engine} nats with {expected} expected", engine=sig(kl[0]), expected=sig(kl[1])))
    return say(
        "Nothing found beyond expected arithmetic ({looked}); excluded: {excluded}; not testable with this evidence: {hidden}.",
        looked=listed(looked),
        excluded=some(f.excluded, MOST_NAMED) if f.excluded else say("what changes these values by more than rounding does"),
        hidden=some(f.untestable, MOST_NAMED) if f.untestable else say("what other prompts, lengths or settings would show"),
    )


# ---- Tokenizer and file -------------------------------------------------------------------------------------------------


def _tokenizer(f: Facts) -> Hypothesis:
    """Tested by the ids that the engine itself made of a text."""
    command = diagnose_command(f)
    if f.same_tokenization is False or f.same_ids is False:
        found = say("The token ids differ.")
        if f.first_other_id is not None:
            at, expected, theirs = f.first_other_id
            found = say(
                "The token ids differ, first at position {position}: {expected} expected, {found} in the engine.",
                position=at,
                expected=_id(expected),
                found=_id(theirs),
            )
        return hypothesis("tokenizer", "supported", (found,), command)
    if f.same_tokenization:
        return hypothesis("tokenizer", "refuted", (say("The engine made the same token ids of the same text."),), command)
    if f.same_ids:
        given = say("The engine was given its token ids, so its own tokenizer was not used.")
    else:
        given = say("The engine's token ids are not known.")
    return hypothesis("tokenizer", "untested", (given,), command)


def _id(token: int | None) -> str:
    return say("no token") if token is None else say("id {id}", id=token)


def _file(f: Facts) -> Hypothesis:
    """Tested by comparing tensors with another file of the same model."""
    command = f"quantscope weights {_original(f)} {_quoted(f.model)}"
    if f.other_tensors is None:
        if f.same_file:
            why = say("Both ran the same file, which would damage both alike; its tensors were not compared with another file's.")
        else:
            why = say("Its tensors were not compared with another file's.")
        return hypothesis("file-damaged", "untested", (why,), command)
    if f.other_tensors:
        differ = say(
            "{tensors} differ from the original's beyond their types: {names}.",
            tensors=count(len(f.other_tensors), "tensor"),
            names=some(f.other_tensors, MOST_NAMED),
        )
        return hypothesis("file-damaged", "supported", (differ,), command)
    return hypothesis("file-damaged", "refuted", (say("No tensor differs from the original's beyond what its type explains."),), command)


# ---- Activation rounding ------------------------------------------------------------------------------------------------


def _activation_rounding(f: Facts) -> Hypothesis:
    """Supported only where the emulation gives the engine's changed token and exact activations at some taps give the exact one."""
    command, exact, expected = diagnose_command(f), f.token_quantized, f.token_expected
    name = "activation-rounding"
    if exact is None or expected is None:
        return hypothesis(name, "untested", (say("The engine's expected arithmetic was not emulated."),), command)
    if exact == expected:
        if f.kl_own_expected is None:
            kept = say("The expected arithmetic keeps the exact token {exact}.", exact=exact)
        else:
            kept = say(
                "The expected arithmetic keeps the exact token {exact}; it raises KL from 0 to {kl} nats.",
                exact=exact,
                kl=sig(f.kl_own_expected),
            )
        return hypothesis(name, "refuted", (kept,), command)
    tokens = {"exact": exact, "expected": expected}
    if f.token_engine is None:
        unknown = say("The expected arithmetic changes the token from {exact} to {expected}; the engine's token is not known.", **tokens)
        return hypothesis(name, "untested", (unknown,), command)
    if f.token_engine != expected:
        other = say(
            "The expected arithmetic changes the token from {exact} to {expected}, but the engine gives {engine}.",
            engine=f.token_engine,
            **tokens,
        )
        return hypothesis(name, "refuted", (other,), command)
    return _restoring(name, command, f.rounding, exact, expected)


def _restoring(name: str, command: str, r: ActivationRounding | None, exact: int, expected: int) -> Hypothesis:
    """Whether exact activations give the exact token again, where the expected arithmetic changes it as the engine does."""
    tokens = {"exact": exact, "expected": expected}
    if r is None or (r.exact_token, r.rounded_token) != (exact, expected):
        sentence = say(
            "The expected arithmetic changes the token from {exact} to {expected} as in the engine; whether exact activations restore it "
            "was not tested.",
            **tokens,
        )
        return hypothesis(name, "untested", (sentence,), command)
    if not r.restored:
        sentence = say(
            "The expected arithmetic changes the token from {exact} to {expected} as in the engine, but exact activations restore it at no "
            "tap.",
            **tokens,
        )
        return hypothesis(name, "refuted", (sentence,), command)
    proof = say(
        "The expected arithmetic changes the token from {exact} to {expected} as in the engine; exact activations at {places} restore "
        "{exact}.",
        places=listed(r.places),
        **tokens,
    )
    channels = [
        say("Channel {index} of {tap} makes {share} of the rounding error there.", index=c.index, tap=c.tap, share=percent(c.share))
        for c in r.channels[:1]
    ]
    return hypothesis(name, "supported", (proof, *channels), command)
