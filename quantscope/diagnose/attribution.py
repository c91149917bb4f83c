"""The logits split three ways, in sentences that are true.

    KL(original ‖ exact) → KL(original ‖ expected) → KL(original ‖ engine)      exact, expected, engine: all on the quantized file
    judged:  KL(exact ‖ engine) against 4 · KL(exact ‖ expected) + 1e-7 nats

KL divergences do not add, so none is subtracted from another: the sentences say from where to where each step raises it.  Whether the
engine is explained is judged against the exact execution of its own file, where quantization has no part and cannot hide anything.

Source: definition of the Kullback-Leibler divergence; for small changes δ of the logits it is ½ · Var(δ), so it grows like NMSE.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

from quantscope.compare import PREDICTED_TIMES
from quantscope.diagnose.activation_rounding import ActivationRounding, Channel
from quantscope.errors import ShapeError
from quantscope.language import mark, say
from quantscope.metrics import first_argmax, kl_nats
from quantscope.phrases import clauses, count, listed, paragraph
from quantscope.wording import percent, sig

KL_FLOOR = 1e-7  # [nats] ½ · EXACT_FLOOR (NMSE 1e-9, the order of sums) · 14², the mean square of logits as large as models have
MOST_CHANNELS = 3  # that a sentence names

Verdict: TypeAlias = Literal["within", "below", "unexplained", "activation rounding"]


@dataclass(frozen=True)
class LogitSplit:
    """Mean KL divergences [nats] over n positions, greedy tokens of the last position, and at how many positions the token changes.

    quantization, expected, engine: from the original's distribution; from the exact execution of the file where there is no original
    (then quantization is None).  own_expected, own_engine: from the exact execution of the file.  tokens: (original or None, exact,
    expected, engine).  changed_by_quantization: exact against the original; changed_by_rounding: expected against exact; changed_by_engine:
    engine against exact.
    """

    n: int
    quantization: float | None
    expected: float
    engine: float
    own_expected: float
    own_engine: float
    tokens: tuple[int | None, int, int, int]
    changed_by_quantization: int | None
    changed_by_rounding: int
    changed_by_engine: int

    @property
    def explained(self) -> bool:
        """Whether the engine is as near to the exact execution of its file as its arithmetic is expected to be."""
        return within(self.own_engine, self.own_expected)

    @property
    def below(self) -> bool:
        """Whether the engine rounds clearly less than the expected arithmetic."""
        return self.own_engine * PREDICTED_TIMES < self.own_expected and self.own_expected > KL_FLOOR


def within(kl_engine: float, kl_expected: float) -> bool:
    """KL(exact ‖ engine) ≤ PREDICTED_TIMES · KL(exact ‖ expected) + KL_FLOOR; false for NaN."""
    return kl_engine <= PREDICTED_TIMES * kl_expected + KL_FLOOR


def split_logits(exact: Tensor, expected: Tensor, engine: Tensor, original: Tensor | None = None) -> LogitSplit:
    """The split of logits [T,V], sums in float64: of the quantized file exactly, by the expected arithmetic and by the engine, and of the
    original exactly.

    An engine's logits that are not all finite count as infinitely far.  Raises ShapeError where shapes differ or there is no position.
    """
    if exact.ndim != 2 or not exact.numel():
        raise ShapeError(f"logits: expected [positions, tokens] with at least one of each, found {tuple(exact.shape)}.")
    base = exact if original is None else original
    tops = [None if x is None else first_argmax(x) for x in (original, exact, expected, engine)]
    last = [None if top is None else int(top[-1]) for top in tops]
    assert last[1] is not None
    assert last[2] is not None
    assert last[3] is not None
    return LogitSplit(
        n=len(exact),
        quantization=None if original is None else _kl(original, exact),
        expected=_kl(base, expected),
        engine=_kl(base, engine),
        own_expected=_kl(exact, expected),
        own_engine=_kl(exact, engine),
        tokens=(last[0], last[1], last[2], last[3]),
        changed_by_quantization=_changed(tops[0], tops[1]),
        changed_by_rounding=_changed(tops[1], tops[2]) or 0,
        changed_by_engine=_changed(tops[1], tops[3]) or 0,
    )


def _kl(ref: Tensor, test: Tensor) -> float:
    kl = float(kl_nats(ref, test).mean())
    return kl if bool(test.isfinite().all()) else math.inf


def _changed(a: Tensor | None, b: Tensor | None) -> int | None:
    return None if a is None or b is None else int((a != b).sum())


def verdict(split: LogitSplit, rounding: ActivationRounding | None = None) -> Verdict:
    """What the logits say.

    "activation rounding" needs both: the expected arithmetic gives the engine's changed token, and exact activations at the places of
    ``rounding`` restore the exact one.  "within" and "below" say that nothing was found beyond the expected arithmetic, not that there
    is nothing.
    """
    if not split.explained:
        return "unexplained"
    if proven(split, rounding):
        return "activation rounding"
    return "below" if split.below else "within"


def proven(split: LogitSplit, rounding: ActivationRounding | None) -> bool:
    """Whether activation rounding is shown to be what changed the engine's token."""
    _, exact, expected, engine = split.tokens
    if rounding is None or not rounding.restored or exact == engine or expected != engine:
        return False
    return (rounding.exact_token, rounding.rounded_token) == (exact, expected)


# ---- Sentences ----------------------------------------------------------------------------------------------------------


def sentences(split: LogitSplit, rounding: ActivationRounding | None = None) -> tuple[str, ...]:
    """The split of the KL divergence, the tokens, and what rounding has to do with them; each sentence stands by itself."""
    return tuple(s for s in (_kl_sentence(split), _tokens(split), _rounding(split, rounding)) if s)


def _kl_sentence(s: LogitSplit) -> str:
    if s.quantization is None:
        return say(
            "Against the exact execution of the same file (there is no original, so quantization is not measured) this engine's expected "
            "arithmetic raises KL from 0 to {expected} nats; the engine measures {engine}: {judgement}.",
            expected=sig(s.expected),
            engine=sig(s.engine),
            judgement=_judgement(s),
        )
    return say(
        "Quantization alone raises KL from 0 to {quantization} nats; this engine's expected arithmetic brings it to {expected}; the engine "
        "measures {engine}: {judgement}.",
        quantization=sig(s.quantization),
        expected=sig(s.expected),
        engine=sig(s.engine),
        judgement=_judgement(s),
    )


def _judgement(s: LogitSplit) -> str:
    own = say(
        "{engine} nats from the exact execution of its own file, expected {expected}",
        engine=sig(s.own_engine),
        expected=sig(s.own_expected),
    )
    if not math.isfinite(s.own_engine):
        return say("some of its logits are not finite, which is unexplained, implementation")
    if not (s.below or s.explained or s.engine > s.expected):
        return say("as near to the original, but not in the same way: it is {own}, which is unexplained, implementation", own=own)
    if s.quantization is None:  # then the sentence says already how far the engine is from its own file
        if s.below:
            return say("it rounds less than expected; nothing found beyond expected arithmetic")
        if s.explained:
            return say("nothing found beyond expected arithmetic")
        return say("the rise from {expected} is unexplained, implementation", expected=sig(s.expected))
    if s.below:
        return say("it rounds less than expected ({own}); nothing found beyond expected arithmetic", own=own)
    if s.explained:
        return say("nothing found beyond expected arithmetic ({own})", own=own)
    return say("the rise from {expected} is unexplained, implementation ({own})", expected=sig(s.expected), own=own)


def _tokens(s: LogitSplit) -> str:
    original, exact, expected, engine = s.tokens
    changes = [] if s.changed_by_quantization is None else [(mark("{n} by quantization"), s.changed_by_quantization)]
    changes += [(mark("{n} by the expected arithmetic"), s.changed_by_rounding), (mark("{n} by the engine"), s.changed_by_engine)]
    facts = {
        "exact": exact,
        "expected": expected,
        "engine": engine,
        "positions": count(s.n, "position"),
        "changes": listed(say(words, n=n) for words, n in changes),
    }
    if original is None:
        return say(
            "Greedy token of the last position: quantized file exactly {exact}, expected arithmetic {expected}, engine {engine}; of "
            "{positions} changed: {changes}.",
            **facts,
        )
    return say(
        "Greedy token of the last position: original {original}, quantized file exactly {exact}, expected arithmetic {expected}, engine "
        "{engine}; of {positions} changed: {changes}.",
        original=original,
        **facts,
    )


def _rounding(s: LogitSplit, r: ActivationRounding | None) -> str:
    """Sentence on a token that the expected arithmetic changes; empty where it does not change it."""
    _, exact, expected, engine = s.tokens
    tokens = {"exact": exact, "expected": expected}
    if exact == expected:
        return ""
    if r is None:
        return say(
            "The expected arithmetic itself changes the token from {exact} to {expected}; which activations do it was not tested.", **tokens
        )
    if not r.restored:
        return say(
            "The expected arithmetic itself changes the token from {exact} to {expected}, but exact activations restore it at no tap: it "
            "is not the rounding of products' activations alone.",
            **tokens,
        )
    where = _restored(exact, r)
    if not proven(s, r):
        return say(
            "The expected arithmetic changes the token from {exact} to {expected} ({where}), but the engine gives {engine}.",
            where=where,
            engine=engine,
            **tokens,
        )
    if not s.explained:
        return say(
            "Activation rounding alone changes the token from {exact} to {expected} as in the engine ({where}), but it is not all.",
            where=where,
            **tokens,
        )
    proof = say(
        "Activation rounding, not the weights and no fault found in the code: the emulated arithmetic gives the engine's token {engine}, "
        "and {where}.",
        engine=engine,
        where=where,
    )
    return paragraph([proof, _channels(r.channels)])


def _restored(exact: int, r: ActivationRounding) -> str:
    """What exact activations do to the token and to the error of the logits."""
    facts = {"places": listed(r.places), "exact": exact, "left": percent(r.left)}
    if not r.near_tie:
        return say(
            "exact activations at {places} restore token {exact}, and all but {left} of the error of the logits goes with it", **facts
        )
    return say(
        "exact activations at {places} restore token {exact}, and all but {left} of the error of the logits goes with it; in exact logits "
        "the two tokens are only {gap} apart, where smaller changes decide as well",
        gap=sig(r.gap_exact),
        **facts,
    )


def _channels(channels: tuple[Channel, ...]) -> str:
    named = [c for c in channels if c.block > 1][:MOST_CHANNELS]
    if not named:
        return ""
    each = clauses(
        say(
            "channel {index} of {tap}, {times} times the RMS, sets the scale of blocks of {block} that make {share} of the rounding error "
            "there",
            index=c.index,
            tap=c.tap,
            times=sig(c.times_rms),
            block=c.block,
            share=percent(c.share),
        )
        for c in named
    )
    return say("{channels}.", channels=f"{each[0].upper()}{each[1:]}")
