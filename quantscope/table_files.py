"""Frames as pandas frames, and as CSV and Parquet files.  pandas and pyarrow are extras, imported where they are used."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from quantscope.errors import MissingExtraError, UsageError
from quantscope.frames import Frame, Kind
from quantscope.new_file import written

if TYPE_CHECKING:
    import pandas

Format: TypeAlias = Literal["csv", "parquet"]
_PANDAS: dict[Kind, str] = {"int": "Int64", "float": "float64", "str": "string", "bool": "boolean"}
_ARROW: dict[Kind, str] = {"int": "int64", "float": "float64", "str": "string", "bool": "bool_"}


def to_pandas(frames: Mapping[str, Frame]) -> dict[str, pandas.DataFrame]:
    """Each frame as a pandas.DataFrame with typed columns; a float that was not measured is NaN, any other cell <NA>.

    Raises MissingExtraError where pandas is not installed.
    """
    pd = extra("pandas", "pandas")
    return {name: _pandas(pd, f) for name, f in frames.items()}


def _pandas(pd: Any, f: Frame) -> pandas.DataFrame:
    columns = {
        name: pd.Series(_floats(f, name) if kind == "float" else f.column(name), dtype=_PANDAS[kind]) for name, kind in f.columns.items()
    }
    made: pandas.DataFrame = pd.DataFrame(columns)
    return made


def _floats(f: Frame, name: str) -> list[float]:
    return [float("nan") if x is None else float(x) for x in f.column(name)]


def write_tables(frames: Mapping[str, Frame], folder: Path, kind: Format) -> list[Path]:
    """One file a frame that has rows, ``NAME.csv`` or ``NAME.parquet``; each is complete or absent.

    CSV: UTF-8, a header line, an empty cell where nothing was measured, ``nan`` and ``inf`` spelled out.
    Raises MissingExtraError (Parquet without pyarrow) before anything is written, UsageError when the disk does not allow it.
    """
    encode: Callable[[Frame], bytes] = _csv if kind == "csv" else _parquet(extra("pyarrow", "parquet"), import_module("pyarrow.parquet"))
    contents = {folder / f"{name}.{kind}": encode(f) for name, f in frames.items() if f.rows}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UsageError(f"--out {folder}: expected a folder or a new name: {e.strerror or e}. Give another --out FOLDER.") from e
    for path, content in contents.items():
        with written(
            path, lambda said: UsageError(f"--out {folder}: the tables could not be written: {said}. Give another --out FOLDER.")
        ) as out:
            out.write(content)
    return list(contents)


def _csv(f: Frame) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(f.columns)
    writer.writerows([("" if cell is None else cell for cell in row) for row in f.rows])
    return text.getvalue().encode("utf-8")


def _parquet(pa: Any, parquet: Any) -> Callable[[Frame], bytes]:
    def encode(f: Frame) -> bytes:
        schema = pa.schema([(name, getattr(pa, _ARROW[kind])()) for name, kind in f.columns.items()])
        out = io.BytesIO()
        parquet.write_table(pa.table([f.column(name) for name in f.columns], schema=schema), out)
        return out.getvalue()

    return encode


def extra(package: str, name: str) -> Any:
    """The module of an optional package; MissingExtraError with the command that installs it."""
    try:
        return import_module(package)
    except ImportError as e:
        if (e.name or "").partition(".")[0] != package:
            raise
        raise MissingExtraError(
            f"this needs the package {package}, which is not installed. Install it with `pip install 'quantscope[{name}]'`."
        ) from None
