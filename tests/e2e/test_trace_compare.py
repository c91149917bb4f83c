"""``quantscope trace`` and ``compare`` as a user runs them: real engines, planted faults, exit codes, refused input."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantscope.sources.resolve import open_source
from quantscope.trace import Full
from quantscope.trace_file import load, save
from quantscope.weights import Weights
from tests.e2e.commands import Capture, ran, refused
from tests.models import STORIES, make_gguf
from tests.oracle.quantized_files import demo_file

IDS = "1,40,50,60,270"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)


def compared(capsys: Capture, *arguments: str | Path, code: int) -> dict[str, Any]:
    out, _ = ran(capsys, "compare", *arguments, "--json", code=code)
    document: dict[str, Any] = json.loads(out)
    return document


def test_two_engines_on_one_file(capsys: Capture, tmp_path: Path) -> None:
    model = make_gguf(tmp_path / "m.gguf", seed=3)
    out, err = ran(capsys, "trace", model, "--tokens", IDS, "-o", "ref.safetensors")
    assert re.search(r"reference \(m.gguf\), .*exact float32: 35 taps at 5 positions", out)
    assert err == "Wrote ref.safetensors.\n"
    out, _ = ran(capsys, "trace", model, "--engine", "llama.cpp", "--tokens", IDS, "--kv", "F32")
    assert "Observing" in out
    out, _ = ran(capsys, "compare", "ref.safetensors", "m-llama.cpp.safetensors", "--floor", "1e-10")
    assert out.startswith("No divergence: all 35 taps")
    assert "result_output" in out


def test_a_wrong_weight_is_found_and_named(capsys: Capture, tmp_path: Path) -> None:
    """An engine that transposes one square matrix: a fault planted in the file it runs."""
    good = make_gguf(tmp_path / "good.gguf", seed=3)
    output = Weights(open_source(good)).get("blk.1.attn_output.weight").numpy()
    assert output.shape[0] == output.shape[1]
    bad = make_gguf(tmp_path / "bad.gguf", seed=3, edit={"blk.1.attn_output.weight": np.ascontiguousarray(output.T)})
    ran(capsys, "trace", good, "--tokens", IDS, "-o", "ref.safetensors")
    ran(capsys, "trace", bad, "--engine", "llama.cpp", "--kv", "F32", "--tokens", IDS, "-o", "test.safetensors")
    assert "--different-files" in refused(capsys, "compare", "ref.safetensors", "test.safetensors")
    found = compared(capsys, "ref.safetensors", "test.safetensors", "--different-files", code=1)
    assert found["first_divergence"] == "attn_out-1"
    assert "Its input kqv_out-1 agrees, so the fault is in what makes it: the product with attn_output.weight" in found["answer"]
    before = [row for row in found["taps"] if row["verdict"] == "within"]
    assert len(before) >= 25
    out, _ = ran(capsys, "compare", "ref.safetensors", "test.safetensors", "--different-files", code=1)
    assert "≠ attn_out-1" in out


def test_two_faults_at_once_are_both_convicted(capsys: Capture, tmp_path: Path) -> None:
    """Transposed attn_output in layer 0 and exchanged gate and up in layer 1: the second is wrong by itself, after the first."""
    good = make_gguf(tmp_path / "good.gguf", seed=3)
    w = {n: Weights(open_source(good)).get(f"blk.{n}.weight").numpy() for n in ("0.attn_output", "1.ffn_gate", "1.ffn_up")}
    edit = {
        "blk.0.attn_output.weight": np.ascontiguousarray(w["0.attn_output"].T),
        "blk.1.ffn_gate.weight": w["1.ffn_up"],
        "blk.1.ffn_up.weight": w["1.ffn_gate"],
    }
    bad = make_gguf(tmp_path / "bad.gguf", seed=3, edit=edit)
    ran(capsys, "trace", good, "--tokens", IDS, "-o", "ref.safetensors")
    ran(capsys, "trace", bad, "--engine", "llama.cpp", "--kv", "F32", "--tokens", IDS, "-o", "test.safetensors")
    found = compared(capsys, "ref.safetensors", "test.safetensors", "--different-files", "--model", good, code=1)
    assert found["first_divergence"] == "attn_out-0"
    said = found["answer"].partition("Local replay")[2]
    assert re.findall(r"([a-z_]+-\d) \(", said) == ["attn_out-0", "ffn_gate-1", "ffn_up-1"]
    ran(capsys, "trace", good, "--engine", "llama.cpp", "--kv", "F32", "--tokens", IDS, "-o", "right.safetensors")
    found = compared(capsys, "ref.safetensors", "right.safetensors", "--model", good, code=0)
    assert "Local replay: all 35 operations are right" in found["answer"]


def test_fingerprints_as_text_lines(capsys: Capture, tmp_path: Path) -> None:
    model = make_gguf(tmp_path / "m.gguf", seed=3)
    ran(capsys, "trace", model, "--tokens", IDS, "--fingerprint", "-o", "prints.txt")
    lines = Path("prints.txt").read_text().splitlines()
    assert lines[0].startswith(f"qsfp1-run tokens={IDS} engine=reference model=m.gguf")
    assert sum(line.startswith("qsfp1 ") for line in lines) == 35
    assert "expected --fingerprint" in refused(capsys, "trace", model, "--tokens", IDS, "-o", "values.txt")
    assert not Path("values.txt").exists()


def test_a_rotation_with_another_base_is_named(capsys: Capture, tmp_path: Path) -> None:
    """The engine reads a file whose rope.freq_base is wrong; everything else is the same."""
    good = make_gguf(tmp_path / "good.gguf", seed=5)
    bad = make_gguf(tmp_path / "bad.gguf", seed=5, metadata={"llama.rope.freq_base": 500000.0})
    ran(capsys, "trace", good, "--tokens", IDS, "-o", "ref.safetensors")
    ran(capsys, "trace", bad, "--engine", "llama.cpp", "--kv", "F32", "--tokens", IDS, "-o", "test.safetensors")
    found = compared(capsys, "ref.safetensors", "test.safetensors", "--different-files", code=1)
    assert found["first_divergence"] == "Qcur-0"
    assert "Its input Qcur_pre-0 agrees, so the fault is in what makes it: RoPE" in found["answer"]
    assert found["floor"].startswith("4 times what ggml's arithmetic")
    assert re.search(r"500,?000", found["rotation"])


def test_a_real_log_against_the_reference(capsys: Capture) -> None:
    """A log of the real llama-eval-callback: samples, judged by the emulated arithmetic of the same file."""
    log = Path(__file__).parents[1] / "data" / "eval_callback" / "demo-f16.log.gz"
    ran(capsys, "import", log, "-o", "log.safetensors")
    ids = ",".join(map(str, load(Path("log.safetensors")).origin.tokens or ()))
    for name, arithmetic in (("ref", "exact"), ("predicted", "ggml")):
        ran(capsys, "trace", demo_file("F16"), "--tokens", ids, "--arithmetic", arithmetic, "-o", f"{name}.safetensors")
    found = compared(capsys, "ref.safetensors", "log.safetensors", "--predicted", "predicted.safetensors", code=0)
    assert len(found["taps"]) == 163
    assert {row["kind"] for row in found["taps"]} == {"sample"}
    assert found["first_divergence"] is None
    assert "only the values that were printed are compared" in " ".join(found["notes"])
    other = "".join(f"{i}," for i in range(40, 45)) + "9"
    ran(capsys, "trace", demo_file("F16"), "--tokens", other, "-o", "other.safetensors")
    assert "expected the same token ids" in refused(capsys, "compare", "other.safetensors", "log.safetensors")


def test_other_tokens_are_refused(capsys: Capture) -> None:
    ran(capsys, "trace", STORIES, "--tokens", "1,403,407", "-o", "a.safetensors")
    ran(capsys, "trace", STORIES, "--tokens", "403,407", "-o", "b.safetensors")
    assert "differ first at position 0: 1 against 403" in refused(capsys, "compare", "a.safetensors", "b.safetensors")


def test_a_nan_in_a_trace(capsys: Capture) -> None:
    ran(capsys, "trace", STORIES, "--tokens", "1,403,407", "-o", "a.safetensors")
    trace = load(Path("a.safetensors"))
    full = trace.find("ffn_up-1", Full)
    assert full is not None
    full.values[2, 7] = float("nan")
    save(trace, Path("b.safetensors"))
    found = compared(capsys, "a.safetensors", "b.safetensors", code=1)
    assert found["first_divergence"] == "ffn_up-1"
    row = next(r for r in found["taps"] if r["tap"] == "ffn_up-1")
    assert row["nmse"] is None  # JSON has no infinity
    assert row["worst"]["index"] == [2, 7]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("trace", "no.gguf"), "no such file"),
        (("trace", STORIES, "--tokens", "1", "--prompt", "x"), "Leave one out"),
        (("trace", STORIES, "--tokens", "x"), "no token id"),
        (("trace", STORIES, "--tokens", "99999"), "no token of this model"),
        (("trace", STORIES, "--engine", "candle"), "candle"),
        (("trace", STORIES, "--taps", "("), "regular expression"),
        (("trace", STORIES, "--taps", "zzz"), "matches none of the"),
        (("trace", STORIES, "--engine", "llama.cpp", "--arithmetic", "ggml"), "--arithmetic ggml"),
        (("trace", STORIES, "-o", "no/folder/t.safetensors"), "could not be written"),
        (("compare", "a.safetensors", "b.safetensors"), "no such file, expected a trace"),
        (("compare", STORIES, STORIES), "expected a trace"),
    ],
)
def test_bad_input(capsys: Capture, tmp_path: Path, arguments: tuple[str | Path, ...], expected: str) -> None:
    assert expected in refused(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []
