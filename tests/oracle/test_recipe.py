"""Recipes in stock llama-quantize: its parser takes the lines; sizes are those that were counted, bytes those that were measured."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks.llama_programs import llama_program
from quantscope.cli.demo import MODEL, bundled
from quantscope.imatrix import write_imatrix
from quantscope.quants import encode
from quantscope.remedy.candidates import SEARCHED, Catalog, default_types, unscored
from quantscope.remedy.original import original
from quantscope.remedy.recipe import as_recipe, importance_of, type_lines
from quantscope.sources.gguf import open_gguf
from quantscope.sources.resolve import open_source
from quantscope.weights import Weights

KEYS = 300  # [bytes] at most, of what llama-quantize says about an importance matrix


@pytest.mark.slow
def test_llama_quantize_takes_the_lines(tmp_path: Path) -> None:
    source = open_source(str(bundled(MODEL)))
    model, weights = original(source), Weights(source)
    kinds = default_types()
    catalog = Catalog(model, unscored(model, weights, kinds), [t.name for t in kinds])
    types = {name: kinds[i % len(kinds)] for i, name in enumerate(catalog.found.kl)}  # output next to attn_output, each another type
    c = catalog.candidate("mixed", SEARCHED, types)
    imatrix = importance_of(weights, torch.arange(256).reshape(4, 64), "text.txt")
    (tmp_path / "r.txt").write_text(type_lines(as_recipe(c, catalog)))
    write_imatrix(tmp_path / "i.gguf", imatrix)
    options = ("--tensor-type-file", str(tmp_path / "r.txt"), "--imatrix", str(tmp_path / "i.gguf"))
    program, files = llama_program("llama-quantize"), (str(bundled(MODEL)), str(tmp_path / "out.gguf"))
    done = subprocess.run([program, *options, *files, "Q3_K_M", "1"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    written = open_gguf(tmp_path / "out.gguf")
    assert {n: t.qtype for n, t in written.tensors.items()} == dict(c.types)
    assert c.n_bytes <= written.file_bytes < c.n_bytes + KEYS
    for name, t in types.items():
        w = weights.get(name)
        assert written.raw(name).tobytes() == encode(w.numpy(), t, w.shape[1], imatrix.of(name)).tobytes(), name
