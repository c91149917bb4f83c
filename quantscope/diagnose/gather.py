"""The evidence that comes before any arithmetic: is it the same file, are these the same ids; and the trace to judge.

from_trace(model, trace, ...)       a trace that some engine has left
from_engine(request, ...)           an engine that can be run here, on the prompt and on probes
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

from quantscope.diagnose.diagnosis import Evidence
from quantscope.diagnose.evidence import Record
from quantscope.diagnose.token_ids import ids_verdict
from quantscope.engines import Request
from quantscope.engines.isolated import run_to_file
from quantscope.errors import VocabularyError
from quantscope.sources.base import Source
from quantscope.sources.resolve import open_source
from quantscope.trace import Trace


def from_engine(request: Request, original: str | None, *, keep: Path | None = None) -> Evidence:
    """Run the engine on the request's ids.  keep: where its trace stays.  Raises what running it raises."""
    with TemporaryDirectory(prefix="quantscope-diagnose-") as folder:
        trace = run_to_file(request, keep or Path(folder) / "engine.safetensors")
    again = f"quantscope trace {request.model} --engine {request.engine} --tokens {_joined(request.tokens)}"
    records = (
        Record("file", "SHA-256 of the file", "agrees", f"{request.engine} ran the file itself.", again),
        Record("ids", "token ids", "agrees", f"{request.engine} was given the ids of the reference.", again),
    )
    return Evidence(request.model, trace, original, records=records, against=request.engine)


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

    prompt, ids: what the engine was meant to run, where the user says it.  n_prompt: tokens of its first batch.
    """
    with closing(open_source(model)) as source:
        file = _file_record(source, model, trace)
        about_ids = _ids_record(source, model, trace, prompt, ids)
    given = None if trace.origin.tokens is not None or about_ids is None else _ids_of(model, prompt, ids)
    records = tuple(r for r in (file, about_ids) if r is not None)
    stop = "not comparable" if file.conclusion == "differs" else None
    if stop is None and about_ids is not None and about_ids.conclusion == "differs":
        stop = "tokenizer"
    return Evidence(model, trace, original, n_prompt, given, records, against, stop)  # type: ignore[arg-type]


def _file_record(source: Source, model: str, trace: Trace) -> Record:
    """Whether the engine ran this very file, by its hash."""
    command, measured = f"sha256sum {model}", "SHA-256 of the file"
    theirs = trace.origin.model_sha256
    if theirs is None:
        text = f"{trace.title} does not say the hash of its file: that it ran this one is taken on trust."
        return Record("file", measured, "not measured", text, command)
    own = source.sha256()
    if own == theirs:
        return Record("file", measured, "agrees", f"Both ran the same file ({own[:12]}…).", command)
    text = (
        f"{trace.title} ran another file ({theirs[:12]}…) than {model} ({own[:12]}…): what differs between two files is not the engine's "
        f"doing. Trace the engine on this file, or compare the files with `quantscope weights`."
    )
    return Record("file", measured, "differs", text, command)


def _ids_record(source: Source, model: str, trace: Trace, prompt: str | None, ids: Sequence[int] | None) -> Record:
    """Whether the engine ran the right ids."""
    found = trace.origin.tokens
    command = f"quantscope diagnose {model} --against TRACE --prompt TEXT"
    if found is None:
        text = "The trace does not say its ids" + (": those given are taken on trust." if prompt is not None or ids is not None else ".")
        return Record("ids", "token ids", "not measured", text, f"{command}  # or --tokens 1,2,3")
    try:
        verdict = ids_verdict(source, prompt, ids, found)
    except VocabularyError as e:
        return Record("ids", "token ids", "not measured", f"The vocabulary cannot be used: {e}", command)
    if verdict.same or (prompt is None and ids is None):
        doubt = "" if verdict.same else " They are not those that the vocabulary makes of the text they spell: give it with --prompt."
        return Record("ids", "token ids", "agrees", f"The reference runs the ids of the trace.{doubt} {verdict.sentence}", command)
    return Record("ids", "token ids", "differs", verdict.sentence, command)


def _ids_of(model: str, prompt: str | None, ids: Sequence[int] | None) -> tuple[int, ...] | None:
    if ids is not None:
        return tuple(ids)
    if prompt is None:
        return None
    from quantscope.inputs import prompt_ids

    return tuple(prompt_ids(model, prompt))


def _joined(ids: Sequence[int]) -> str:
    return ",".join(map(str, ids))
