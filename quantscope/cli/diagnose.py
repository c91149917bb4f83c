"""``quantscope diagnose``: is it the quantization, the engine, the file or the prompt?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantscope.cli.lang import Lang, LangOption
from quantscope.cli.study import parse_ids
from quantscope.cli.trace import KV, DtypeName, Threads

if TYPE_CHECKING:
    from quantscope.diagnose.diagnosis import Diagnosis

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
    from quantscope.cli.output import check_folder
    from quantscope.diagnose.run import diagnose as run
    from quantscope.language import language

    if out is not None:
        check_folder(out)
    with language(lang.value):
        d = run(
            model,
            against,
            original=original,
            prompt=prompt,
            tokens=None if tokens is None else parse_ids(tokens),
            first_batch=first_batch,
            kv=kv.value,
            dtype=dtype.value,
            threads=threads,
            probes=not quick,
            keep=out,
        )
        show(d, out, every=all_taps, json=json)
    return {"within": 0, "not comparable": NOT_COMPARABLE}.get(d.verdict, FOUND)


def show(d: Diagnosis, out: Path | None, *, every: bool, json: bool) -> None:
    from rich.console import Group
    from rich.text import Text

    from quantscope.cli.console import console
    from quantscope.cli.output import print_document, write_files
    from quantscope.diagnose.answer import answer
    from quantscope.language import say
    from quantscope.report.diagnosis import document, markdown, notes, tables
    from quantscope.report.page import html
    from quantscope.report.page.diagnosis import diagnosis_page
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
        written = write_files(out, {"diagnosis.html": html(diagnosis_page(d)), "diagnosis.md": markdown(d)})
        console(sys.stderr).print(f"Wrote {' and '.join(str(p) for p in written)}.", markup=False, soft_wrap=True)
    if json:
        print_document(document(d))
