"""Importance matrices against llama.cpp: its own files, its quantizer on ours, and the figures of llama-imatrix."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.llama_programs import llama_program
from quantscope.cli.demo import MODEL, TEXT, bundled
from quantscope.imatrix import Imatrix, check_imatrix, read_imatrix, write_imatrix
from quantscope.importance import compute_imatrix, compute_importance, prepare_importance
from quantscope.lockstep import Member
from quantscope.quants import decode, encode
from quantscope.recipes import Options, TensorShape, assign_types, facts_from_gguf
from quantscope.results import PlanInfo, StudyOptions
from quantscope.sources.gguf import open_gguf
from quantscope.sources.resolve import open_source
from quantscope.weights import Weights
from tests.models import make_gguf
from tests.oracle import ggml
from tests.oracle.llama_quant import quantized_types
from tests.oracle.quantized_files import demo_file

PRESETS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q2_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K")
CHUNKS, CTX = 4, 128


@cache
def importance(*, chunks: int | None = CHUNKS, ctx: int = CTX, process_output: bool = False) -> Imatrix:
    """Of the demo model on the demo text."""
    options = StudyOptions((str(demo_file("F32")),), text=bundled(TEXT), n_ctx=ctx, n_chunks=chunks)
    return compute_importance(prepare_importance(options, process_output=process_output))


@pytest.mark.parametrize("preset", PRESETS)
def test_bytes_of_llama_quantize(tmp_path: Path, preset: str) -> None:
    """Types and bytes of every tensor of the trained demo model, with its real importance."""
    assert_quantized_alike(bundled(MODEL), tmp_path / "out.gguf", preset, importance(process_output=True), 72)


def test_bytes_of_a_tied_head(tmp_path: Path) -> None:
    """llama-quantize looks for the head's weights under the embedding's name where they are one matrix."""
    model = make_gguf(tmp_path / "m.gguf", tied=True, n_embd=256, n_ff=256)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 288, (2, 64)))
    found = compute_imatrix(Member("", Weights(open_source(model))), ids, PlanInfo(1, 2, 2, 1, 1, 0, 0), process_output=True)
    assert "token_embd.weight" in found.entries
    assert_quantized_alike(model, tmp_path / "out.gguf", "Q4_K_M", found, 15)


def assert_quantized_alike(model: Path, out: Path, preset: str, found: Imatrix, n_tensors: int) -> None:
    source = open_gguf(model)
    theirs = quantized_types(model, out, preset, Options(imatrix=True), {name: entry.mean for name, entry in found.entries.items()})
    assert theirs is not None
    tensors = [TensorShape(t.name, t.shape, t.qtype) for t in source.tensors.values()]
    assert assign_types(preset, tensors, facts_from_gguf(source.metadata), Options(imatrix=True)) == theirs
    written, compared = open_gguf(out), 0
    for name, qtype in theirs.items():
        if qtype != source.tensors[name].qtype:
            x = decode(source.raw(name), source.tensors[name].qtype).reshape(source.tensors[name].shape)
            ours = encode(x, qtype, x.shape[-1], found.of(name))
            ggml.assert_same_bytes(ours, written.raw(name), f"{preset}, {name} as {qtype}")
            compared += 1
    assert compared == n_tensors


def run(program: str, *arguments: str | Path) -> str:
    done = subprocess.run(
        [llama_program(program), *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:]
    return done.stdout


def run_imatrix(model: Path, text: Path, ctx: int, out: Path) -> Imatrix:
    """What llama-imatrix makes of a model, in the format that the file's name says.  One thread, and nothing rounded to 16 bits."""
    exact = ("-fa", "off", "-ctk", "f32", "-ctv", "f32", "-t", "1", "--no-ppl", "--process-output")
    text_options = ("-f", text, "-c", str(ctx), "--chunks", str(CHUNKS))
    run("llama-imatrix", "-m", model, *text_options, *exact, "--output-format", out.suffix[1:], "-o", out)
    return read_imatrix(out)


@cache
def their_files() -> tuple[Path, Path]:
    """Of the demo model, GGUF and legacy."""
    paths = demo_file("F32").with_name("theirs.gguf"), demo_file("F32").with_name("theirs.dat")
    for path in paths:
        run_imatrix(demo_file("F32"), bundled(TEXT), CTX, path)
    return paths


def assert_close(theirs: Imatrix, ours: Imatrix, most: float) -> None:
    """Names, counts, sizes; and the largest relative difference of a column's mean."""
    assert (theirs.n_chunk, theirs.n_ctx, set(theirs.entries)) == (ours.n_chunk, ours.n_ctx, set(ours.entries))
    worst = 0.0
    for name, entry in theirs.entries.items():
        assert entry.counts == ours.entries[name].counts == (ours.n_chunk * ours.n_ctx,)
        assert entry.sums.shape == ours.entries[name].sums.shape
        worst = max(worst, float((np.abs(entry.mean - ours.entries[name].mean) / entry.mean).max()))
    print(f"largest relative difference of a column's mean: {worst:.2g}")
    assert worst < most


@pytest.mark.slow
def test_figures_of_llama_imatrix() -> None:
    theirs = read_imatrix(their_files()[0])
    assert_close(theirs, importance(process_output=True), 1e-5)
    source = open_gguf(bundled(MODEL))
    assert check_imatrix(theirs, "demo", {name: t.shape for name, t in source.tensors.items()}) == ()


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_figures_of_other_architectures(tmp_path: Path, arch: str) -> None:
    """Random weights; rotations, biases and norms of q and k."""
    model, text = make_gguf(tmp_path / "m.gguf", arch=arch, n_layer=3), tmp_path / "text.txt"
    text.write_text("a quick brown fox jumps over the lazy dog. " * 8, "utf-8")
    options = StudyOptions((str(model),), text=text, n_ctx=32, n_chunks=CHUNKS)
    ours = compute_importance(prepare_importance(options, process_output=True))
    assert_close(run_imatrix(model, text, 32, tmp_path / "i.gguf"), ours, 1e-5)


@pytest.mark.slow
def test_legacy_file_of_llama_imatrix() -> None:
    """The same figures, which pass through a division and a product on their way."""
    today, legacy = map(read_imatrix, their_files())
    assert legacy.n_chunk == CHUNKS
    assert set(legacy.entries) == set(today.entries)
    for name, entry in today.entries.items():
        np.testing.assert_allclose(legacy.entries[name].mean, entry.mean, rtol=3e-7)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["Q4_0", "Q4_K_M"])
def test_llama_quantize_takes_the_file(tmp_path: Path, preset: str) -> None:
    found = importance()
    write_imatrix(tmp_path / "ours.gguf", found)
    said = run("llama-quantize", "--imatrix", tmp_path / "ours.gguf", bundled(MODEL), tmp_path / "out.gguf", preset, "1")
    assert f"loaded {len(found.entries)} importance matrix entries" in said
    assert f"computed on {CHUNKS} chunks" in said
    again = quantized_types(
        bundled(MODEL), tmp_path / "api.gguf", preset, Options(imatrix=True), {n: e.mean for n, e in found.entries.items()}
    )
    written, api = open_gguf(tmp_path / "out.gguf"), open_gguf(tmp_path / "api.gguf")
    assert {n: t.qtype for n, t in written.tensors.items()} == again
    for name in written.tensors:
        ggml.assert_same_bytes(written.raw(name), api.raw(name), name)


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1], ids=["GGUF", "legacy"])
def test_their_file_quantizes_as_in_llama_quantize(tmp_path: Path, number: int) -> None:
    path = their_files()[number]
    found, source = read_imatrix(path), open_gguf(bundled(MODEL))
    run("llama-quantize", "--imatrix", path, bundled(MODEL), tmp_path / "out.gguf", "Q4_K_M", "1")
    written = open_gguf(tmp_path / "out.gguf")
    for name in ("blk.0.ffn_down.weight", "blk.3.attn_q.weight", "blk.9.attn_v.weight", "output.weight"):
        x = decode(source.raw(name), source.tensors[name].qtype).reshape(source.tensors[name].shape)
        ours = encode(x, written.tensors[name].qtype, x.shape[-1], found.of(name))
        ggml.assert_same_bytes(ours, written.raw(name), name)
