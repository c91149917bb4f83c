"""Reports in Japanese: the same tables, no English sentence, the same data."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.e2e.commands import Capture, ran, refused

DATA = Path(__file__).parent.parent / "data"
MODEL, RUSTORCH = DATA / "stories260K-f32.gguf", DATA / "rustorch"
TEXT = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park with her friends. " * 20


def sentences(text: str) -> list[str]:
    """Five English words in a row, outside of quotation marks, code and commands."""
    return re.findall(r"(?:\b[A-Za-z]{2,}\b[ ,:;.]+){5}", re.sub(r"`[^`]*`|\"[^\"]*\"|→ quantscope.*", "", text))


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


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two traces, a quantized file and a text."""
    from quantscope.cli.main import main

    folder = tmp_path_factory.mktemp("made")
    ids = "1,403,407,261,378"
    (folder / "t.txt").write_text(TEXT * 3, encoding="utf-8")
    assert main(["quantize", str(MODEL), str(folder / "q.gguf"), "--type", "Q4_0"]) == 0
    for name, model in (("exact", MODEL), ("q", folder / "q.gguf")):
        assert main(["trace", str(model), "--tokens", ids, "-o", str(folder / f"{name}.safetensors")]) == 0
    return folder


COMMANDS = [
    (1, ["compare", "exact.safetensors", "q.safetensors", "--different-files", "--model", MODEL]),
    (0, ["diagnose", MODEL, "--against", "exact.safetensors"]),
    (2, ["diagnose", MODEL, "--against", "q.safetensors"]),
    (0, ["weights", MODEL, "q.gguf", "--all"]),
    (0, ["import", RUSTORCH / "q4_k_m.log", RUSTORCH / "q4_0.log"]),
    (0, ["import", RUSTORCH / "seed-tables.md", "--run", RUSTORCH / "q4_k_m-hello.log"]),
    (0, ["sensitivity", MODEL, "--text", "t.txt", "--ctx", "32", "--chunks", "4", "--types", "Q4_0,Q8_0"]),
    (0, ["recipe", MODEL, "--text", "t.txt", "--ctx", "32", "--chunks", "20", "--target-bpw", "8", "--types", "Q4_0,Q5_0,Q8_0"]),
    (0, ["inspect", MODEL]),
]


@pytest.mark.parametrize(("code", "arguments"), COMMANDS, ids=lambda x: x[0] if isinstance(x, list) else None)
def test_every_command_with_a_report(
    code: int, arguments: list[str | Path], made: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made)
    english, _ = ran(capsys, *arguments, code=code)
    japanese, _ = ran(capsys, *arguments, "--lang", "ja", code=code)
    assert sentences(japanese) == []
    assert sentences(english) or arguments[0] == "inspect"
    assert len(re.findall(r"[ぁ-ん一-龥]", japanese)) > 20


def test_sentences_in_the_json_document_follow_the_language(made: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    command = ["diagnose", MODEL, "--against", "exact.safetensors", "--json"]
    english, japanese = (json.loads(ran(capsys, *command, "--lang", lang)[0]) for lang in ("en", "ja"))
    assert re.search(r"[ぁ-ん]", japanese["answer"])
    for words in ("verdict", "level", "model", "engine"):
        assert english[words] == japanese[words]
    assert [h["status"] for h in english["ledger"]] == [h["status"] for h in japanese["ledger"]]
