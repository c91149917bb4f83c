"""From what a user names to the diagnosis: an engine that is run here, or a trace that is there.

diagnose(model, against)  →  Diagnosis
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quantscope.diagnose.diagnosis import Diagnosis, judge
from quantscope.diagnose.evidence import Evidence
from quantscope.diagnose.gather import from_engine, from_trace
from quantscope.engines import ENGINES, Dtype, Request, check
from quantscope.errors import UsageError
from quantscope.inputs import prompt_ids
from quantscope.qtypes import KVType
from quantscope.trace import Trace
from quantscope.trace_file import load


def diagnose(
    model: str,
    against: str | Trace,
    *,
    original: str | None = None,
    prompt: str | None = None,
    tokens: Sequence[int] | None = None,
    first_batch: int | None = None,
    kv: KVType = "F16",
    dtype: Dtype = "float32",
    threads: int | None = None,
    probes: bool = True,
    keep: Path | None = None,
) -> Diagnosis:
    """The diagnosis of an engine on a model file.

    against: the name of an engine, which is run on the prompt (or tokens) and on probes; or a trace or its file, of any engine.
    first_batch: tokens of the trace's first batch, those after it were decoded one by one.  kv, dtype, threads: of the engine that is run.
    keep: a folder in which the trace of an engine that is run stays.
    Raises UsageError for options that contradict each other, and what running the engine, opening the files and comparing raise.
    """
    if prompt is not None and tokens is not None:
        raise UsageError("--prompt and --tokens both say what was run, expected one of them. Leave one out.")
    ids = None if tokens is None else tuple(tokens)
    if isinstance(against, Trace) or against not in ENGINES:
        trace, path = (against, "TRACE") if isinstance(against, Trace) else (load(Path(against)), against)
        return judge(from_trace(model, trace, path, original, prompt=prompt, ids=ids, n_prompt=first_batch))
    if first_batch is not None:
        raise UsageError(f"--first-batch: {against} is run in one batch, expected it with a trace only. Leave it out.")
    request = Request(against, model, ids or tuple(prompt_ids(model, prompt)), dtype=dtype, kv=kv, threads=threads)
    check(request)
    return _judged(from_engine(request, original, keep=_trace_file(keep, against), probes=probes))


def _trace_file(folder: Path | None, engine: str) -> Path | None:
    if folder is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{engine}.safetensors"


def _judged(cases: Sequence[Evidence]) -> Diagnosis:
    """The prompt's diagnosis, or that of the first probe that differs where only a probe shows the engine's fault."""
    d = judge(cases[0])
    return judge(cases[1]) if len(cases) > 1 and d.verdict != "engine" else d
