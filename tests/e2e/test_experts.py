"""A study of a mixture of experts: where the tokens go, and experts that none of them reaches."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from quantscope.cli.main import main
from quantscope.images import Images, Requantized
from quantscope.inputs import read_inputs
from quantscope.model.forward import forward
from quantscope.model.taps import Recorder
from quantscope.qtypes import QTYPES
from quantscope.results import Study, StudyOptions
from quantscope.sources.resolve import open_source
from quantscope.weights import Weights
from tests.arch_models import make_arch

TYPES = ("Q8_0", "Q4_0")
TEXT = "a quick brown fox jumps over the lazy dog and runs away. " * 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_arch(tmp_path_factory.mktemp("experts") / "m.gguf", "qwen2moe")


def study(model: Path, out: Path, *arguments: str) -> Study:
    assert main(["study", str(model), "--types", ",".join(TYPES), "--out", str(out), *arguments]) == 0
    return Study.from_json(json.loads((out / "study.json").read_text("utf-8")))


def test_experts_that_no_token_reaches_are_reported(model: Path, tmp_path: Path) -> None:
    """Two tokens reach at most four of six experts; nothing in tables and page is NaN."""
    done = study(model, tmp_path / "out", "--tokens", "1,70")
    routing = done.variants[0].routing
    assert [(r.layer, r.n_expert) for r in routing] == [(0, 6), (1, 6), (2, 6)]
    assert all(2 <= r.n_idle <= 4 and r.rerouted is None for r in routing)
    some = ", ".join(f"ffn_moe_topk-{r.layer}: {r.n_idle}/6" for r in routing)
    note = f"No token reaches some of the experts ({some}): nothing is known of what quantization does to them. Study a longer text."
    assert note in done.notes
    assert json.loads((tmp_path / "out" / "study.json").read_text("utf-8"))["non_finite"] == {}
    report = (tmp_path / "out" / "report.md").read_text("utf-8")
    assert note in " ".join(report.split())
    assert "## Routing" in report
    assert not re.search(r"\b(nan|inf)\b|∞", report, re.IGNORECASE)


def test_tokens_that_go_elsewhere_are_counted(model: Path, tmp_path: Path) -> None:
    """Against the choices of two forwards, chunk by chunk."""
    text = tmp_path / "t.txt"
    text.write_text(TEXT, "utf-8")
    done = study(model, tmp_path / "out", "--text", str(text), "--ctx", "32", "--memory", "1GB")
    assert done.text is not None
    weights = Weights(open_source(model))
    given = read_inputs(StudyOptions((str(model),), text=text, n_ctx=32), weights.source, weights.config).text
    assert given is not None
    chosen = {}
    for variant in done.variants:
        types = {name: QTYPES[t] for name, t in variant.types.items() if t != "F32"}
        seen = Recorder()
        forward(given.ids, Requantized(Images(weights), types) if types else weights, seen)
        chosen[variant.name] = {name: x for name, x in seen.taps.items() if name.startswith("ffn_moe_topk")}
    original = chosen.pop(done.original or "")
    for name, others in chosen.items():
        for row in done.variant(name).routing:
            a, b = (x[f"ffn_moe_topk-{row.layer}"].flatten(0, 1).tolist() for x in (original, others))
            assert row.rerouted == sum(set(p) != set(q) for p, q in zip(a, b, strict=True)) / len(a)
            assert row.n_idle == 6 - len({e for experts in b for e in experts})
    assert max(row.rerouted or 0 for row in done.variant("Q4_0").routing) > 0
    assert "through other experts than in the original" in (tmp_path / "out" / "report.html").read_text("utf-8")


def test_a_dense_model_has_no_routing(tmp_path: Path) -> None:
    done = study(make_arch(tmp_path / "m.gguf", "qwen2"), tmp_path / "out", "--tokens", "1,70")
    assert all(v.routing == () for v in done.variants)
    assert "## Routing" not in (tmp_path / "out" / "report.md").read_text("utf-8")
