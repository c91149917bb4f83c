"""``quantscope golden`` as a user runs it: the real llama.cpp within the tolerances, planted faults outside them, refused input."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantscope.fingerprint import fingerprint_trace, run_line, to_line
from quantscope.importers.fingerprints import read_fingerprints
from quantscope.trace import Fingerprint, Full, Stats, Trace
from quantscope.trace_file import load, save
from tests.e2e.commands import Capture, ran, refused
from tests.models import STORIES, STORIES_PROMPT, make_gguf
from tests.oracle.quantized_files import demo_file

IDS = ",".join(map(str, STORIES_PROMPT))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)


def checked(capsys: Capture, pack: str, trace: str, *arguments: str, code: int = 0) -> dict[str, Any]:
    out, _ = ran(capsys, "golden", "check", pack, "--trace", trace, *arguments, "--json", code=code)
    document: dict[str, Any] = json.loads(out)
    return document


def test_llama_cpp_on_a_quantized_file(capsys: Capture) -> None:
    model = demo_file("Q4_K_M")
    out, _ = ran(capsys, "golden", model, "-o", "pack", "--prompt", "It was a dark and stormy night")
    assert "every tap of every probe" in out
    ids = Path("pack/probes.txt").read_text().splitlines()[3].removeprefix("text: ").replace(" ", ",")
    ran(capsys, "trace", model, "--engine", "llama.cpp", "--tokens", ids, "-o", "t.safetensors")
    found = checked(capsys, "pack", "t.safetensors")
    assert found["answer"].startswith("Probe text. No divergence: all 163 taps")
    assert {row["kind"] for row in found["taps"]} == {"values"}


def test_the_checker_in_c_passes_llama_cpp_and_fails_a_transposed_weight(capsys: Capture) -> None:
    """An engine with a square matrix transposed: a fault planted in the file it runs; its taps as raw files."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed: the checker cannot be compiled here")
    good = make_gguf(Path("good.gguf"), seed=3)
    ran(capsys, "golden", good, "-o", "pack", "--tokens", "1,40,50,60,270", "--arithmetic", "exact")
    subprocess.run(["gcc", "-O2", "-o", "check", "pack/check.c", "-lm"], check=True, timeout=60)
    q = np.fromfile("pack/tensors/blk.1.attn_q.weight.f32", "<f4").reshape(2, -1)
    bad = make_gguf(Path("bad.gguf"), seed=3, edit={"blk.1.attn_q.weight": transposed(good, "blk.1.attn_q.weight")})
    assert not np.array_equal(q, transposed(good, "blk.1.attn_q.weight")[:2])
    for model, code, last in ((good, 0, "35 within tolerance, 0 not"), (bad, 1, "first failure: two/Qcur_pre-1.f32 ")):
        ran(capsys, "trace", model, "--engine", "llama.cpp", "--kv", "F32", "--tokens", "1,40", "-o", "t.safetensors")
        dump(load(Path("t.safetensors")), Path("mine") / "two")
        done = subprocess.run(["./check", "pack", "mine", "two/"], capture_output=True, text=True, timeout=60)
        assert done.returncode == code
        assert done.stdout.splitlines()[-1].startswith(last)


def transposed(model: Path, name: str) -> np.ndarray:
    from quantscope.sources.resolve import open_source
    from quantscope.weights import Weights

    return np.ascontiguousarray(Weights(open_source(model)).get(name).numpy().T)


def dump(trace: Trace, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for tap in trace.taps:
        full = trace.find(tap, Full)
        assert full is not None
        full.values.numpy().astype("<f4").tofile(folder / f"{tap}.f32")


def test_a_log_of_fingerprints_is_enough(capsys: Capture) -> None:
    """println of one line a tap in an engine with one layer's heads swapped."""
    ran(capsys, "golden", STORIES, "-o", "pack", "--arithmetic", "exact")
    ran(capsys, "trace", STORIES, "--engine", "llama.cpp", "--kv", "F32", "--tokens", IDS, "-o", "t.safetensors")
    trace = load(Path("t.safetensors"))
    for planted, code in ((False, 0), (True, 1)):
        if planted:
            full = trace.find("kqv_out-2", Full)
            assert full is not None
            full.values[:, :16] = full.values[:, :16].roll(8, 1)
        prints = fingerprint_trace(trace)
        lines = [to_line(tap, f) for tap in prints.taps for f in prints.all_of(tap, Fingerprint)]
        (read,) = read_fingerprints("\n".join(["start", run_line(trace.origin), *lines, "end"]), "engine.log")
        save(read, Path("log.safetensors"))
        found = checked(capsys, "pack", "log.safetensors", code=code)
        assert found["first_divergence"] == ("kqv_out-2" if planted else None)
        assert {row["kind"] for row in found["taps"]} == {"fingerprint"}


def test_what_is_printed(capsys: Capture) -> None:
    model = make_gguf(Path("m.gguf"), seed=3)
    ran(capsys, "golden", model, "-o", "pack", "--tokens", "1,40,50,60")
    ran(capsys, "trace", model, "--tokens", "1,40,50,60", "-o", "t.safetensors")
    out, err = ran(capsys, "golden", "check", "pack", "--trace", "t.safetensors", "--all")
    assert out.startswith("Probe text. No divergence: ")
    assert "ffn_swiglu-1" in out
    assert err == ""
    out, err = ran(capsys, "golden", "make", model, "-o", "pack", "--prompt", "abc def", "--json")
    assert json.loads(out)["filed"] == "every tap of every probe"
    assert "README.md" in err
    out, _ = ran(capsys, "golden", "--help")
    assert "golden MODEL -o DIR" in out


def test_statistics_can_fail_but_not_pass(capsys: Capture) -> None:
    ran(capsys, "golden", STORIES, "-o", "pack", "--arithmetic", "exact")
    ran(capsys, "trace", STORIES, "--tokens", IDS, "-o", "t.safetensors")
    trace = load(Path("t.safetensors"))
    full = trace.find("l_out-1", Full)
    assert full is not None
    right = full.values.double().square().mean().sqrt().item()
    for rms, code in ((right, 2), (2 * right, 1)):
        save(Trace(trace.origin, {"l_out-1": (Stats({"rms": rms}),)}), Path("s.safetensors"))
        _, err = ran(capsys, "golden", "check", "pack", "--trace", "s.safetensors", code=code)
        assert ("cannot show agreement" in " ".join(err.split())) == (code == 2)


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (("no.gguf", "-o", "pack"), "no.gguf"),
            ((STORIES,), "--out"),
            ((STORIES, "-o", "pack", "--tokens", "1,2"), "at least three"),
            ((STORIES, "-o", "pack", "--tokens", "1,2,x"), "no token id"),
            ((STORIES, "-o", "pack", "--tokens", "1,2,3", "--prompt", "x"), "Leave one out"),
            ((STORIES, "-o", "pack", "--arithmetic", "exact", "--max-bytes", "1000"), "smallest pack"),
            ((STORIES, "-o", "pack", "--max-bytes", "0"), "--max-bytes"),
            ((STORIES, "-o", STORIES), "is a file"),
            (("check", "pack"), "--trace"),
            (("check", "pack", "--trace", "t.safetensors"), "no such file"),
        ],
    )
    def test_of_making(self, capsys: Capture, tmp_path: Path, arguments: tuple[str | Path, ...], says: str) -> None:
        assert says in refused(capsys, "golden", *arguments)
        assert list(tmp_path.iterdir()) == []

    def test_of_checking(self, capsys: Capture, tmp_path: Path) -> None:
        ran(capsys, "golden", STORIES, "-o", "pack", "--arithmetic", "exact")
        ran(capsys, "trace", STORIES, "--tokens", "5,6", "-o", "other.safetensors")
        assert "feed the ids of probes.txt" in refused(capsys, "golden", "check", "pack", "--trace", "other.safetensors")
        assert "no manifest.json" in refused(capsys, "golden", "check", tmp_path, "--trace", "other.safetensors")
        assert "expected a trace" in refused(capsys, "golden", "check", "pack", "--trace", STORIES)
        other = make_gguf(Path("m.gguf"), seed=3, n_vocab=512)
        ran(capsys, "trace", other, "--tokens", IDS, "-o", "file.safetensors")
        assert "same model file" in refused(capsys, "golden", "check", "pack", "--trace", "file.safetensors")
        Path("mine").mkdir()
        Path("mine/notes.txt").write_text("x")
        assert "holds other files" in refused(capsys, "golden", STORIES, "-o", "mine")
