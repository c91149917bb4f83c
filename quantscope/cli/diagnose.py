"""``quantscope diagnose``: is it the quantization, the engine, the file or the prompt?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantscope.cli.lang import Lang, LangOption
from quantscope.cli.study import parse_ids
from quantscope.cli.trace import KV, DtypeName, Threads
from quantscope.errors import UsageError

if TYPE_CHECKING:
    from quantscope.diagnose.diagnosis import Diagnosis
    from quantscope.diagnose.evidence import Evidence

Model = Annotated[str, typer.Argument(metavar="MODEL", help="The file that the engine ran.", show_default=False)]
Against = Annotated[
    str,
    typer.Option(metavar="ENGINE|TRACE", help="llama.cpp or transformers, which is run; or a trace of any engine.", show_default=False),
]
Original = Annotated[
    str | None, typer.Option(metavar="MODEL", help="The unquantized model: adds the effect of the quantization.", show_default=False)
]
Prompt = Annotated[
    str | None, typer.Option(metavar="TEXT", help="What the engine was given.  [default: Once upon a time]", show_default=False)
]
Tokens = Annotated[str | None, typer.Option(metavar="ID,ID,...", help="Its token ids instead of a prompt.", show_default=False)]
FirstBatch = Annotated[
    int | None,
    typer.Option(
        "--first-batch",
        metavar="N",
        min=1,
        help="Tokens of the trace's first batch; those after it were decoded one by one.",
        show_default=False,
    ),
]
KVOption = Annotated[KV, typer.Option(help="Type of llama.cpp's key/value cache.")]
DtypeOption = Annotated[DtypeName, typer.Option(help="Of Transformers: float32 or bfloat16.")]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="DIR", help="Write diagnosis.md, and the engine's trace where it was run.", show_default=False),
]
Quick = Annotated[bool, typer.Option("--quick", help="Run the engine on the prompt only, without probes.")]
All = Annotated[bool, typer.Option("--all", help="Show every tap.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, the tables on stderr.")]
FOUND, NOT_COMPARABLE = 1, 2


def diagnose(
    model: Model,
    against: Against,
    original: Original = None,
    prompt: Prompt = None,
    tokens: Tokens = None,
    first_batch: FirstBatch = None,
    kv: KVOption = KV.F16,
    dtype: DtypeOption = DtypeName.float32,
    threads: Threads = None,
    out: Out = None,
    quick: Quick = False,
    all_taps: All = False,
    json: Json = False,
    lang: LangOption = Lang.en,
) -> int:
    """Say why an engine's output differs: the quantization, the engine, the file or the prompt; with the operation and the likely fault.

    ENGINE is run on the prompt and on probes, cheapest first. A TRACE is judged by what it holds: whole tensors, fingerprints, samples or
    statistics; `quantscope import` makes one of a log.

    Exit code 0: nothing beyond the expected arithmetic; 1: something was found; 2: not comparable.
    """
    if prompt is not None and tokens is not None:
        raise UsageError("--prompt and --tokens both say what was run, expected one of them. Leave one out.")
    from quantscope.diagnose.diagnosis import judge
    from quantscope.engines import ENGINES
    from quantscope.language import language

    ids = None if tokens is None else tuple(parse_ids(tokens))
    with language(lang.value):
        if against in ENGINES:
            if first_batch is not None:
                raise UsageError(f"--first-batch: {against} is run in one batch, expected it with a trace only. Leave it out.")
            cases = _run(model, against, original, prompt, ids, kv.value, dtype.value, threads, out, quick)
        else:
            cases = [_given(model, against, original, prompt, ids, first_batch)]
        d = judge(cases[0])
        if len(cases) > 1 and d.verdict != "engine":  # only a probe shows it
            d = judge(cases[1])
        show(d, out, every=all_taps, json=json)
    return {"within": 0, "not comparable": NOT_COMPARABLE}.get(d.verdict, FOUND)


def _run(
    model: str,
    engine: str,
    original: str | None,
    prompt: str | None,
    ids: tuple[int, ...] | None,
    kv: str,
    dtype: str,
    threads: int | None,
    out: Path | None,
    quick: bool,
) -> list[Evidence]:
    """Run the engine here."""
    from quantscope.cli.output import check_folder
    from quantscope.diagnose.gather import from_engine
    from quantscope.engines import Request, check
    from quantscope.inputs import prompt_ids

    request = Request(engine, model, ids or tuple(prompt_ids(model, prompt)), dtype=dtype, kv=kv, threads=threads)  # type: ignore[arg-type]
    check(request)
    keep = None
    if out is not None:
        check_folder(out)
        out.mkdir(parents=True, exist_ok=True)
        keep = out / f"{engine}.safetensors"
    return from_engine(request, original, keep=keep, probes=not quick)


def _given(
    model: str, path: str, original: str | None, prompt: str | None, ids: tuple[int, ...] | None, first_batch: int | None
) -> Evidence:
    """A trace that is there."""
    from quantscope.diagnose.gather import from_trace
    from quantscope.trace_file import load

    return from_trace(model, load(Path(path)), path, original, prompt=prompt, ids=ids, n_prompt=first_batch)


def show(d: Diagnosis, out: Path | None, *, every: bool, json: bool) -> None:
    from rich.console import Group
    from rich.text import Text

    from quantscope.cli.console import console
    from quantscope.cli.output import print_document, write_files
    from quantscope.diagnose.answer import answer
    from quantscope.language import say
    from quantscope.report.diagnosis import document, markdown, notes, tables
    from quantscope.report.prose import Prose
    from quantscope.report.text import grid

    screen = console(sys.stderr if json else sys.stdout)
    parts: list[object] = [Prose(answer(d), style="bold")]
    parts += [Text(), *(Prose(f"• {s}") for s in d.about_logits)] if d.about_logits else []
    parts += [Text(), Prose(say("RoPE: {verdict}", verdict=d.turned))] if d.turned else []
    for table in tables(d, every=every):
        parts += grid(table, screen.width, "--json")
    parts += [Text(), Text(say("Next"), style="bold cyan"), *(Prose(f"• {s}") for s in d.next_steps)] if d.next_steps else []
    parts += [Text(), *(Prose(f"• {note}", style="dim") for note in notes(d))]
    screen.print(Group(*parts))  # type: ignore[arg-type]
    if out is not None:
        written = write_files(out, {"diagnosis.md": markdown(d)})
        console(sys.stderr).print(f"Wrote {written[0]}.", markup=False, soft_wrap=True)
    if json:
        print_document(document(d))
