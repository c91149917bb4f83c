"""``quantscope compare``: two traces on one screen, and where they part."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantscope.cli.lang import Lang, LangOption
from quantscope.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantscope.compare import Comparison
    from quantscope.three_way import SplitRow
    from quantscope.trace import Trace

Ref = Annotated[Path, typer.Argument(metavar="REF", help="The trace to believe: `quantscope trace MODEL`.", show_default=False)]
Test = Annotated[Path, typer.Argument(metavar="TEST", help="The trace to judge: another engine's.", show_default=False)]
Predicted = Annotated[
    Path | None,
    typer.Option(
        metavar="TRACE",
        help="Of `quantscope trace MODEL --arithmetic ggml`, or bf16: its error times 4 is the floor of each tap.",
        show_default=False,
    ),
]
Original = Annotated[
    Path | None,
    typer.Option(metavar="TRACE", help="Of the unquantized model: adds the effect of the quantization at each layer.", show_default=False),
]
Model = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL", help="The file both ran: also recompute every operation of TEST from its own inputs.", show_default=False
    ),
]
Floor = Annotated[float | None, typer.Option(metavar="NMSE", min=0, help="One floor for all taps.", show_default=False)]
DifferentFiles = Annotated[bool, typer.Option("--different-files", help="Compare although the traces are of different model files.")]
All = Annotated[bool, typer.Option("--all", help="Show every tap.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, the tables on stderr.")]
DIVERGED = 1


def compare(
    ref: Ref,
    test: Test,
    predicted: Predicted = None,
    original: Original = None,
    floor: Floor = None,
    model: Model = None,
    different_files: DifferentFiles = False,
    all_taps: All = False,
    json: Json = False,
    lang: LangOption = Lang.en,
) -> int:
    """Compare two traces of the same tokens, tap by tap in the order of the graph, and name the first that differs.

    With --model an operation is convicted by its own error, however wrong everything before it is: several faults show at once.

    Exit code 0: no tap exceeds its floor; 1: one does.
    """
    if floor is not None and predicted is not None:
        raise UsageError("--floor and --predicted both give the floor, expected one of them. Leave one out.")
    from quantscope.language import language
    from quantscope.trace_file import load

    a, b = load(ref), load(test)
    emulated, before = (None if p is None else load(p) for p in (predicted, original))
    with language(lang.value):
        return _compared(a, b, emulated, before, floor, model, different_files, all_taps, json)


def _compared(
    a: Trace,
    b: Trace,
    emulated: Trace | None,
    before: Trace | None,
    floor: float | None,
    model: str | None,
    different_files: bool,
    all_taps: bool,
    json: bool,
) -> int:
    from quantscope.compare import compare as run
    from quantscope.explain import answer, rotation
    from quantscope.three_way import asked_split

    c = run(a, b, predicted=emulated, floor=floor, same_file=not different_files)
    turned = rotation(a, b, c)
    split = asked_split(a, b, before, emulated)
    said, convicted = answer(c), False
    if model is not None:
        from quantscope.diagnose.convictions import replayed, sentence

        again = replayed(b, model)
        said, convicted = f"{said}\n{sentence(again)}", bool(again.those("convicted"))
    show(c, said, turned, split, all_taps, json)
    return DIVERGED if convicted or c.first_divergence is not None else 0


def show(c: Comparison, said: str, turned: str | None, split: Sequence[SplitRow], every: bool, json: bool) -> None:
    from rich.console import Group
    from rich.text import Text

    from quantscope.cli.console import console
    from quantscope.language import say
    from quantscope.report.compare import document, split_table, taps_table
    from quantscope.report.prose import Prose
    from quantscope.report.text import grid

    out = console(sys.stderr if json else sys.stdout)
    parts: list[object] = [Prose(said, style="bold")]
    parts += [Text(), Prose(say("RoPE: {verdict}", verdict=turned))] if turned else []
    parts += grid(taps_table(c, every=every), out.width)
    parts += grid(split_table(split), out.width) if split else []
    notes = [say("Floor: {source}.", source=c.floor_source), *c.notes, *_lacking(c)]
    parts += [Text(), *(Prose(f"• {note}", style="dim") for note in notes)]
    out.print(Group(*parts))  # type: ignore[arg-type]
    if json:
        from quantscope.cli.output import print_document

        print_document(document(c, said, turned, split))


def _lacking(c: Comparison) -> list[str]:
    """Taps that only one of the traces has, counted: nothing is left out silently."""
    from quantscope.language import mark, say
    from quantscope.phrases import joined

    return [
        say(where, n=len(names), taps=joined([*names[:5], *(["..."] if len(names) > 5 else [])]))
        for where, names in (
            (mark("{n} taps are only in the reference: {taps}."), c.only_ref),
            (mark("{n} taps are only in the test: {taps}."), c.only_test),
        )
        if names
    ]
