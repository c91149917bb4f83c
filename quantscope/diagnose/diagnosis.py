"""The whole verdict: is it the quantization, the engine, the file or the prompt?

    diagnose(Question(model, against, ...))  →  Diagnosis

Evidence is gathered cheapest first; what makes the rest meaningless (another file, other ids) ends it.  Every statement is about this file,
these ids and this evidence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantscope.compare import Comparison, Kind, compare
from quantscope.diagnose.activation_rounding import ActivationRounding, activation_rounding
from quantscope.diagnose.attribution import LogitSplit, proven, sentences, split_logits
from quantscope.diagnose.causes import Causes, find
from quantscope.diagnose.convictions import expected_rounding
from quantscope.diagnose.evidence import Evidence, Record, Verdict
from quantscope.diagnose.facts import facts_of
from quantscope.diagnose.ledger import Hypothesis, ledger
from quantscope.diagnose.next_steps import what_to_record
from quantscope.diagnose.records import tap_records
from quantscope.engines.reference import trace as exact_trace
from quantscope.errors import TraceContentError
from quantscope.explain import rotation
from quantscope.model.ggml_arithmetic import GgmlArithmetic
from quantscope.model.taps import place_of
from quantscope.sources.resolve import open_source
from quantscope.three_way import SplitRow, three_way
from quantscope.trace import Full, Trace, covered, rows_of
from quantscope.weights import Weights

LOGITS = "result_output"


@dataclass(frozen=True)
class Diagnosis:
    """verdict and level say the same in a word and in a number; answer says it in sentences, the rest is what they rest on."""

    model: str
    engine: str
    verdict: Verdict
    level: int
    evidence: tuple[Record, ...]
    ledger: tuple[Hypothesis, ...]
    causes: Causes | None = None
    comparison: Comparison | None = None
    split: tuple[SplitRow, ...] = ()
    logits: LogitSplit | None = None
    rounding: ActivationRounding | None = None
    about_logits: tuple[str, ...] = ()
    probe: str = ""  # that this is about, where it is not the prompt
    turned: str | None = None  # what RoPE setting the engine used, where it rotates otherwise
    next_steps: tuple[str, ...] = ()


def judge(e: Evidence) -> Diagnosis:
    """The diagnosis of one trace.  Raises what opening the model, comparing and replaying raise."""
    engine = e.test.origin.engine
    if e.stop is not None:
        return Diagnosis(e.model, engine, e.stop, 0, e.records, ledger(facts_of(e)))
    tokens = e.test.origin.tokens or e.ids
    weights = Weights(open_source(e.model), keep=True)
    if tokens is None:
        causes = find(e.test, weights)
        return Diagnosis(
            e.model, engine, "engine" if causes.level > 2 else "not comparable", causes.level, e.records, ledger(facts_of(e)), causes
        )
    ref = exact_trace(e.model, tokens, weights=weights)
    expected = expected_trace(e.model, tokens, e.test, weights)
    comparison = compare(ref, e.test, predicted=expected)
    causes = find(e.test, weights, (ref, comparison), n_prompt=e.n_prompt, ids=tokens)
    original = None if e.original is None else exact_trace(e.original, tokens)
    split = _split(ref, e.test, original, expected)
    logits = _logits(ref, e.test, original, expected)
    rounding = _rounding(e, weights, tokens, logits)
    verdict = _verdict(causes, logits, rounding)
    facts = facts_of(e, ref, original, comparison, causes, logits, rounding)
    records = (*e.records, *tap_records(e, comparison, causes))
    said = () if logits is None else sentences(logits, rounding)
    turned = rotation(ref, e.test, comparison)
    return Diagnosis(
        e.model,
        engine,
        verdict,
        causes.level,
        records,
        ledger(facts),
        causes,
        comparison,
        split,
        logits,
        rounding,
        said,
        e.probe,
        turned,
        () if verdict == "within" else _next_steps(e, comparison, weights),
    )


def expected_trace(model: str, tokens: Sequence[int], test: Trace, weights: Weights) -> Trace | None:
    """The trace of the arithmetic that an engine may have by its own account; None for a float32 engine.  weights: the model's."""
    m = expected_rounding(test.origin)
    if m is None:
        return None
    if isinstance(m, GgmlArithmetic):
        return exact_trace(model, tokens, arithmetic="ggml", kv=m.kv, weights=weights)
    return exact_trace(model, tokens, arithmetic="bf16", weights=weights)


def _split(ref: Trace, test: Trace, original: Trace | None, expected: Trace | None) -> tuple[SplitRow, ...]:
    try:
        return three_way(ref, test, original=original, predicted=expected)
    except TraceContentError:
        return ()


def _logits(ref: Trace, test: Trace, original: Trace | None, expected: Trace | None) -> LogitSplit | None:
    """The split of the logits at the positions that the engine has them of; None where it has not all values."""
    own = test.find(LOGITS, Full)
    if own is None:
        return None
    there = covered(own, test.origin) or tuple(range(len(own.values)))
    rows = [None if t is None else _rows(t, there) for t in (ref, expected or ref, original)]
    exact, rounded, before = rows
    if exact is None or rounded is None or exact.shape != own.values.shape or (before is not None and before.shape != exact.shape):
        return None
    return split_logits(exact, rounded, own.values.float(), before)


def _rows(trace: Trace, there: Sequence[int]) -> Tensor | None:
    full = trace.find(LOGITS, Full)
    return None if full is None else rows_of(full, trace.origin, there)


def _rounding(e: Evidence, weights: Weights, tokens: Sequence[int], logits: LogitSplit | None) -> ActivationRounding | None:
    """What changes the token in the expected arithmetic; looked for only where the engine's token is that changed one."""
    m = expected_rounding(e.test.origin)
    if logits is None or not isinstance(m, GgmlArithmetic) or logits.tokens[1] == logits.tokens[2]:
        return None
    return activation_rounding(weights, torch.tensor([list(tokens)], dtype=torch.int64), m.kv)


def _verdict(causes: Causes, logits: LogitSplit | None, rounding: ActivationRounding | None) -> Verdict:
    if causes.level >= 2:
        return "engine"
    if logits is None:
        return "within"
    if proven(logits, rounding):
        return "activation rounding"
    before, exact = logits.tokens[:2]
    return "quantization" if before is not None and before != exact else "within"


def _next_steps(e: Evidence, c: Comparison, weights: Weights) -> tuple[str, ...]:
    """What to record next where the evidence is too weak to convict an operation."""
    kinds: set[Kind] = {row.kind for row in c.rows}
    first = c.first_divergence
    layer = None if first is None else place_of(first.tap)[1]
    return tuple(what_to_record(e.test.origin.engine, kinds, tuple(e.test.taps), layer, weights.config, e.model))
