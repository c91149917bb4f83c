"""``quantscope diagnose`` as a user runs it: clean engines, planted faults by strength of evidence, other files and ids, refused input."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import numpy_engine
from benchmarks.planted import Planted
from quantscope.compare import stats_of
from quantscope.fingerprint import fingerprint_trace
from quantscope.trace import LAST, Full, Sample, Stats, Trace
from quantscope.trace_file import save
from tests.e2e.commands import Capture, fitting, ran, refused
from tests.huge_channel import CASES, make_huge_channel
from tests.models import STORIES, make_gguf
from tests.oracle.llama_quant import quantized_types

IDS = (1, 403, 407, 261, 378, 77, 205, 13)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)


def planted(*causes: str, model: Path = STORIES) -> tuple[Planted, ...]:
    """The first way in which each fault can be planted."""
    possible = numpy_engine.plantable(model)
    return tuple(next(p for p in possible if p.cause == cause) for cause in causes)


def faulty(path: str, *causes: str) -> Trace:
    """What an independent engine with these faults leaves; also as a file."""
    trace = numpy_engine.run(STORIES, IDS, planted(*causes))
    save(trace, Path(path))
    return trace


def statistics(trace: Trace) -> Trace:
    """RMS, mean, min and max of every tap, and nothing else."""
    taps = {
        tap: (Stats({k: v for k, v in stats_of(full.values).items() if k != "sum"}),)
        for tap in trace.taps
        if (full := trace.find(tap, Full)) is not None
    }
    return Trace(trace.origin, taps)


def document(capsys: Capture, *arguments: str | Path, code: int) -> dict[str, Any]:
    out, _ = ran(capsys, "diagnose", *arguments, "--json", code=code)
    return fitting("diagnosis", out)


def status(found: dict[str, Any], hypothesis: str) -> str:
    return str(next(h["status"] for h in found["ledger"] if h["id"] == hypothesis))


def conclusion(found: dict[str, Any], record: str) -> str:
    return str(next(r["conclusion"] for r in found["evidence"] if r["id"] == record))


def test_a_clean_engine_is_within_and_nothing_is_called_free_of_bugs(capsys: Capture) -> None:
    out, err = ran(capsys, "diagnose", STORIES, "--against", "llama.cpp", "--quick", "-o", "found")
    words = " ".join(out.split())
    assert words.startswith("Nothing found beyond the expected arithmetic of llama.cpp at 83 taps.")
    assert "Not testable with this evidence:" in words
    assert "no bug" not in words
    assert err == "Wrote found/diagnosis.html and found/diagnosis.md.\n"
    assert "# quantscope diagnosis of" in Path("found/diagnosis.md").read_text()
    assert Path("found/llama.cpp.safetensors").exists()
    found = document(capsys, STORIES, "--against", "found/llama.cpp.safetensors", code=0)
    assert (found["verdict"], status(found, "engine-bug"), found["level"]["number"]) == ("within", "refuted", 1)
    assert {conclusion(found, r) for r in ("file", "ids", "weights", "taps", "replay")} == {"agrees"}


def test_a_fault_is_named_with_its_operations(capsys: Capture) -> None:
    faulty("t.safetensors", "rope-theta")
    out, _ = ran(capsys, "diagnose", STORIES, "--against", "t.safetensors", code=1)
    words = " ".join(out.split())
    assert words.startswith("The engine: numpy rotates with the base 500000 [rope-theta (500000); Qcur-0, Kcur-0, Qcur-1 and 7 more].")
    assert "from its own inputs" not in words.split("Evidence")[0]
    found = document(capsys, STORIES, "--against", "t.safetensors", code=1)
    assert (found["verdict"], found["level"]["name"], status(found, "engine-bug")) == ("engine", "cause consistent", "supported")
    assert {row["tap"].partition("-")[0] for row in found["causes"]["convicted"]} == {"Qcur", "Kcur"}


def test_two_faults_at_once_are_both_named(capsys: Capture) -> None:
    faulty("t.safetensors", "act-relu", "norm-layernorm")
    found = document(capsys, STORIES, "--against", "t.safetensors", code=1)
    assert {n["fault"] for n in found["causes"]["named"]} == {"act-relu", "norm-layernorm"}
    assert "2 faults at once" in found["answer"]


def test_a_fault_of_the_run_as_a_whole(capsys: Capture) -> None:
    """No operation is wrong by itself when a layer runs twice: the catalogue explains what replay leaves."""
    faulty("t.safetensors", "layer-repeated")
    found = document(capsys, STORIES, "--against", "t.safetensors", code=1)
    assert found["answer"].startswith("The engine: numpy runs layer 1 twice")


def test_weaker_evidence_gives_the_same_cause(capsys: Capture) -> None:
    trace = faulty("t.safetensors", "gqa-tile")
    for weak in (fingerprint_trace(trace), statistics(trace)):
        save(weak, Path("weak.safetensors"))
        found = document(capsys, STORIES, "--against", "weak.safetensors", code=1)
        assert [n["fault"] for n in found["causes"]["named"]] == ["gqa-tile"]
        assert conclusion(found, "replay") == "not measured"


def test_what_no_known_fault_explains_is_said_to_be_so(capsys: Capture) -> None:
    """Noise of a tenth in one product: convicted, and nothing is made up."""
    trace = numpy_engine.run(STORIES, IDS)
    full = trace.find("ffn_up-2", Full)
    assert full is not None
    noisy = Full(full.values * (1 + 0.1 * (full.values * 1e4).sin()))
    save(Trace(trace.origin, {**trace.taps, "ffn_up-2": (noisy,)}), Path("t.safetensors"))
    found = document(capsys, STORIES, "--against", "t.safetensors", code=1)
    assert (found["level"]["name"], found["causes"]["named"]) == ("operation convicted", [])
    assert "None of the known faults explains ffn_up-2" in found["answer"]


def test_other_ids_end_the_comparison(capsys: Capture) -> None:
    """The engine left out BOS: no tap is compared, the rule is named."""
    trace = numpy_engine.run(STORIES, (403, 407, 261, 378))
    save(trace, Path("t.safetensors"))
    found = document(capsys, STORIES, "--against", "t.safetensors", "--prompt", "Once upon a time", code=1)
    assert (found["verdict"], found["level"]["number"], found["taps"]) == ("tokenizer", 0, [])
    assert "BOS" in found["answer"]
    assert status(found, "tokenizer") == "supported"
    assert status(found, "engine-bug") == "untested"


def test_another_file_ends_the_comparison(capsys: Capture) -> None:
    trace = faulty("t.safetensors")
    save(Trace(replace(trace.origin, model_sha256="0" * 64), trace.taps), Path("t.safetensors"))
    found = document(capsys, STORIES, "--against", "t.safetensors", code=2)
    assert (found["verdict"], conclusion(found, "file")) == ("not comparable", "differs")
    assert "ran another file" in found["answer"]


def test_first_values_of_a_trace_without_ids(capsys: Capture) -> None:
    """What many engines print: ten values of the last token, six decimals.  Without the ids nothing can be said; with them the cause."""
    trace = faulty("t.safetensors", "act-gelu-tanh")
    ten = {
        tap: (Sample(full.values[-1, :10], torch.arange(10), (1, full.values.shape[-1]), (LAST,), 6),)
        for tap in trace.taps
        if not tap.startswith("kq_soft_max") and (full := trace.find(tap, Full)) is not None
    }
    save(Trace(replace(trace.origin, tokens=None, model_sha256=None, arithmetic="unknown"), ten), Path("ten.safetensors"))
    found = document(capsys, STORIES, "--against", "ten.safetensors", code=2)
    assert "`--tokens 1,2,3`" in found["answer"]
    found = document(capsys, STORIES, "--against", "ten.safetensors", "--tokens", ",".join(map(str, IDS)), code=1)
    (named,) = found["causes"]["named"]
    assert {named["fault"], *named["twins"]} == {"act-gelu-erf", "act-gelu-tanh"}
    assert "float32" in found["causes"]["separating"]
    assert "GELU" in found["answer"]
    assert any("fingerprint" in step for step in found["next"])


def test_a_quantization_that_changes_the_token(capsys: Capture, tmp_path: Path) -> None:
    """The engine does what the file says; the file says something else than the original."""
    original, coarse = (make_gguf(tmp_path / f"{t}.gguf", seed=8, dtype=t) for t in ("F32", "Q4_0"))
    found = document(capsys, coarse, "--against", "llama.cpp", "--original", original, "--tokens", "1,45,58,69,80", "--quick", code=1)
    assert found["verdict"] == "quantization"
    assert status(found, "quantization-too-coarse") == "supported"
    assert status(found, "engine-bug") == "refuted"
    assert "Quantization alone raises KL from 0 to" in " ".join(found["about_logits"])


def test_activation_rounding_is_no_bug(capsys: Capture, tmp_path: Path) -> None:
    """One channel 300 times the rest: rounding activations to blocks of 256 changes the token."""
    (seed, ids), plain, model = CASES[0], tmp_path / "plain.gguf", tmp_path / "Q4_K_M.gguf"
    assert quantized_types(make_huge_channel(plain, seed), model, "Q4_K_M") is not None
    found = document(capsys, model, "--against", "llama.cpp", "--tokens", ",".join(map(str, ids)), "--quick", code=1)
    assert found["verdict"] == "activation rounding"
    assert status(found, "activation-rounding") == "supported"


def test_refused_input(capsys: Capture) -> None:
    assert "no such file, expected a trace" in refused(capsys, "diagnose", STORIES, "--against", "none.safetensors")
    Path("run.log").write_text("ffn_out-0 = f32\n")
    assert "quantscope import" in refused(capsys, "diagnose", STORIES, "--against", "run.log")
    assert "no such file" in refused(capsys, "diagnose", "none.gguf", "--against", "llama.cpp")
    both = refused(capsys, "diagnose", STORIES, "--against", "llama.cpp", "--prompt", "a", "--tokens", "1")
    assert "--prompt and --tokens" in both
    assert "--first-batch" in refused(capsys, "diagnose", STORIES, "--against", "llama.cpp", "--first-batch", "2")
    assert "--kv" in refused(capsys, "diagnose", STORIES, "--against", "llama.cpp", "--kv", "Q3")


def test_a_cache_fault_shows_in_steps(capsys: Capture) -> None:
    """Prompt of four tokens, then one at a time: the newest cell is not seen."""
    trace = numpy_engine.run(STORIES, IDS, [p for p in numpy_engine.plantable(STORIES) if p.cause == "cache-off-by-one"][:1], n_prompt=4)
    save(trace, Path("t.safetensors"))
    found = document(capsys, STORIES, "--against", "t.safetensors", "--first-batch", "4", code=1)
    assert [n["fault"] for n in found["causes"]["named"]] == ["cache-off-by-one"]
    ran(capsys, "trace", STORIES, "--steps", "--tokens", "1,403,407", "-o", "steps.safetensors")
    assert document(capsys, STORIES, "--against", "steps.safetensors", code=0)["verdict"] == "within"
