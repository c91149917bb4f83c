"""``quantscope tables``: a finished study as CSV or Parquet files."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Format(str, Enum):
    csv = "csv"
    parquet = "parquet"


Dir = Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a study, or its study.json.", show_default=False)]
FormatOption = Annotated[Format, typer.Option("--format", help="Of the files; parquet needs pyarrow.")]
Out = Annotated[
    Path | None, typer.Option("--out", "-o", metavar="FOLDER", help="Where the files go.  [default: DIR/tables]", show_default=False)
]


def tables(dir: Dir, format: FormatOption = Format.csv, out: Out = None) -> None:
    """Write the tables of a study as files: variants, types, layers, ops, logits, generated, paired, engines.

    Columns are the fields of study.json; numbers have all their digits.  A table without rows is left out.
    """
    from quantscope.cli.console import console
    from quantscope.frames import frames
    from quantscope.report.study_json import load
    from quantscope.table_files import write_tables

    written = write_tables(frames(load(dir)), out or (dir if dir.is_dir() else dir.parent) / "tables", format.value)
    console(sys.stderr).print(f"Wrote {', '.join(str(p) for p in written)}.", markup=False, soft_wrap=True)
