"""Sensitivity, recipe and corrections of mixtures of experts, as a user runs them; the real llama.cpp takes the files."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from quantscope.engines.llama_session import LlamaSession
from quantscope.inputs import read_inputs
from quantscope.metrics import nmse
from quantscope.model.forward import forward
from quantscope.results import StudyOptions
from quantscope.sources.resolve import open_source
from quantscope.weights import Weights
from tests.arch_models import make_arch
from tests.e2e.commands import Capture, fitting, ran

SENTENCE = "the quick brown fox jumps over a lazy dog while seven wizards box my five dozen liquor jugs and nobody sees why"
IDS = [1, 17, 250, 31, 99, 42, 8, 77, 120, 5]
STACKS = [f"blk.{i}.ffn_{part}_exps.weight" for i in range(3) for part in ("gate", "up", "down")]


def words(path: Path, seed: int, n: int = 1500) -> Path:
    draw = random.Random(seed)
    path.write_text(" ".join(draw.choice(SENTENCE.split()) for _ in range(n)), "utf-8")
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return words(tmp_path_factory.mktemp("text") / "t.txt", 1)


def logits(path: Path) -> torch.Tensor:
    """Of llama.cpp, which refuses a file that it does not take."""
    with LlamaSession(path, n_ctx=len(IDS)) as llama:
        return torch.from_numpy(llama.decode(IDS))


def test_sensitivity_and_recipe(text: Path, tmp_path: Path, capsys: Capture) -> None:
    model, out, q = make_arch(tmp_path / "m.gguf", "gpt-oss"), tmp_path / "r.json", tmp_path / "q.gguf"
    chosen = ("--text", text, "--ctx", "48", "--chunks", "24", "--types", "Q4_0,Q8_0")
    printed, _ = ran(capsys, "sensitivity", model, *chosen, "--json")
    scored = {t["name"]: t for t in fitting("sensitivity", printed)["tensors"]}
    assert all(scored[name]["types"]["Q4_0"]["kl"] > scored[name]["types"]["Q8_0"]["kl"] > 0 for name in STACKS)
    assert not any("gate_inp" in name for name in scored)
    said, _ = ran(capsys, "sensitivity", model, *chosen)
    assert "a matrix before a router costs more than is predicted" in " ".join(said.split())
    ran(capsys, "recipe", model, *chosen, "--target-bpw", "7.5", "-o", out, "--quantized", q)
    weights, types = Weights(open_source(q)), json.loads(out.read_text("utf-8"))["types"]
    assert {weights.stored_types()[name].name for name in STACKS} == {types[name] for name in STACKS} == {"Q4_0", "Q8_0"}
    assert float(nmse(logits(q).flatten(), forward(torch.tensor([IDS]), weights).flatten())) < 1e-3


def divergence(original: Path, other: Path, text: Path) -> float:
    """Mean KL divergence on a text."""
    source = open_source(original)
    given = read_inputs(StudyOptions((str(original),), text=text, n_ctx=48), source, Weights(source).config).text
    assert given is not None
    ids = given.ids
    ref, test = (forward(ids, Weights(open_source(path))).double().log_softmax(-1) for path in (original, other))
    return float((ref.exp() * (ref - test)).sum(-1).mean())


@pytest.mark.long
@pytest.mark.parametrize("case", ["gpt-oss", "qwen3moe"])
def test_corrected_experts(case: str, text: Path, tmp_path: Path, capsys: Capture) -> None:
    """Nearer to the original than what llama-quantize --imatrix makes, and llama.cpp computes what we do with it."""
    model, plain, importance, better = make_arch(tmp_path / "m.gguf", case), tmp_path / "p.gguf", tmp_path / "i.gguf", tmp_path / "q.gguf"
    given = ("--text", text, "--ctx", "48", "--chunks", "40")
    ran(capsys, "imatrix", model, *given, "-o", importance)
    ran(capsys, "quantize", model, plain, "--type", "Q4_0", "--imatrix", importance)
    _, said = ran(capsys, "quantize", model, better, "--type", "Q4_0", *given, "--correct", "rounding,norms")
    assert "the norms before experts were neither re-tuned nor equalized" in " ".join(said.split())
    files = {name: open_source(path) for name, path in (("plain", plain), ("better", better))}
    assert any(
        files["plain"].raw(name).tobytes() != files["better"].raw(name).tobytes() for name in STACKS if name in files["plain"].tensors
    )
    other = words(tmp_path / "other.txt", 2, 400)  # which nothing was fitted to
    assert divergence(model, better, other) < 0.9 * divergence(model, plain, other)
    assert float(nmse(logits(better).flatten(), forward(torch.tensor([IDS]), Weights(open_source(better))).flatten())) < 1e-3
