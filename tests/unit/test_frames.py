"""A study as tables: every scalar field of study.json is a column, and CSV, Parquet and pandas hold the same cells."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from pathlib import Path

import pytest

from quantscope import table_files
from quantscope.cli.main import main
from quantscope.errors import CorruptFileError, MissingExtraError, MissingFileError, UsageError
from quantscope.frames import frames, scalars
from quantscope.report.study_json import dump, load
from quantscope.results import EngineRow, EngineRun, Generated, LayerRow, LogitStats, OpRow, Study
from quantscope.table_files import to_pandas, write_tables
from tests.unit import studies


def full_study() -> Study:
    """A study with something in every table, a NaN, an infinity, and a token that is no UTF-8."""
    study = studies.long_study()
    last = study.variants[-1]
    row = dataclasses.replace(last.layers[0], output_rms=math.nan, sqnr_db=math.inf)
    odd = dataclasses.replace(last, layers=(row, *last.layers[1:]), generated=(Generated('\udc80,"\n', 7, None, 2),))
    runs = (
        EngineRun("Q4_0", "llama.cpp", "0.3", True, rows=(EngineRow("l_out-0", 1e-3, 1e-4, None),)),
        EngineRun("Q8_0", "transformers", failure="died"),
    )
    return dataclasses.replace(study, variants=(*study.variants[:-1], odd), engines=runs)


class TestFrames:
    def test_every_table_has_rows_and_every_scalar_field_is_a_column(self) -> None:
        found = frames(full_study())
        assert all(f.rows for f in found.values())
        for name, kind in {"layers": LayerRow, "ops": OpRow, "logits": LogitStats, "generated": Generated}.items():
            columns = dict(found[name].columns)
            assert next(iter(columns)) == "variant"
            assert {c: columns[c] for c in scalars(kind)} == scalars(kind)
        assert scalars(LayerRow)["nmse"] == "float"
        assert "flags" not in scalars(LayerRow)

    def test_rows_are_the_study_s(self) -> None:
        study = full_study()
        layers = frames(study)["layers"]
        expected = [(v.name, row.layer) for v in study.variants for row in v.layers]
        assert list(zip(layers.column("variant"), layers.column("layer"), strict=True)) == expected
        variants = frames(study)["variants"]
        assert variants.column("variant")[variants.column("is_original").index(True)] == study.original
        assert frames(study)["generated"].column("text")[-1] == '\\udc80,"\n'
        assert frames(study)["engines"].rows[1][-4:] == (None, None, None, None)


class TestFiles:
    def test_csv_pandas_and_parquet_agree(self, tmp_path: Path) -> None:
        pandas, parquet = pytest.importorskip("pandas"), pytest.importorskip("pyarrow.parquet")
        found = frames(full_study())
        data = to_pandas(found)
        assert {p.stem for p in write_tables(found, tmp_path, "parquet")} == set(found)
        write_tables(found, tmp_path, "csv")
        for name, f in found.items():
            stored = parquet.read_table(tmp_path / f"{name}.parquet")
            assert stored.column_names == list(f.columns)
            assert [tuple(map(str, row.values())) for row in stored.to_pylist()] == [tuple(map(str, row)) for row in f.rows]
            with open(tmp_path / f"{name}.csv", encoding="utf-8", newline="") as lines:
                rows = list(csv.reader(lines))
            assert rows == [list(f.columns), *([("" if cell is None else str(cell)) for cell in row] for row in f.rows)]
            assert list(data[name].columns) == list(f.columns)
            assert len(data[name]) == len(f.rows)
        assert data["layers"]["layer"].dtype == "Int64"
        assert data["logits"].set_index("variant")["kl_nats"].idxmax() == "Q4_0"
        assert pandas.isna(data["generated"]["logit"].iloc[-1])

    def test_empty_tables_are_left_out(self, tmp_path: Path) -> None:
        names = {p.name for p in write_tables(frames(studies.study()), tmp_path, "csv")}
        assert names == {"variants.csv", "types.csv", "layers.csv", "logits.csv", "generated.csv"}

    def test_without_the_package_nothing_is_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(name: str) -> None:
            raise ModuleNotFoundError(name=name)

        monkeypatch.setattr(table_files, "import_module", missing)
        with pytest.raises(MissingExtraError, match=r"pip install 'quantscope\[parquet\]'"):
            write_tables(frames(studies.study()), tmp_path / "new", "parquet")
        with pytest.raises(MissingExtraError, match=r"pip install 'quantscope\[pandas\]'"):
            to_pandas(frames(studies.study()))
        assert not (tmp_path / "new").exists()

    def test_a_file_in_the_place_of_the_folder(self, tmp_path: Path) -> None:
        (tmp_path / "x").touch()
        with pytest.raises(UsageError, match="expected a folder"):
            write_tables(frames(studies.study()), tmp_path / "x", "csv")


class TestCommand:
    def test_folder_and_file(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "study.json").write_text(dump(studies.study()), "utf-8")
        assert main(["tables", str(tmp_path)]) == 0
        assert (tmp_path / "tables" / "layers.csv").exists()
        assert main(["tables", str(tmp_path / "study.json"), "-o", str(tmp_path / "other")]) == 0
        assert (tmp_path / "other" / "layers.csv").read_bytes() == (tmp_path / "tables" / "layers.csv").read_bytes()
        out, err = capsys.readouterr()
        assert out == ""
        assert "variants.csv" in err

    @pytest.mark.parametrize("content", [None, "{", '{"version": 1}', "[]", "\xff"])
    def test_no_study(self, content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        if content is not None:
            (tmp_path / "study.json").write_bytes(content.encode("latin-1"))
        assert main(["tables", str(tmp_path)]) == 2
        assert "study.json" in capsys.readouterr().err
        assert not (tmp_path / "tables").exists()

    def test_load(self, tmp_path: Path) -> None:
        path = tmp_path / "a.json"
        path.write_text(dump(studies.study()), "utf-8")
        assert load(path).variants == studies.study().variants
        with pytest.raises(MissingFileError):
            load(tmp_path / "none")
        path.write_text(json.dumps({"version": 1}))
        with pytest.raises(CorruptFileError):
            load(path)
