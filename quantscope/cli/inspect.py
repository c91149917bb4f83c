"""``quantscope inspect``: what is in a model file."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from quantscope.cli.lang import Lang, LangOption

File = Annotated[
    str,
    typer.Argument(metavar="FILE", help="A GGUF file, a Hugging Face folder, or a name: hf:OWNER/REPO, ollama:NAME.", show_default=False),
]
Tensors = Annotated[bool, typer.Option("--tensors", help="One line per tensor instead of one per kind of tensor.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


def inspect(file: File, tensors: Tensors = False, json: Json = False, lang: LangOption = Lang.en) -> None:
    """Show a file's tensors, their types, bits per weight and metadata; also of a file that is cut short."""
    from quantscope.cli.console import console
    from quantscope.language import language
    from quantscope.report.inspect import document, render
    from quantscope.sources.resolve import open_source
    from quantscope.sources.summary import summarize

    source = open_source(file, allow_truncated=True, as_stored=True)
    try:
        summary = summarize(source)
    finally:
        source.close()
    if json:
        sys.stdout.write(document(summary))
    else:
        out = console(sys.stdout)
        with language(lang.value):
            out.print(render(summary, every_tensor=tensors))
