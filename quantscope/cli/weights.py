"""``quantscope weights``: the same tensors in two files, and what differs beyond their types."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from quantscope.cli.lang import Lang, LangOption

if TYPE_CHECKING:
    from quantscope.weight_compare import WeightComparison

A = Annotated[str, typer.Argument(metavar="A", help="A GGUF file or a Hugging Face folder, the one to believe.", show_default=False)]
B = Annotated[str, typer.Argument(metavar="B", help="The same model in another type or format.", show_default=False)]
All = Annotated[bool, typer.Option("--all", help="Show every tensor, not only those that differ.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, the table on stderr.")]
UNEXPLAINED = 1


def weights(a: A, b: B, all: All = False, json: Json = False, lang: LangOption = Lang.en) -> int:
    """Compare the tensors of two files: what their types do not explain is named (permuted, transposed, norm + 1, corrupt blocks ...).

    Exit code 0: the types explain all differences; 1: they do not.
    """
    from quantscope.language import language
    from quantscope.sources.resolve import open_source
    from quantscope.weight_compare import compare_weights
    from quantscope.weights import Weights

    sources = []
    try:
        for path in (a, b):
            sources.append(open_source(path))
        with language(lang.value):
            c = compare_weights(Weights(sources[0]), Weights(sources[1]))
            show(c, every=all, json=json)
    finally:
        for source in sources:
            source.close()
    return UNEXPLAINED if c.unexplained else 0


def show(c: WeightComparison, *, every: bool, json: bool) -> None:
    from rich.console import Group
    from rich.text import Text

    from quantscope.cli.console import console
    from quantscope.report.prose import Prose
    from quantscope.report.text import grid
    from quantscope.report.weights import answer, document, notes, weights_table

    out = console(sys.stderr if json else sys.stdout)
    table = weights_table(c, every=every)
    drawn = grid(table, out.width, "--json") if table.rows else []
    out.print(Group(Prose(answer(c), style="bold"), *drawn, Text(), *(Prose(f"• {note}", style="dim") for note in notes(c))))
    if json:
        from quantscope.cli.output import print_document

        print_document(document(c))
