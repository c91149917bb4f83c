"""Reports in Japanese: the same tables, no English sentence, the same data."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.e2e.commands import Capture, ran, refused

MODEL = Path(__file__).parent.parent / "data" / "stories260K-f32.gguf"
TEXT = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park with her friends. " * 20


def sentences(text: str) -> list[str]:
    """Five English words in a row, outside of quotation marks and code."""
    return re.findall(r"(?:\b[A-Za-z]{2,}\b[ ,:;.]+){5}", re.sub(r"`[^`]*`|\"[^\"]*\"", "", text))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from quantscope.cli.main import main

    folder = tmp_path_factory.mktemp("lang")
    (folder / "t.txt").write_text(TEXT, encoding="utf-8")
    made = {}
    for lang in ("en", "ja"):
        made[lang] = folder / lang
        text = ["--text", str(folder / "t.txt"), "--ctx", "64", "--chunks", "3"]
        assert main(["study", str(MODEL), "--types", "Q4_0,Q8_0", *text, "--prompt", "Once", "--out", str(made[lang]), "--lang", lang]) == 0
    return made


def test_no_english_sentence_and_every_table(folders: dict[str, Path]) -> None:
    english, japanese = ((folders[lang] / "report.md").read_text("utf-8") for lang in ("en", "ja"))
    assert len(sentences(english)) > 20
    assert sentences(japanese) == []
    for pattern in (r"^\|", r"^## ", r"^### ", r"^- \*\*"):
        assert len(re.findall(pattern, english, re.M)) == len(re.findall(pattern, japanese, re.M)) > 0


def test_study_json_is_the_same_in_every_language(folders: dict[str, Path]) -> None:
    english, japanese = (json.loads((folders[lang] / "study.json").read_text("utf-8")) for lang in ("en", "ja"))
    assert english["findings"] == japanese["findings"]
    assert english["variants"] == japanese["variants"]


def test_unknown_language(capsys: Capture, tmp_path: Path) -> None:
    said = refused(capsys, "study", MODEL, "--lang", "fr", "--out", tmp_path / "o")
    assert "--lang" in said
    assert not (tmp_path / "o").exists()


def test_the_environment_does_not_decide(capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANG", "ja_JP.UTF-8")
    out, _ = ran(capsys, "study", MODEL, "--types", "Q8_0", "--prompt", "Once", "--out", tmp_path / "o")
    assert "Layer by layer" in out
