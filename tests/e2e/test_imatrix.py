"""``quantscope imatrix`` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quantscope.imatrix import read_imatrix
from tests.e2e.commands import ran, refused
from tests.models import make_gguf

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("abc def ghi " * 40, "utf-8")
    return make_gguf(tmp_path / "m.gguf")


def test_a_file_for_llama_quantize(capsys: Capture, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "i.gguf"
    arguments = ("imatrix", model, "--text", tmp_path / "text.txt", "-o", out, "--ctx", "32", "--chunks", "2")
    printed, said = ran(capsys, *arguments)
    assert printed == ""
    assert f"Wrote {out}: 14 matrices, 2 chunks of 32 tokens." in " ".join(said.split())
    before = out.read_bytes()
    assert set(read_imatrix(out).entries) == {
        f"blk.{i}.{name}.weight"
        for i in range(2)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    }
    printed, _ = ran(capsys, *arguments, "--process-output", "--json")
    names = [t["name"] for t in json.loads(printed)["tensors"]]
    assert names == sorted(read_imatrix(out).entries)
    assert "output.weight" in names
    assert out.read_bytes() != before


def test_bad_input(capsys: Capture, model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    (tmp_path / "short.txt").write_text("abc", "utf-8")
    for arguments, words in (
        ((model, "--text", tmp_path / "short.txt", "-o", tmp_path / "i.gguf", "--ctx", "64"), "expected at least 128, two chunks of 64"),
        ((model, "--text", tmp_path / "no.txt", "-o", tmp_path / "i.gguf"), "no.txt"),
        ((model, "--text", text, "-o", model), "this is the input itself"),
        ((model, "--text", text, "-o", tmp_path / "no" / "i.gguf"), "a folder that exists"),
        ((tmp_path / "no.gguf", "--text", text, "-o", tmp_path / "i.gguf"), "no.gguf"),
        ((model, "-o", tmp_path / "i.gguf"), "--text"),
    ):
        assert words in refused(capsys, "imatrix", *arguments)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf", "short.txt", "text.txt"]
