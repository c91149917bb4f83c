"""``quantscope import``: what is printed, what is written, and what is refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from quantscope.cli.main import main
from quantscope.trace import Full, Sample, Stats
from quantscope.trace_file import load
from tests.models import make_gguf
from tests.unit.printed_logs import ids_lines, node

DATA = Path(__file__).parents[1] / "data"
RUSTORCH = DATA / "rustorch"
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(capsys: Capture, *arguments: object, code: int = 0) -> tuple[str, str]:
    """(stdout, stderr) with their line breaks as blanks."""
    capsys.readouterr()
    assert main(["import", *map(str, arguments)]) == code
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return out, " ".join(err.split())


def refused(capsys: Capture, *arguments: object) -> str:
    before = set(Path().iterdir())
    out, err = run(capsys, *arguments, code=2)
    assert out == ""
    assert set(Path().iterdir()) == before
    return err


# ---- What is shown ------------------------------------------------------------------------------------------------------


def test_tables_of_three_logs_side_by_side(capsys: Capture) -> None:
    out, _ = run(capsys, *(RUSTORCH / f"{n}.log" for n in ("q4_k_m", "q4_0", "q6_k")), "--table")
    rows = [line.split() for line in out.splitlines()]
    assert ["layer", "q4_k_m", "q4_0", "q6_k"] in rows
    assert ["21", "1.124", "74.9×", "1.055", "72.1×", "1.260", "112×"] in rows
    assert ["0", "0.009276", "0.009303", "–"] in rows
    assert ["21", "−0.00177", "⚠", "0.0154"] in rows
    assert "RusTorch, " not in out  # no summaries


def test_the_seeds_table_and_its_runs(capsys: Capture) -> None:
    runs = [x for n in ("hello", "test") for x in ("--run", RUSTORCH / f"q4_k_m-{n}.log")]
    out, err = run(capsys, RUSTORCH / "seed-tables.md", *runs, "-o", "t.safetensors")
    assert (
        "Warning: Q4_K_M: Row 0 mixes two runs: input RMS 0.009276 from q4_k_m-hello.log, where the output RMS is 0.015113; output RMS "
        "0.015003 from q4_k_m-test.log, where the input RMS is 0.009120." in err
    )
    assert "Wrote t-Q4_K_M.safetensors, t-Q4_0.safetensors." in err
    assert "q4_k_m-hello.log" in out
    trace = load(Path("t-Q4_K_M.safetensors"))
    assert trace.find("l_out-21", Stats) == Stats({"rms": 1.12435, "mean": -0.036644}, None, {"rms": 6, "mean": 6})
    assert any("mixes two runs" in note for note in trace.origin.notes)
    assert trace.origin.engine == "RusTorch"


def test_the_seeds_conclusions_as_a_ledger(capsys: Capture) -> None:
    """What its tables support, and that a fault of the engine stays untested without a same-file reference."""
    out, _ = run(capsys, RUSTORCH / "seed-tables.md")
    text = " ".join(out[out.index("Hypotheses") :].split())
    assert 'untested RusTorch gives "diplom" (id 13487, rank 6) in Q4_K_M' in text
    assert "supported RMS grows 74.9× (Q4_K_M) and 72.1× (Q4_0), at most 4.0% apart" in text
    assert 'llama.cpp gave "," in Q4_0' in text
    assert "→ quantscope diagnose FILE.gguf --against TRACE" in text
    document, _ = run(capsys, RUSTORCH / "seed-tables.md", "--json")
    entries = {h["id"]: h for h in json.loads(document)["ledger"]}
    assert [name for name, h in entries.items() if h["status"] != "untested"] == ["architecture-amplifies"]
    assert set(entries["engine-bug"]) == {"id", "text", "status", "evidence", "command"}
    assert len(entries["engine-bug"]["evidence"]) == 2


def test_the_tokens_of_logs_are_in_the_ledger(capsys: Capture) -> None:
    out, _ = run(capsys, RUSTORCH / "q4_k_m.log", RUSTORCH / "q4_0.log", "--json")
    told = json.loads(out)["ledger"][0]["evidence"][0]
    assert told == "RusTorch gives token id 13487, rank 6 in q4_k_m and token id 1001, rank 1 in q4_0."


def test_without_layer_tables_there_is_no_ledger(capsys: Capture) -> None:
    out, _ = run(capsys, RUSTORCH / "one-token.log")
    assert "Hypotheses" not in out
    document, _ = run(capsys, RUSTORCH / "one-token.log", "--json")
    assert json.loads(document)["ledger"] == []


def test_json_is_one_document(capsys: Capture) -> None:
    out, err = run(capsys, RUSTORCH / "q4_k_m.log", RUSTORCH / "one-token.log", "--json", "--call", "1")
    found = json.loads(out)
    assert [f["name"] for f in found["files"]] == ["q4_k_m", "one-token"]
    assert found["files"][1]["origin"]["tokens"] == [29896]
    assert found["files"][0]["taps"]["embd"] == [{"kind": "stats", "positions": None, "values": {"rms": 0.009276}, "digits": {"rms": 6}}]
    assert found["layers"][0]["layers"][-1]["rms_growth"] == pytest.approx(1.12435 / 0.015003)
    assert "Output RMS and its growth" in err


def test_a_real_log_of_llama_cpp(capsys: Capture) -> None:
    out, err = run(capsys, DATA / "eval_callback" / "demo-q4_k_m.log.gz", "-o", "t.safetensors")
    text = " ".join(out.split())
    assert "demo-q4_k_m: llama.cpp, 6 tokens [1, 1156, 327, 771, 261, 607]" in text
    assert (
        "samples, position 5: ffn_inp, ffn_norm, ffn_gate, ffn_up, ffn_swiglu, ffn_out, l_out in layer 9; result_norm, result_output"
        in text
    )
    assert err == "Wrote t.safetensors."
    assert load(Path("t.safetensors")).find("l_out-9", Sample).positions == (5,)  # type: ignore[union-attr]


def test_a_trace_can_be_shown_again_beside_a_log(capsys: Capture) -> None:
    run(capsys, RUSTORCH / "q4_0.log", "-o", "q4_0.safetensors")
    out, _ = run(capsys, "q4_0.safetensors", RUSTORCH / "q4_k_m.log", "--table")
    assert ["21", "1.055", "72.1×", "1.124", "74.9×"] in [line.split() for line in out.splitlines()]


# ---- Arrays -------------------------------------------------------------------------------------------------------------


def arrays(path: str = "a.npz", n_layer: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    made = {f"layers.{i}.out": rng.normal(size=(5, 64)).astype(np.float32) for i in range(n_layer)}
    np.savez(path, **made)
    return made


def test_arrays_with_a_map_a_model_and_ids(capsys: Capture) -> None:
    made = arrays()
    model = make_gguf(Path("m.gguf"))
    rule, ids = "layers.{i}.out=l_out-{i}", "1,5,6,7,8"
    out, _ = run(capsys, "a.npz", "--map", rule, "--model", model, "--tokens", ids, "--engine", "mine", "-o", "t.safetensors")
    assert "Layouts found: [T,E] in 2 of 2 arrays." in out
    trace = load(Path("t.safetensors"))
    full = trace.find("l_out-1", Full)
    assert full is not None
    assert torch.equal(full.values, torch.from_numpy(made["layers.1.out"]))
    assert (trace.origin.engine, trace.origin.model, trace.origin.tokens) == ("mine", "m.gguf", (1, 5, 6, 7, 8))
    assert trace.origin.model_sha256 is not None
    assert trace.origin.config is not None
    assert trace.origin.config["n_embd"] == 64


def test_ambiguous_arrays_name_the_option(capsys: Capture) -> None:
    arrays()
    err = refused(capsys, "a.npz", "--map", "layers.{i}.out=l_out-{i}", "-o", "t.safetensors")
    assert (
        "l_out-0 of shape [5, 64] can be read as [T,E] (5 × 64) and [E,T] (64 × 5). Say which it is with `--tokens` and `--model`." in err
    )


def test_a_map_that_matches_nothing(capsys: Capture) -> None:
    arrays()
    err = refused(capsys, "a.npz", "--map", "blocks.{i}=l_out-{i}")
    assert "--map blocks.{i}=l_out-{i} matches no array. The arrays are layers.0.out" in err
    assert "attn_norm-{i}" in err


# ---- Bad input ----------------------------------------------------------------------------------------------------------


def evaluation(n: int, seed: int) -> str:
    x = np.random.default_rng(seed).normal(size=(1, n, 8)).astype(np.float32)
    return node("embd", "GET_ROWS", x) + node("l_out-0", "ADD", x + 1)


def test_two_runs_in_one_log(capsys: Capture) -> None:
    Path("two.log").write_text(ids_lines([1, 5]) + evaluation(2, 0) + ids_lines([1, 6]) + evaluation(2, 1))
    assert "2 runs in one file, expected one: call 1 (tokens 1, 5), call 2 (tokens 1, 6)" in refused(
        capsys, "two.log", "-o", "t.safetensors"
    )
    out, _ = run(capsys, "two.log", "--call", "2")
    assert "[1, 6]" in out


def test_prompt_and_continuation(capsys: Capture) -> None:
    Path("gen.log").write_text(ids_lines([1, 5]) + evaluation(2, 0) + evaluation(1, 1))
    out, err = run(capsys, "gen.log")
    assert "2 forward calls of one generation; call 1, the prompt, is taken" in err
    assert "[1, 5]" in out


def test_a_log_cut_in_the_middle_of_a_tensor(capsys: Capture) -> None:
    text = gzip.decompress((DATA / "eval_callback" / "demo-f16.log.gz").read_bytes()).decode()
    Path("cut.log").write_text(text[: text.index("l_out-4 =") + 300])
    _, err = run(capsys, "cut.log", "-o", "t.safetensors")
    assert "the values of l_out-4 are incomplete: it is left out." in err
    taps = load(Path("t.safetensors")).taps
    assert "l_out-3" in taps
    assert "l_out-4" not in taps
    Path("cut.log").write_text(text[: text.index("[", text.index("embd =")) + 300])
    assert "cut short or filtered" in refused(capsys, "cut.log", "-o", "u.safetensors")


def test_nan_in_a_dump(capsys: Capture) -> None:
    Path("dumps").mkdir()
    Path("dumps/rustorch_layer_3.txt").write_text("0.5\nNaN\ninf\n")
    out, _ = run(capsys, "dumps", "--tokens", "1,2", "-o", "t.safetensors")
    assert "l_out-3: 2 of 3 values are NaN or infinite, the first at channel 1 (nan)." in " ".join(out.split())
    assert load(Path("t.safetensors")).find("l_out-3", Full).positions == (1,)  # type: ignore[union-attr]


def test_numbers_of_another_model(capsys: Capture) -> None:
    model = make_gguf(Path("m.gguf"))
    err = refused(capsys, DATA / "eval_callback" / "demo-f16.log.gz", "--model", model, "-o", "t.safetensors")
    assert "256 channels, but the model of `--model` has 64 there" in err


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "none of the formats"),
        (b"hello\n", "none of the formats"),
        (b"PK\x03\x04rest", "cannot be read as that"),
        (b"\x1f\x8b\x08", "damaged gzip"),
    ],
)
def test_files_that_are_nothing_of_the_kind(content: bytes, why: str, capsys: Capture) -> None:
    Path("x.log").write_bytes(content)
    assert why in refused(capsys, "x.log", "-o", "t.safetensors")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("no-such.log",), "no such file"),
        ((".",), "a folder without anything to import"),
        ((RUSTORCH / "q4_0.log", "--map", "a=embd"), "`--map` names arrays, but this is rustorch"),
        ((RUSTORCH / "q4_0.log", "-o", "t.txt"), "expected a name that ends in .safetensors"),
        ((RUSTORCH / "one-token.log", "--tokens", "1,2"), "written from other ids"),
        ((RUSTORCH / "one-token.log", "--table"), "no file has the RMS of a layer's output"),
        ((RUSTORCH / "q4_0.log", "--format", "eval-callback"), "expected tensors as llama-eval-callback prints them"),
    ],
)
def test_refusals(arguments: tuple[object, ...], why: str, capsys: Capture) -> None:
    assert why in refused(capsys, *arguments)


def test_utf16_as_powershell_writes_it(capsys: Capture) -> None:
    Path("p.log").write_text((RUSTORCH / "q6_k.log").read_text("utf-8"), "utf-16")
    out, _ = run(capsys, "p.log")
    assert "l_out in layers 0, 5, 10, 15 and 21" in out
