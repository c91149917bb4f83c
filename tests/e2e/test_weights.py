"""``quantscope weights`` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from quantscope.cli.main import main
from quantscope.sources.resolve import open_source
from quantscope.weights import Weights
from tests.models import make_gguf
from tests.oracle.quantized_files import demo_file

Capture = pytest.CaptureFixture[str]


def test_a_quantized_file_is_explained_by_its_types(capsys: Capture) -> None:
    assert main(["weights", str(demo_file("F16")), str(demo_file("Q4_0"))]) == 0, capsys.readouterr().err
    assert capsys.readouterr().err == ""


def test_a_transposed_matrix_is_named(capsys: Capture, tmp_path: Path) -> None:
    good = make_gguf(tmp_path / "good.gguf", seed=3)
    w = Weights(open_source(good)).get("blk.1.attn_output.weight").numpy()
    bad = make_gguf(tmp_path / "bad.gguf", seed=3, edit={"blk.1.attn_output.weight": np.ascontiguousarray(w.T)})
    assert main(["weights", str(good), str(bad)]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "blk.1.attn_output.weight" in out
    assert "transposed" in out
    assert main(["weights", str(good), str(bad), "--json"]) == 1
    assert "blk.1.attn_output.weight" in json.dumps(json.loads(capsys.readouterr().out))


def test_bad_input(capsys: Capture, tmp_path: Path) -> None:
    good = make_gguf(tmp_path / "good.gguf")
    lacking = make_gguf(tmp_path / "lacking.gguf", edit={"blk.1.ffn_down.weight": None})
    for other, words in ((tmp_path / "no.gguf", "no such file"), (lacking, "blk.1.ffn_down.weight")):
        assert main(["weights", str(good), str(other)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert words in " ".join(err.split())
        assert "Traceback" not in err
