"""``quantscope quantize`` as a user runs it."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from quantscope.cli.demo import MODEL, bundled
from quantscope.imatrix import Entry, Imatrix, write_imatrix
from quantscope.sources.gguf import open_gguf
from tests.e2e.commands import Capture, ran, refused
from tests.models import make_gguf


def test_a_file_that_every_other_command_reads(capsys: Capture, tmp_path: Path) -> None:
    out = tmp_path / "q4.gguf"
    said, err = ran(capsys, "quantize", bundled(MODEL), out, "--type", "q4_k_m")
    assert said.startswith(f"{out}: 4.89 MB, 5.00 bits per weight, 93 tensors: Q4_K × 61, F32 × 21, Q6_K × 11.")
    assert err == ""
    assert "Q4_K" in ran(capsys, "inspect", out)[0]
    ran(capsys, "trace", out, "--tokens", "1,40,50", "-o", tmp_path / "t.safetensors")
    small = make_gguf(tmp_path / "small.gguf")
    ran(capsys, "quantize", small, tmp_path / "small-q5.gguf", "--type", "Q5_0")
    ran(capsys, "weights", small, tmp_path / "small-q5.gguf")


def test_the_document(capsys: Capture, tmp_path: Path) -> None:
    source, out = make_gguf(tmp_path / "q8.gguf", dtype="Q8_0"), tmp_path / "out.gguf"
    said, err = ran(capsys, "quantize", source, out, "--type", "Q5_0", "--tensor-type", "attn_v=Q4_1", "--pure", "--json")
    document = json.loads(said)
    assert document["types"]["blk.1.attn_v.weight"] == "Q4_1"
    assert document["types"]["output.weight"] == "Q5_0"
    assert document["bytes"] == out.stat().st_size
    assert document["source"]["sha256"] == open_gguf(source).sha256()
    recipe = {"version": 1, "base": "Q5_0", "types": {}, "tensor_type": ["attn_v=Q4_1"], "pure": True}
    assert document["recipe"] == json.loads(open_gguf(out).metadata["quantscope.recipe"]) == recipe
    assert "Requantizing" in err
    assert len(document["notes"]) == 1


def test_a_recipe_of_either_form(capsys: Capture, tmp_path: Path) -> None:
    source, made = make_gguf(tmp_path / "m.gguf"), []
    (tmp_path / "r.json").write_text('{"version": 1, "base": "Q8_0", "types": {"blk.0.ffn_up.weight": "Q4_0"}}')
    (tmp_path / "r.txt").write_text(r"blk\.0\.ffn_up=q4_0")
    for i, options in enumerate((["r.json"], ["r.txt", "--type", "Q8_0"])):
        out = tmp_path / f"{i}.gguf"
        ran(capsys, "quantize", source, out, "--recipe", tmp_path / options[0], *options[1:])
        made.append({name: str(t.qtype) for name, t in open_gguf(out).tensors.items()})
    assert made[0] == made[1]
    assert made[0]["blk.0.ffn_up.weight"] == "Q4_0"


def test_an_importance_matrix(capsys: Capture, tmp_path: Path) -> None:
    source, out = make_gguf(tmp_path / "m.gguf", n_embd=256, n_ff=256), tmp_path / "out.gguf"
    matrices = [t for t in open_gguf(source).tensors.values() if len(t.shape) == 2 and t.name.startswith("blk.")]
    entries = {t.name: Entry(np.random.default_rng(0).random((1, t.n_per_row), np.float32), (5,)) for t in matrices}
    write_imatrix(tmp_path / "i.gguf", Imatrix(entries, ("wiki.txt",), 12, 512))
    ran(capsys, "quantize", source, tmp_path / "plain.gguf", "--type", "Q4_K_M")
    ran(capsys, "quantize", source, out, "--type", "Q4_K_M", "--imatrix", tmp_path / "i.gguf")
    plain, weighted = open_gguf(tmp_path / "plain.gguf"), open_gguf(out)
    changed = {n for n in plain.tensors if plain.raw(n).tobytes() != weighted.raw(n).tobytes()}
    assert changed == set(entries)
    keys = {k.split(".")[-1]: v for k, v in weighted.metadata.items() if k.startswith("quantize.imatrix.")}
    assert keys == {"file": "i.gguf", "dataset": "wiki.txt", "entries_count": 14, "chunks_count": 12}
    other = make_gguf(tmp_path / "other.gguf")
    said = refused(capsys, "quantize", other, tmp_path / "no.gguf", "--type", "Q4_0", "--imatrix", tmp_path / "i.gguf")
    assert "The importance matrix is of another model" in said
    assert not (tmp_path / "no.gguf").exists()


def test_bad_input(capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = make_gguf(tmp_path / "m.gguf"), tmp_path / "out.gguf"
    values = np.ones((96, 64), np.float32)
    values[3, 4] = np.inf
    bad = make_gguf(tmp_path / "bad.gguf", edit={"blk.1.ffn_up.weight": values})
    short = tmp_path / "short.gguf"
    short.write_bytes(source.read_bytes()[:-1000])
    (tmp_path / "r.json").write_text('{"version": 1, "base": "Q8_0", "types": {}}')
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for arguments, words in (
        ([source, out], "neither --type nor --recipe was given"),
        ([source, out, "--type", "Q4"], "unknown quantization 'Q4'"),
        ([source, out, "--type", "IQ4_NL"], "quantscope reads IQ4_NL but does not write it"),
        ([source, out, "--type", "F16", "--tensor-type", "attn_v=Q8_0"], "applies them to quantized presets only"),
        ([source, out, "--type", "Q8_0", "--tensor-type", "attn_v"], "expected regex=type"),
        ([source, out, "--type", "Q4_0", "--recipe", tmp_path / "r.json"], "contradicts the recipe"),
        ([source, out, "--recipe", source], "--recipe"),
        ([source, out, "--recipe", tmp_path / "no.json"], "No such file"),
        ([source, source, "--type", "Q8_0"], "is the model to quantize itself"),
        ([source, tmp_path / "no" / "out.gguf", "--type", "Q8_0"], "expected a file in a folder that exists"),
        ([tmp_path / "no.gguf", out, "--type", "Q8_0"], "no such file"),
        ([short, out, "--type", "Q8_0"], "probably incomplete"),
        ([bad, out, "--type", "Q8_0"], "'blk.1.ffn_up.weight' holds inf in row 3, column 4"),
    ):
        assert words in refused(capsys, "quantize", *arguments), words

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left on device" in refused(capsys, "quantize", source, out, "--type", "Q8_0")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
