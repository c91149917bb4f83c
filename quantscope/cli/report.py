"""``quantscope report``: a finished study again, as a page, as Markdown or as JSON, in another language."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantscope.cli.lang import Lang, LangOption
from quantscope.errors import MissingFileError, UsageError

if TYPE_CHECKING:
    from quantscope.results import Study


class Format(str, Enum):
    html = "html"
    md = "md"
    json = "json"


Where = Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a study, or its study.json.", show_default=False)]
FormatOption = Annotated[Format, typer.Option("--format", help="A page, Markdown, or the data.")]
OutFile = Annotated[
    Path | None,
    typer.Option(
        "--out", "-o", metavar="FILE", help="Where to write it; - for stdout.  [default: report.FORMAT in DIR]", show_default=False
    ),
]


def report(where: Where, format: FormatOption = Format.html, out: OutFile = None, lang: LangOption = Lang.en) -> None:
    """Write the report of a study that was run before: nothing is computed again.

    Of a study that was interrupted, the report is of the batches that are done, and says so; the command that began it goes on from there.
    """
    from quantscope.cli.output import write_files
    from quantscope.findings import told
    from quantscope.language import language

    study = told_of(where)
    with language(lang.value):
        text = render(told(study), format)
    if out == Path("-"):
        sys.stdout.write(text)
        return
    folder = where if where.is_dir() else where.parent
    target = out or folder / f"report.{format.value}"
    (written,) = write_files(target.parent, {target.name: text})
    from quantscope.cli.console import console

    console(sys.stderr).print(f"Wrote {written}.", markup=False, soft_wrap=True)


def told_of(where: Path) -> Study:
    """The study of a folder or file.  Raises MissingFileError, CorruptFileError, UnsupportedVersionError."""
    import json

    from quantscope.findings import complete
    from quantscope.report.study_json import load
    from quantscope.results import Study
    from quantscope.store import NAME, read_sketch

    path = where / "study.json" if where.is_dir() else where
    if path.is_file():
        return load(path)
    results = read_sketch(where)
    if results is not None:
        return complete(Study.from_json(json.loads(results)))
    if (where / NAME).is_file():
        raise UsageError(
            f"{where}: this study was interrupted before its first batch was done, expected one at least. Give the command that began it "
            f"again: it goes on from there and writes the reports."
        )
    raise MissingFileError(
        f"{path}: no such file, expected what `quantscope study` writes. Run `quantscope study MODEL --out {where}` first."
    )


def render(study: Study, format: Format) -> str:
    """The text of one format, in the language of the context."""
    from quantscope.report.markdown import markdown
    from quantscope.report.page import html
    from quantscope.report.page.study import study_page
    from quantscope.report.study_json import dump

    if format is Format.html:
        return html(study_page(study))
    return markdown(study) if format is Format.md else dump(study)
