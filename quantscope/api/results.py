"""Results with a face: the data of a computation, as frames and as what a notebook shows."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from quantscope.compare import Comparison as TraceComparison
from quantscope.compare import Row
from quantscope.diagnose.answer import answer as diagnosis_answer
from quantscope.diagnose.convictions import sentence
from quantscope.diagnose.diagnosis import Diagnosis as Verdict
from quantscope.diagnose.evidence import Record
from quantscope.diagnose.ledger import Hypothesis
from quantscope.diagnose.replay import Replay
from quantscope.errors import UsageError
from quantscope.explain import answer as comparison_answer
from quantscope.frames import Frame, frames, table
from quantscope.new_file import written
from quantscope.report import compare as compare_report
from quantscope.report import diagnosis as diagnosis_report
from quantscope.report import weights as weights_report
from quantscope.report.notebook import study_html, tables_html
from quantscope.report.study_json import NAME, dump
from quantscope.results import Study as StudyData
from quantscope.table_files import Format, to_pandas, write_tables
from quantscope.three_way import SplitRow
from quantscope.weight_compare import TensorDiff
from quantscope.weight_compare import WeightComparison as TensorComparison

if TYPE_CHECKING:
    import pandas

T = TypeVar("T")


def shown(kind: type[T], data: Any, **more: Any) -> T:
    """The same data as an instance of a class with a face; more: its further fields."""
    return kind(**{f.name: getattr(data, f.name) for f in dataclasses.fields(data)}, **more)


class Face:
    """What every result can do: say its answer, and give its tables."""

    @property
    def answer(self) -> str:
        """The result in one paragraph."""
        raise NotImplementedError

    def frames(self) -> dict[str, Frame]:
        """Every table as columns with types and rows (``quantscope.frames``)."""
        raise NotImplementedError

    def to_pandas(self) -> dict[str, pandas.DataFrame]:
        """Every table as a pandas.DataFrame.  Raises MissingExtraError where pandas is not installed."""
        return to_pandas(self.frames())

    def write_tables(self, folder: str | Path, format: Format = "csv") -> list[Path]:
        """Every table as a CSV or Parquet file in a folder; those without rows are left out.  Returns the paths."""
        return write_tables(self.frames(), Path(folder), format)


@dataclass(frozen=True, repr=False)
class Study(Face, StudyData):
    """What ``quantscope.study`` found; docs/study-json.md describes every field."""

    @property
    def answer(self) -> str:
        return self.findings[0].text if self.findings else "No finding."

    def frames(self) -> dict[str, Frame]:
        """variants, types, layers, ops, logits, generated, paired, engines."""
        return frames(self)

    def save(self, path: str | Path) -> Path:
        """Write study.json, which ``quantscope.load_study`` and ``quantscope tables`` read.  path: the file, or a folder for it."""
        file = Path(path) / NAME if Path(path).is_dir() else Path(path)
        with written(file, lambda said: UsageError(f"{file}: the study could not be written: {said}. Give another path.")) as out:
            out.write(dump(self).encode("utf-8", "backslashreplace"))
        return file

    def __repr__(self) -> str:
        return f"<Study of {len(self.variants)} variants: {self.answer}>"

    def _repr_html_(self) -> str:
        return study_html(self)


@dataclass(frozen=True, repr=False)
class Comparison(Face, TraceComparison):
    """Two traces tap by tap.  rotation: the RoPE setting of an engine that rotates otherwise; replay: where it was asked for."""

    rotation: str | None = None
    split: tuple[SplitRow, ...] = ()
    replay: Replay | None = None

    @property
    def answer(self) -> str:
        said = comparison_answer(self)
        return said if self.replay is None else f"{said}\n{sentence(self.replay)}"

    def frames(self) -> dict[str, Frame]:
        """taps, split."""
        return {"taps": table(Row, self.rows), "split": table(SplitRow, self.split)}

    def __repr__(self) -> str:
        return f"<Comparison at {len(self.rows)} taps: {self.answer}>"

    def _repr_html_(self) -> str:
        tables = [compare_report.taps_table(self), *([compare_report.split_table(self.split)] if self.split else [])]
        return tables_html(self.answer, tables, [*([f"RoPE: {self.rotation}"] if self.rotation else []), *self.notes])


@dataclass(frozen=True, repr=False)
class Diagnosis(Face, Verdict):
    """What ``quantscope.diagnose`` found: ``verdict`` in a word, ``answer`` in sentences, the rest is what they rest on."""

    @property
    def answer(self) -> str:
        return diagnosis_answer(self)

    def frames(self) -> dict[str, Frame]:
        """evidence, ledger, taps, split."""
        rows = () if self.comparison is None else self.comparison.rows
        return {
            "evidence": table(Record, self.evidence),
            "ledger": table(Hypothesis, self.ledger),
            "taps": table(Row, rows),
            "split": table(SplitRow, self.split),
        }

    def __repr__(self) -> str:
        return f"<Diagnosis ({self.verdict}): {self.answer}>"

    def _repr_html_(self) -> str:
        return tables_html(self.answer, diagnosis_report.tables(self), [*self.about_logits, *diagnosis_report.notes(self)])


@dataclass(frozen=True, repr=False)
class WeightComparison(Face, TensorComparison):
    """The tensors of two files, and those that differ beyond what their types explain (``unexplained``)."""

    @property
    def answer(self) -> str:
        return weights_report.answer(self)

    def frames(self) -> dict[str, Frame]:
        """tensors."""
        return {"tensors": table(TensorDiff, self.rows)}

    def __repr__(self) -> str:
        return f"<WeightComparison of {len(self.rows)} tensors: {self.answer}>"

    def _repr_html_(self) -> str:
        drawn = weights_report.weights_table(self)
        return tables_html(self.answer, [drawn] if drawn.rows else [], weights_report.notes(self))
