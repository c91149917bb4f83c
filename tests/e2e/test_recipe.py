"""``quantscope recipe`` as a user runs it."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from quantscope.cli.demo import TEXT, bundled
from quantscope.cli.main import main
from quantscope.remedy import sensitivity
from quantscope.sources.gguf import open_gguf
from tests.e2e.commands import Capture, fitting, ran, refused
from tests.models import STORIES, make_gguf

STORY = ("--text", bundled(TEXT), "--ctx", "64", "--chunks", "14")
SIZE = 320_000  # of the trained model, whose rows no block of 256 fills, and those of ffn_down none of 32


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one run, of ``test_the_files``, writes."""
    return tmp_path_factory.mktemp("recipe") / "r.json"


def test_the_files(capsys: Capture, recipe: Path) -> None:
    out = recipe.with_name("r.gguf")
    said, err = ran(capsys, "recipe", STORIES, *STORY, "--target-size", str(SIZE), "-o", recipe, "--quantized", out, "--json")
    data = fitting("recipe", said)
    assert data["target"] == {"bytes": SIZE, "bpw": None, "kl": None}
    assert data["recipe"] == json.loads(recipe.read_text())
    assert 0.9 * SIZE < out.stat().st_size <= SIZE
    assert "best recipe found for 320 kB" in " ".join(err.split())
    types = {n: str(t.qtype) for n, t in open_gguf(out).tensors.items()}
    (chosen,) = (c for c in data["candidates"] if c["chosen"])
    assert chosen["types"] == types
    kls = {c["name"]: c["other_kl"] for c in data["candidates"] if c["other_kl"] is not None}
    assert chosen["other_kl"] == min(kls.values())
    assert any(c["kind"] == "preset" and c["name"] in kls for c in data["candidates"])
    assert sorted(p.name for p in recipe.parent.iterdir()) == ["r.gguf", "r.html", "r.imatrix.gguf", "r.json", "r.tensor-types.txt"]


def test_quantize_makes_the_same_file_of_either_recipe(capsys: Capture, recipe: Path) -> None:
    made = open_gguf(recipe.with_name("r.gguf"))
    for name, more in (("r.json", ()), ("r.tensor-types.txt", ("--type", "Q8_0"))):
        out = recipe.with_name("again.gguf")
        ran(capsys, "quantize", STORIES, out, "--recipe", recipe.with_name(name), "--imatrix", recipe.with_name("r.imatrix.gguf"), *more)
        again = open_gguf(out)
        assert {n: again.raw(n).tobytes() for n in again.tensors} == {n: made.raw(n).tobytes() for n in made.tensors}
        out.unlink()


def test_the_tables_and_a_corrected_file(capsys: Capture, tmp_path: Path) -> None:
    out = tmp_path / "c.gguf"
    arguments = ("--target-bpw", "9", "--types", "q4_0,q8_0", "-o", tmp_path / "r.json", "--quantized", out, "--correct", "rounding")
    said, _ = ran(capsys, "recipe", STORIES, *STORY, *arguments)
    words = " ".join(said.split())
    for part in ("best recipe found for 9.00 bits per weight", "Size against predicted KL divergence", "Rules of thumb that fit", "chosen"):
        assert part in words
    assert "rounding: kept in" in words
    made = json.loads((tmp_path / "r.json").read_text())
    assert set(made["types"].values()) <= {"Q4_0", "Q8_0", "F16"}
    assert json.loads(open_gguf(out).metadata["quantscope.recipe"])["correct"] == "rounding"


def test_the_smallest_file_for_a_kl(capsys: Capture, tmp_path: Path) -> None:
    said, _ = ran(capsys, "recipe", STORIES, *STORY, "--max-kl", "0.01", "-o", tmp_path / "r.json", "--json")
    (chosen,) = (c for c in json.loads(said)["candidates"] if c["chosen"])
    assert 0.005 < chosen["other_kl"] <= 0.01


def test_bad_input(capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, text, out = make_gguf(tmp_path / "m.gguf"), tmp_path / "text.txt", tmp_path / "r.json"
    text.write_bytes(bundled(TEXT).read_bytes()[:3000])
    (tmp_path / "short.txt").write_text("It was a dark and stormy night. " * 6)
    (tmp_path / "r.imatrix.gguf").symlink_to(source)
    (tmp_path / "other").mkdir()
    other = make_gguf(tmp_path / "other" / "m.gguf", n_embd=32)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    bpw, elsewhere = ("--target-bpw", "5"), tmp_path / "o.json"

    def never(*_: object, **__: object) -> None:
        raise AssertionError("predicted before the input was checked")

    monkeypatch.setattr(sensitivity, "predict", never)
    for arguments, words in (
        ((text, "-o", elsewhere), "no target was given"),
        ((text, "-o", elsewhere, *bpw, "--max-kl", "0.1"), "--target-bpw and --max-kl were given"),
        ((text, "-o", elsewhere, "--target-bpw", "-1"), "expected a number above 0"),
        ((text, "-o", elsewhere, "--target-size", "big"), "--target-size 'big' is no size of a file"),
        ((text, "-o", elsewhere, "--target-size", "9k"), "expected at least"),
        ((text, "-o", elsewhere, "--target-bpw", "40"), "expected less than the original has"),
        ((text, "-o", elsewhere, *bpw, "--types", "Q4_K_M"), "is no tensor type"),
        ((text, "-o", source, *bpw), "this is an input"),
        ((text, "-o", text, *bpw), "this is an input"),
        ((text, "-o", out, *bpw), "r.imatrix.gguf: this is an input"),
        ((text, "-o", elsewhere, *bpw, "--quantized", source), "--quantized"),
        ((text, "-o", elsewhere, *bpw, "--quantized", elsewhere), "another result has this name"),
        ((text, "-o", tmp_path / "no" / "r.json", *bpw), "expected a file in a folder that exists"),
        ((text, "-o", elsewhere, *bpw, "--correct", "rounding"), "--correct alone"),
        ((text, "-o", elsewhere, *bpw, "--correct", "magic", "--quantized", "x.gguf"), "expected some of equalize, scales"),
        ((text, "-o", elsewhere, *bpw, "--imatrix", other), "expected an importance matrix"),
        ((tmp_path / "short.txt", "-o", elsewhere, *bpw), "expected at least 192"),
        ((tmp_path / "no.txt", "-o", elsewhere, *bpw), "no.txt"),
    ):
        assert words in refused(capsys, "recipe", source, "--ctx", "32", "--text", *arguments), words

    monkeypatch.undo()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    capsys.readouterr()
    assert main([str(a) for a in ("recipe", source, "--ctx", "32", "--text", text, "-o", elsewhere, *bpw)]) == 2  # after the report
    assert "No space left on device" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before


def test_the_document_of_sensitivity(capsys: Capture) -> None:
    said, _ = ran(capsys, "sensitivity", STORIES, *STORY, "--types", "q4_0,q8_0", "--json")
    data = fitting("sensitivity", said)
    assert len(data["tensors"]) > 30
    assert all(t["types"]["Q4_0"]["kl"] >= t["types"]["Q8_0"]["kl"] * 0.5 for t in data["tensors"])
