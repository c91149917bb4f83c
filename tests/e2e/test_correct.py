"""``quantscope quantize --correct`` as a user runs it: a file that llama.cpp loads, of the preset's size, nearer to the original."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from quantscope.cli.demo import MODEL, bundled
from quantscope.engines.llama_session import LlamaSession
from quantscope.metrics import kl_nats
from quantscope.model.forward import forward
from quantscope.model.ggml_arithmetic import ggml_arithmetic
from quantscope.sources.resolve import open_source
from quantscope.tokenizers import from_source
from quantscope.weights import Weights
from tests.e2e.commands import Capture, ran, refused
from tests.models import STORIES

pytestmark = pytest.mark.long

DEMO = bundled(MODEL)
TEXT = DEMO.with_name("demo.txt")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)


def test_a_corrected_file_of_the_same_size_is_nearer_in_llama_cpp(capsys: Capture) -> None:
    tokenizer = from_source(open_source(DEMO))
    ids = (1, *tokenizer.encode(TEXT.read_text("utf-8")[-2000:])[:200])  # far behind the chunks that are fitted to
    correct = ("--correct", "rounding", "--text", TEXT, "--ctx", "128", "--chunks", "40")
    out, _ = ran(capsys, "quantize", DEMO, "corrected.gguf", "--type", "Q4_0", *correct, "--json")
    found = json.loads(out)
    rows = found["corrections"]
    assert sum(row["kept"] for row in rows) > len(rows) / 2
    assert (rows[0]["name"], rows[0]["kept"]) == ("token_embd.weight", True)
    assert found["recipe"]["correct"] == "rounding"
    ran(capsys, "imatrix", DEMO, "--text", TEXT, "--ctx", "128", "--chunks", "32", "-o", "imatrix.gguf")
    ran(capsys, "quantize", DEMO, "plain.gguf", "--type", "Q4_0", "--imatrix", "imatrix.gguf", "--json")
    logits = {}
    for name in ("corrected", "plain"):
        with LlamaSession(Path(f"{name}.gguf"), n_ctx=256, kv="F16") as llama:
            logits[name] = torch.from_numpy(llama.decode(ids))
    original = forward(torch.tensor([ids]), Weights(open_source(DEMO)))[0]
    kl = {name: float(kl_nats(original, x).mean()) for name, x in logits.items()}
    assert kl["corrected"] < 0.9 * kl["plain"]
    expected = forward(torch.tensor([ids]), Weights(open_source("corrected.gguf")), arithmetic=ggml_arithmetic("F16"))[0]
    assert float(kl_nats(expected, logits["corrected"]).mean()) < 0.1 * kl["corrected"]  # what was predicted is what it gives
    out, _ = ran(capsys, "weights", DEMO, "corrected.gguf")
    assert "says that it was corrected" in " ".join(out.split())


def test_every_correction_in_a_file_that_llama_cpp_loads(capsys: Capture) -> None:
    """Biases that the original does not have, other norm weights, channel scales: what llama.cpp gives is what was predicted."""
    correct = ("--correct", "bias,norms,equalize,rounding", "--text", TEXT, "--ctx", "64", "--chunks", "40")
    out, _ = ran(capsys, "quantize", STORIES, "corrected.gguf", "--type", "Q4_0", *correct, "--json")
    found = json.loads(out)
    kept = {row["correction"] for row in found["corrections"] if row["kept"]}
    assert {"rounding", "bias", "norms"} <= kept
    assert {row["correction"] for row in found["corrections"]} == kept | {"equalize"}
    biases = [row["name"] for row in found["corrections"] if row["kept"] and row["correction"] == "bias"]
    assert found["recipe"]["bias"] == biases
    assert {found["types"][name] for name in biases} == {"F32"}
    ids = (1, 403, 407, 261, 378, 31, 7, 200, 88, 300)
    weights = Weights(open_source("corrected.gguf"))
    with LlamaSession(Path("corrected.gguf"), n_ctx=32, kv="F16") as llama:
        logits = torch.from_numpy(llama.decode(ids))
    predicted = forward(torch.tensor([ids]), weights, arithmetic=ggml_arithmetic("F16"))[0]
    exact, original = forward(torch.tensor([ids]), weights)[0], forward(torch.tensor([ids]), Weights(open_source(STORIES)))[0]
    assert float(kl_nats(predicted, logits).mean()) < 0.1 * float(kl_nats(original, exact).mean())
    said, _ = ran(capsys, "weights", STORIES, "corrected.gguf")
    assert "that the file says were re-tuned" in " ".join(said.split())


def test_refused_input(capsys: Capture, tmp_path: Path) -> None:
    base = ("quantize", DEMO, "out.gguf", "--type", "Q4_0")
    assert "Give both" in refused(capsys, *base, "--correct", "rounding")
    assert "Give both" in refused(capsys, *base, "--text", TEXT)
    assert "expected some of equalize, scales, rounding, norms, bias" in refused(capsys, *base, "--correct", "magic", "--text", TEXT)
    (tmp_path / "short.txt").write_text(TEXT.read_text("utf-8")[:3000], "utf-8")
    said = refused(capsys, *base, "--correct", "rounding", "--text", "short.txt", "--ctx", "128")
    assert "expected at least 1,024: 2 for each of the 512 inputs" in said
    (tmp_path / "i.gguf").write_bytes(b"")
    assert "Leave one out" in refused(capsys, *base, "--correct", "rounding", "--text", TEXT, "--imatrix", "i.gguf")
    assert not Path("out.gguf").exists()
