"""The whole verdict: is it the quantization, the engine, the file or the prompt?

    diagnose(Question(model, against, ...))  →  Diagnosis

Evidence is gathered cheapest first; what makes the rest meaningless (another file, other ids) ends it.  Every statement is about this file,
these ids and this evidence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from quantscope.compare import Comparison, SplitRow, compare, three_way
from quantscope.diagnose.activation_rounding import ActivationRounding, activation_rounding
from quantscope.diagnose.attribution import LogitSplit, proven, sentences, split_logits
from quantscope.diagnose.causes import Causes, find
from quantscope.diagnose.convictions import expected_rounding
from quantscope.diagnose.evidence import Record
from quantscope.diagnose.ledger import Divergence, Facts, Hypothesis, ledger, split_facts
from quantscope.engines.reference import trace as exact_trace
from quantscope.errors import QuantscopeError, TraceContentError
from quantscope.explain import rotation
from quantscope.metrics import rms
from quantscope.model.ggml_arithmetic import GgmlArithmetic
from quantscope.sources.resolve import open_source
from quantscope.trace import Full, Trace, covered, rows_of
from quantscope.weight_compare import compare_weights
from quantscope.weights import Weights

Verdict: TypeAlias = Literal["not comparable", "tokenizer", "engine", "activation rounding", "quantization", "file", "within"]
LOGITS = "result_output"


@dataclass(frozen=True)
class Evidence:
    """What is known before the causes are looked for: the trace to judge, the exact one beside it, and the commands that made them."""

    model: str
    test: Trace
    original: str | None = None
    n_prompt: int | None = None
    ids: tuple[int, ...] | None = None  # where the trace does not say them
    records: tuple[Record, ...] = ()
    against: str = ""  # as it was given
    stop: Verdict | None = None  # why the traces cannot be compared


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
    turned: str | None = None  # what RoPE setting the engine used, where it rotates otherwise
    next_steps: tuple[str, ...] = ()


def judge(e: Evidence) -> Diagnosis:
    """The diagnosis of one trace.  Raises what opening the model, comparing and replaying raise."""
    engine = e.test.origin.engine
    if e.stop is not None:
        return Diagnosis(e.model, engine, e.stop, 0, e.records, ledger(_facts(e)))
    tokens = e.test.origin.tokens or e.ids
    weights = Weights(open_source(e.model), keep=True)
    if tokens is None:
        causes = find(e.test, weights)
        return Diagnosis(
            e.model, engine, "engine" if causes.level > 2 else "not comparable", causes.level, e.records, ledger(_facts(e)), causes
        )
    ref = exact_trace(e.model, tokens)
    expected = _expected(e, tokens)
    comparison = compare(ref, e.test, predicted=expected)
    causes = find(e.test, weights, (ref, comparison), n_prompt=e.n_prompt, ids=tokens)
    original = None if e.original is None else exact_trace(e.original, tokens)
    split = _split(ref, e.test, original, expected)
    logits = _logits(ref, e.test, original, expected)
    rounding = _rounding(e, weights, tokens, logits)
    verdict = _verdict(causes, logits, rounding)
    facts = _facts(e, ref, original, comparison, causes, logits, rounding)
    records = (*e.records, *_tap_records(e, comparison, causes))
    said = () if logits is None else sentences(logits, rounding)
    turned = rotation(ref, e.test, comparison)
    return Diagnosis(
        e.model, engine, verdict, causes.level, records, ledger(facts), causes, comparison, split, logits, rounding, said, turned
    )


def _expected(e: Evidence, tokens: Sequence[int]) -> Trace | None:
    """The trace of the arithmetic that the engine may have by its own account; None for a float32 engine."""
    m = expected_rounding(e.test.origin)
    if m is None:
        return None
    if isinstance(m, GgmlArithmetic):
        return exact_trace(e.model, tokens, arithmetic="ggml", kv=m.kv)
    return exact_trace(e.model, tokens, arithmetic="bf16")


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


# ---- records -------------------------------------------------------------------------------------------------------------------------


def _tap_records(e: Evidence, c: Comparison, causes: Causes) -> tuple[Record, ...]:
    return tuple(r for r in (_weights_record(e, c), _taps_record(e, c), _replay_record(e, causes)) if r is not None)


def _commands(e: Evidence) -> tuple[str, str]:
    """(how to make the reference, how to compare it)."""
    ids = ",".join(map(str, e.test.origin.tokens or e.ids or ()))
    trace = f"quantscope trace {e.model} --tokens {ids} -o exact.safetensors"
    engines = ("llama.cpp", "transformers")
    own = f" && quantscope trace {e.model} --engine {e.against} --tokens {ids} -o engine.safetensors" if e.against in engines else ""
    return trace + own, f"quantscope compare exact.safetensors {'engine.safetensors' if own else e.against}"


def _weights_record(e: Evidence, c: Comparison) -> Record | None:
    """Whether the weights decode alike, by the elements of the embedding: the only tap that is nothing but weights."""
    row = next((r for r in c.rows if r.tap == "embd"), None)
    made, compared = _commands(e)
    if row is None:
        return Record("weights", "rows of token_embd.weight, element by element", "not measured", "The trace has no embedding.", made)
    text = f"{row.n} of {row.n_all} values compared" if row.kind in ("values", "sample") else f"compared by its {row.kind}"
    conclusion = "differs" if row.verdict == "differs" else "agrees" if row.verdict == "within" else "not measured"
    return Record("weights", "rows of token_embd.weight", conclusion, f"{text}.", f"{made} && {compared}", row.nmse, row.floor)  # type: ignore[arg-type]


def _taps_record(e: Evidence, c: Comparison) -> Record:
    made, compared = _commands(e)
    first = c.first_divergence
    n = sum(row.verdict == "differs" for row in c.rows)
    if first is None:
        shown = [row for row in c.rows if row.verdict == "within"]
        worst = max(shown, key=lambda row: row.nmse / row.floor, default=None)
        text = f"{len(shown)} of {len(c.rows)} taps are within their floor." + (f" Nearest to it: {worst.tap}." if worst else "")
        value, floor = (worst.nmse, worst.floor) if worst else (None, None)
        return Record(
            "taps", "every tap against the exact run", "agrees" if shown else "not measured", text, f"{made} && {compared}", value, floor
        )
    text = f"{n} of {len(c.rows)} taps exceed their floor, first {first.tap}."
    return Record("taps", "every tap against the exact run", "differs", text, f"{made} && {compared}", first.nmse, first.floor)


def _replay_record(e: Evidence, causes: Causes) -> Record:
    _, compared = _commands(e)
    command, what = f"{compared} --model {e.model}", "every operation again from the engine's own inputs"
    if causes.replayed is None:
        return Record("replay", what, "not measured", "It needs the whole tensors of an operation and of its inputs.", command)
    convicted, cleared = causes.replayed.those("convicted"), causes.replayed.those("cleared")
    if not convicted:
        return Record("replay", what, "agrees", f"All {len(cleared)} operations that could be judged are right.", command)
    worst = convicted[0]
    text = f"{len(convicted)} wrong by themselves, first {worst.tap} ({worst.operation}); {len(cleared)} right."
    return Record("replay", what, "differs", text, command, worst.nmse, worst.floor)


# ---- facts ---------------------------------------------------------------------------------------------------------------------------


def _facts(
    e: Evidence,
    ref: Trace | None = None,
    original: Trace | None = None,
    c: Comparison | None = None,
    causes: Causes | None = None,
    logits: LogitSplit | None = None,
    rounding: ActivationRounding | None = None,
) -> Facts:
    by_id = {r.id: r.conclusion for r in e.records}
    known: Mapping[str, bool | None] = {"agrees": True, "differs": False, "not measured": None}
    first = None if c is None else c.first_divergence
    replayed, searched = (None, None) if causes is None else (causes.replayed, causes.searched)
    return Facts(
        model=e.model,
        engine=e.against or e.test.origin.engine,
        original=e.original,
        same_file=known[by_id.get("file", "not measured")],
        same_ids=known[by_id.get("ids", "not measured")],
        same_tokenization=known[by_id.get("tokenizer", "not measured")],
        **({} if logits is None else split_facts(logits)),  # type: ignore[arg-type]
        growth_original=_growth(original),
        growth_quantized=_growth(ref),
        growth_engine=_growth(e.test),
        compared_taps=None if c is None else sum(row.verdict != "not shown" for row in c.rows),
        first_divergence=None if first is None else Divergence(first.tap, first.nmse, first.floor),
        convicted=None if replayed is None else tuple(row.tap for row in replayed.those("convicted")),
        other_tensors=_other_tensors(e),
        rounding=rounding,
        excluded=() if searched is None else searched.excluded,
        untestable=() if searched is None else searched.untestable,
    )


def _growth(trace: Trace | None) -> float | None:
    """Output RMS of the last layer over that of the first, of whole tensors over all positions."""
    if trace is None or trace.origin.config is None:
        return None
    first, last = (trace.find(f"l_out-{i}", Full) for i in (0, int(trace.origin.config["n_layer"]) - 1))
    if first is None or last is None or first.values.shape != last.values.shape:
        return None
    return float(rms(last.values.flatten()) / rms(first.values.flatten()))


def _other_tensors(e: Evidence) -> tuple[str, ...] | None:
    """Tensors of the file that differ from the original's beyond their types; None without an original."""
    if e.original is None:
        return None
    try:
        with closing(open_source(e.original)) as a, closing(open_source(e.model)) as b:
            return tuple(row.name for row in compare_weights(Weights(a), Weights(b)).unexplained)
    except QuantscopeError:
        return None
