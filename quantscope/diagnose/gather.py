"""The evidence that comes before any arithmetic: is it the same file, are these the same ids; and the trace to judge.

from_trace(model, trace, ...)       a trace that some engine has left
from_engine(request, ...)           an engine that can be run here, on the prompt and on probes
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from quantscope.compare import compare
from quantscope.diagnose.diagnosis import expected_trace
from quantscope.diagnose.evidence import Evidence, Record
from quantscope.diagnose.probes import ProbeResult, run_probes
from quantscope.diagnose.records import EXCEED
from quantscope.diagnose.token_ids import ids_verdict
from quantscope.engines import IN_STEPS, Request
from quantscope.engines.reference import trace as exact_trace
from quantscope.errors import EngineError, VocabularyError
from quantscope.language import say
from quantscope.phrases import paragraph
from quantscope.sources.base import Source
from quantscope.sources.resolve import open_source
from quantscope.trace import Trace
from quantscope.trace_file import save
from quantscope.weights import Weights


def from_engine(request: Request, original: str | None, *, keep: Path | None = None, probes: bool = True) -> list[Evidence]:
    """Run the engine on the request's ids, and on probes: the evidence of the ids first, then that of the probes that differ.

    keep: where the trace of the ids stays.  Raises what running the engine on the ids raises; a probe that fails is a record.
    """
    results = run_probes(request, request.tokens, None if probes else ["text"])
    text = next(r for r in results if r.probe.name == "text")
    if text.trace is None:
        raise EngineError(text.error)
    if keep is not None:
        save(text.trace, keep)
    judged = [r for r in results if r.probe.name != "text"]
    records = (*_given(request), *(r for r in map(_Probed(request), judged)))
    against = request.engine
    others = [r for r, record in zip(judged, records[2:], strict=True) if record.conclusion == "differs" and r.trace is not None]
    evidence = [Evidence(request.model, text.trace, original, records=records, against=against)]
    for r in sorted(others, key=lambda r: r.probe.name != "decode"):  # the cache first: the probes of few tokens are in the text too
        assert r.trace is not None
        n_prompt = 1 if r.probe.name == "decode" else None
        evidence.append(Evidence(request.model, r.trace, original, n_prompt, records=records, against=against, probe=r.probe.name))
    return evidence


def _given(request: Request) -> tuple[Record, Record]:
    again = f"quantscope trace {request.model} --engine {request.engine} --tokens {_joined(request.tokens)}"
    return (
        Record("file", say("SHA-256 of the file"), "agrees", say("{engine} ran the file itself.", engine=request.engine), again),
        Record("ids", say("token ids"), "agrees", say("{engine} was given the ids of the reference.", engine=request.engine), again),
    )


class _Probed:
    """What each probe of a request has shown, as a record; those that need a reference are compared with the exact run of their ids."""

    def __init__(self, request: Request) -> None:
        self._model, self._weights = request.model, Weights(open_source(request.model))

    def __call__(self, r: ProbeResult) -> Record:
        command = " && ".join(r.commands)
        exercises = say(r.probe.exercises)
        if r.trace is None:
            return Record(r.probe.name, exercises, "not measured", r.error, command)
        if r.conclusion == "not judged":
            return self._compared(r, r.trace, command)
        if r.conclusion == "differs":
            text = say("First tap beyond its floor: {tap} ({shows}).", tap=r.first, shows=say(r.probe.alone))
            return Record(r.probe.name, exercises, "differs", text, command, r.nmse, r.floor)
        return Record(r.probe.name, exercises, "agrees", say("Nearest to its floor: {tap}.", tap=r.tap), command, r.nmse, r.floor)

    def _compared(self, r: ProbeResult, trace: Trace, command: str) -> Record:
        exact = exact_trace(self._model, r.tokens, weights=self._weights)
        c = compare(exact, trace, predicted=expected_trace(self._model, r.tokens, trace, self._weights))
        first = c.first_divergence
        if first is not None:
            text = say(EXCEED, n=sum(row.verdict == "differs" for row in c.rows), total=len(c.rows), tap=first.tap)
            return Record(r.probe.name, say(r.probe.exercises), "differs", text, command, first.nmse, first.floor)
        worst = max(c.rows, key=lambda row: row.nmse / row.floor)
        text = say("All {n} taps are within their floor.", n=len(c.rows))
        return Record(r.probe.name, say(r.probe.exercises), "agrees", text, command, worst.nmse, worst.floor)


def from_trace(
    model: str,
    trace: Trace,
    against: str,
    original: str | None,
    *,
    prompt: str | None = None,
    ids: Sequence[int] | None = None,
    n_prompt: int | None = None,
) -> Evidence:
    """Judge whether a trace can be compared with this model at all.

    prompt, ids: what the engine was meant to run, where the user says it.  n_prompt: tokens of its first batch; one where the trace says
    that it was decoded token by token.
    """
    with closing(open_source(model)) as source:
        file = _file_record(source, model, trace)
        about_ids = _ids_record(source, model, trace, prompt, ids)
    given = None if trace.origin.tokens is not None or about_ids is None else _ids_of(model, prompt, ids)
    records = tuple(r for r in (file, about_ids) if r is not None)
    if n_prompt is None and IN_STEPS in trace.origin.notes:
        n_prompt = 1
    stop = "not comparable" if file.conclusion == "differs" else None
    if stop is None and about_ids is not None and about_ids.conclusion == "differs":
        stop = "tokenizer"
    return Evidence(model, trace, original, n_prompt, given, records, against, stop=stop)  # type: ignore[arg-type]


def _file_record(source: Source, model: str, trace: Trace) -> Record:
    """Whether the engine ran this very file, by its hash."""
    command, measured = f"sha256sum {model}", say("SHA-256 of the file")
    theirs = trace.origin.model_sha256
    if theirs is None:
        text = say("{trace} does not say the hash of its file: that it ran this one is taken on trust.", trace=trace.title)
        return Record("file", measured, "not measured", text, command)
    own = source.sha256()
    if own == theirs:
        return Record("file", measured, "agrees", say("Both ran the same file ({sha256}…).", sha256=own[:12]), command)
    text = say(
        "{trace} ran another file ({theirs}…) than {model} ({own}…): what differs between two files is not the engine's doing. Trace the "
        "engine on this file, or compare the files with `quantscope weights`.",
        trace=trace.title,
        theirs=theirs[:12],
        model=model,
        own=own[:12],
    )
    return Record("file", measured, "differs", text, command)


def _ids_record(source: Source, model: str, trace: Trace, prompt: str | None, ids: Sequence[int] | None) -> Record:
    """Whether the engine ran the right ids."""
    found = trace.origin.tokens
    command, measured = f"quantscope diagnose {model} --against TRACE --prompt TEXT", say("token ids")
    if found is None:
        given = prompt is not None or ids is not None
        text = say("The trace does not say its ids: those given are taken on trust.") if given else say("The trace does not say its ids.")
        return Record("ids", measured, "not measured", text, f"{command}  # or --tokens 1,2,3")
    try:
        verdict = ids_verdict(source, prompt, ids, found)
    except VocabularyError as e:
        return Record("ids", measured, "not measured", say("The vocabulary cannot be used: {error}", error=e), command)
    if verdict.same or (prompt is None and ids is None):
        doubt = say("They are not those that the vocabulary makes of the text they spell: give it with --prompt.")
        text = paragraph([say("The reference runs the ids of the trace."), "" if verdict.same else doubt, verdict.sentence])
        return Record("ids", measured, "agrees", text, command)
    return Record("ids", measured, "differs", verdict.sentence, command)


def _ids_of(model: str, prompt: str | None, ids: Sequence[int] | None) -> tuple[int, ...] | None:
    if ids is not None:
        return tuple(ids)
    if prompt is None:
        return None
    from quantscope.inputs import prompt_ids

    return tuple(prompt_ids(model, prompt))


def _joined(ids: Sequence[int]) -> str:
    return ",".join(map(str, ids))
