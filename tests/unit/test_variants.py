"""Who is compared with whom, and how large a variant is."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantscope.errors import ShapeError, UsageError
from quantscope.results import StudyOptions
from quantscope.variants import line_up
from tests.models import make_gguf


@pytest.fixture
def f32(tmp_path: Path) -> str:
    return str(make_gguf(tmp_path / "plain.gguf"))


@pytest.fixture
def q8(tmp_path: Path) -> str:
    return str(make_gguf(tmp_path / "eight.gguf", dtype="Q8_0"))


def names(*models: str, **options: object) -> tuple[list[str], bool]:
    lineup = line_up(StudyOptions(models=models, **options))
    return [c.member.name for c in lineup.candidates], lineup.has_original


def test_one_model_and_types(f32: str) -> None:
    assert names(f32, types=("q4_0", "Q8_0", "Q4_0")) == (["plain", "Q4_0", "Q8_0"], True)


def test_the_only_unquantized_file_is_the_original_and_comes_first(f32: str, q8: str) -> None:
    assert names(q8, f32) == (["plain", "eight"], True)


def test_ref_decides(f32: str, q8: str) -> None:
    assert names(f32, ref=q8) == (["eight", "plain"], True)


def test_no_original_is_said(tmp_path: Path, q8: str) -> None:
    other = str(make_gguf(tmp_path / "four.gguf", dtype="Q4_0"))
    lineup = line_up(StudyOptions(models=(q8, other)))
    assert not lineup.has_original
    assert any("--ref" in note for note in lineup.notes)


def test_quantizing_a_quantized_file_is_said(q8: str) -> None:
    assert any("already quantized" in n for n in line_up(StudyOptions(models=(q8,), types=("Q4_0",))).notes)


def test_equal_stems_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    pair = [str(make_gguf(tmp_path / d / "m.gguf")) for d in "ab"]
    assert names(*pair, ref=pair[0])[0] == pair


def test_sizes_are_those_of_the_files(tmp_path: Path, f32: str, q8: str) -> None:
    in_memory = line_up(StudyOptions(models=(f32,), types=("Q8_0",))).candidates[1]
    assert in_memory.file_bytes == pytest.approx(Path(q8).stat().st_size, abs=128)  # the header differs by two keys
    assert in_memory.bpw == line_up(StudyOptions(models=(q8,), ref=f32)).candidates[1].bpw


def test_contradictions(tmp_path: Path, f32: str, q8: str) -> None:
    with pytest.raises(UsageError, match="--types"):
        line_up(StudyOptions(models=(f32, q8), types=("Q4_0",)))
    with pytest.raises(UsageError, match="no model"):
        line_up(StudyOptions(models=()))
    with pytest.raises(UsageError, match="Q9"):
        line_up(StudyOptions(models=(f32,), types=("Q9",)))
    other = str(make_gguf(tmp_path / "other.gguf", n_layer=3))
    with pytest.raises(ShapeError, match="n_layer is 3, expected 2"):
        line_up(StudyOptions(models=(f32, other)))
