"""``quantscope study --engine``: other engines beside the reference, and what happens when one of them fails."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantscope import engine_effects
from quantscope.cli.main import main
from quantscope.engines import Request
from quantscope.engines.isolated import run_isolated
from quantscope.errors import EngineError
from quantscope.results import Study
from quantscope.sources.resolve import open_source
from quantscope.trace import Trace
from quantscope.weights import Weights
from tests.models import make_gguf
from tests.oracle.quantized_files import demo_file

Capture = pytest.CaptureFixture[str]
IDS = "1,620,315,261,1311,284,3965"  # "It was a dark and stormy"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def study(capsys: Capture, *arguments: str | Path, code: int = 0) -> Study:
    capsys.readouterr()
    assert main(["study", *map(str, arguments), "--out", "out", "--json"]) == code, capsys.readouterr().err
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return Study.from_json(document)


def test_the_three_way_split_of_real_files(capsys: Capture) -> None:
    """Two files in both engines: the engine's effect is what its emulated arithmetic predicts, at every layer."""
    files = [demo_file(preset) for preset in ("Q4_K_M", "Q4_0")]
    done = study(capsys, *files, "--ref", demo_file("F16"), "--engine", "llama.cpp", "--engine", "transformers", "--tokens", IDS)
    assert len(done.engines) == 6
    for run in done.engines:
        assert run.agrees, run
        assert len(run.rows) == 11
        for row in run.rows:
            if run.engine == "transformers":
                assert row.engine < 1e-11
            else:
                assert row.predicted is not None
                assert 0.4 < row.engine / row.predicted < 2.5, (run.variant, row)
        assert all((row.quantization or 0) > row.engine for row in run.rows) == (run.variant != "demo-f16"), run.variant
    finding = next(f for f in done.findings if f.id == "engines")
    assert len(finding.evidence["agree"]) == 6
    report = Path("out/report.md").read_text()
    assert "demo-Q4_0: llama.cpp within the floor, transformers within the floor" in report


def test_an_engine_that_runs_other_weights_is_found(capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted bug: the engine transposes attn_output of layer 1."""
    good = make_gguf(tmp_path / "m.gguf", seed=3)
    w = Weights(open_source(good)).get("blk.1.attn_output.weight").numpy()
    bad = make_gguf(tmp_path / "bad.gguf", seed=3, edit={"blk.1.attn_output.weight": np.ascontiguousarray(w.T)})

    def wrong(request: Request, path: Path) -> Trace:
        made = run_isolated(Request(request.engine, str(bad), request.tokens), path)
        return Trace(replace(made.origin, model_sha256=None), made.taps)

    monkeypatch.setattr(engine_effects, "run_isolated", wrong)
    done = study(capsys, good, "--engine", "llama.cpp", "--tokens", "1,40,50,60,270", code=1)
    (run,) = done.engines
    assert run.agrees is False
    assert run.answer is not None
    assert "The first tap that differs is attn_out-1" in run.answer
    assert "engines" in [f.id for f in done.findings[:2]]


def test_an_engine_that_dies_is_reported_and_the_others_go_on(capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_gguf(tmp_path / "m.gguf", seed=3)

    def dying(request: Request, path: Path) -> Trace:
        if request.engine == "llama.cpp":
            raise EngineError(f"{request.model}: the engine llama.cpp died of {signal.SIGABRT.name}.")
        return run_isolated(request, path)

    monkeypatch.setattr(engine_effects, "run_isolated", dying)
    done = study(capsys, model, "--engine", "llama.cpp", "--engine", "transformers", "--tokens", "1,40,50,60,270", code=2)
    dead, alive = done.engines
    assert dead.failure is not None
    assert "died of SIGABRT" in dead.failure
    assert (dead.agrees, dead.rows) == (None, ())
    assert alive.agrees
    assert Path("out/report.md").is_file()
    assert "llama.cpp on m failed" in next(f for f in done.findings if f.id == "engines").text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--engine", "candle"), "expected one of reference, llama.cpp, transformers"),
        (("--engine", "reference"), "every study runs the reference"),
        (("--engine", "llama.cpp", "--types", "Q4_0"), "--engine runs files"),
    ],
)
def test_bad_engines(capsys: Capture, tmp_path: Path, arguments: tuple[str, ...], expected: str) -> None:
    model = make_gguf(tmp_path / "m.gguf")
    assert main(["study", str(model), *arguments]) == 2
    assert expected in " ".join(capsys.readouterr().err.split())
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
