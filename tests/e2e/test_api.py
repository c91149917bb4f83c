"""``import quantscope`` on the bundled model: the same results as the commands, as objects, frames and HTML."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import pytest
import torch
from jsonschema import Draft202012Validator

import quantscope
from quantscope.api.results import Face
from quantscope.cli.demo import MODEL, TEXT, bundled
from quantscope.cli.main import main
from quantscope.results import Study as StudyData
from quantscope.trace import Full, Trace

DEMO = str(bundled(MODEL))
IDS = (1, 620, 315, 261)
VOID = {"br"}


class Tags(HTMLParser):
    """The tags that are open, and the text: raises where one closes another."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.names: set[str] = set()
        self.text = ""
        self.feed(html)
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def trace() -> Trace:
    return quantscope.trace(DEMO, tokens=IDS)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> quantscope.Study:
    text = tmp_path_factory.mktemp("text") / "short.txt"
    text.write_text(bundled(TEXT).read_text("utf-8")[:1200], "utf-8")
    return quantscope.study(DEMO, types=["Q4_0", "Q8_0"], tokens=IDS, text=text, ctx=32, chunks=3)


def rowwise_double(trace: Trace, tap: str) -> Trace:
    """The trace with one tap twice as large."""
    own = trace.find(tap, Full)
    assert own is not None
    return dataclasses.replace(trace, taps={**trace.taps, tap: (dataclasses.replace(own, values=own.values * 2),)})


class TestOpen:
    def test_header_tensors_config_tokenizer(self) -> None:
        with quantscope.open(DEMO) as model:
            assert (model.config.n_layer, model.config.n_embd) == (10, 256)
            assert model.tokenizer.decode(model.tokenizer.encode("It was a dark")[1:]) == "It was a dark"
            assert model.tensor("output_norm.weight").shape == (256,)
            assert {t.name for t in model.tensors} >= {"token_embd.weight", "blk.9.ffn_down.weight"}
            assert model.frames()["tensors"].column("shape")[0] == "4096×256"
            assert re.search(r"^<Model .*demo-f16\.gguf: GGUF \(.*\), 15\.5 MB, 93 tensors, .* 16\.01 bits per weight>$", repr(model))
            assert "blk.9.ffn_down.weight" in Tags(model._repr_html_()).text

    def test_what_is_no_model(self, tmp_path: Path) -> None:
        (tmp_path / "x.gguf").write_bytes(b"hello, this is no GGUF file at all")
        with pytest.raises(quantscope.QuantscopeError, match=r"x\.gguf"):
            quantscope.open(tmp_path / "x.gguf")


class TestStudy:
    def test_the_command_finds_the_same(self, study: quantscope.Study, tmp_path: Path) -> None:
        assert study.text is not None
        command = f"study {DEMO} --types Q4_0,Q8_0 --tokens {','.join(map(str, IDS))} --text {study.text.path} --ctx 32 --chunks 3"
        assert main([*command.split(), "--out", str(tmp_path / "out")]) == 0
        again = quantscope.load_study(tmp_path / "out")
        assert [v.name for v in again.variants] == ["demo-f16", "Q4_0", "Q8_0"]
        assert again.variants == study.variants
        assert again.answer == study.answer

    def test_a_real_study_fits_the_published_schema(self, study: quantscope.Study) -> None:
        schema = json.loads((resources.files("quantscope") / "data" / "study.schema.json").read_text("utf-8"))
        document = json.loads(json.dumps(study.to_json()))
        Draft202012Validator(schema).validate(document)
        assert len(document["variants"][1]["ops"]) > 100
        assert document["paired"]

    def test_a_quantized_cache(self) -> None:
        found = quantscope.study(DEMO, kv=["q8_0", "q4_0"], tokens=IDS)
        assert [(v.name, v.kv) for v in found.variants] == [("demo-f16", None), ("demo-f16 kv=q8_0", "q8_0"), ("demo-f16 kv=q4_0", "q4_0")]
        kl = [v.logits.kl_nats for v in found.quantized if v.logits]
        assert 0 < kl[0] < kl[1]  # type: ignore[operator]

    def test_save_and_load(self, study: quantscope.Study, tmp_path: Path) -> None:
        assert study.save(tmp_path) == tmp_path / "study.json"
        again = quantscope.load_study(tmp_path)
        assert again.to_json() == json.loads(json.dumps(study.to_json()))
        with pytest.raises(quantscope.QuantscopeError, match="could not be written"):
            study.save(tmp_path / "no" / "folder.json")

    def test_frames(self, study: quantscope.Study) -> None:
        pytest.importorskip("pandas")
        kl = study.to_pandas()["logits"].set_index("variant")["kl_nats"]
        assert kl["Q4_0"] > 10 * kl["Q8_0"] > 0

    def test_names_and_tokens_are_escaped(self, study: quantscope.Study) -> None:
        evil = "<script>alert(1)</script>"
        worse = dataclasses.replace(
            study,
            original=None,
            variants=tuple(dataclasses.replace(v, name=f"{evil}{i}\x1b[31m") for i, v in enumerate(study.variants)),
            findings=(dataclasses.replace(study.findings[0], text=evil), *study.findings[1:]),
        )
        shown = Tags(worse._repr_html_())
        assert "script" not in shown.names
        assert evil in shown.text
        assert "\x1b" not in shown.text

    def test_contradicting_options(self) -> None:
        with pytest.raises(quantscope.QuantscopeError, match="--types"):
            quantscope.study(DEMO, DEMO, types=["Q4_0"])
        with pytest.raises(quantscope.QuantscopeError, match="no model"):
            quantscope.study()


class TestCompareAndDiagnose:
    def test_a_fault_is_named(self, trace: Trace) -> None:
        broken = rowwise_double(trace, "ffn_up-3")
        c = quantscope.compare(trace, broken, model=DEMO, original=trace)
        assert c.first_divergence is not None
        assert c.first_divergence.tap == "ffn_up-3"
        assert c.replay is not None
        assert [row.tap for row in c.replay.those("convicted")] == ["ffn_up-3", "ffn_swiglu-3"]
        assert c.frames()["taps"].column("verdict").count("differs") == 1
        d = quantscope.diagnose(DEMO, broken)
        assert d.verdict == "engine"
        assert "ffn_up-3" in d.answer
        for face in (c, d):
            assert face.answer.split("\n")[0].split(" ")[0] in Tags(face._repr_html_()).text

    def test_trace_files(self, trace: Trace, tmp_path: Path) -> None:
        quantscope.trace(DEMO, tokens=IDS, taps="l_out", out=tmp_path / "t.safetensors")
        c = quantscope.compare(trace, tmp_path / "t.safetensors")
        assert c.first_divergence is None
        assert len(c.rows) == 10
        assert torch.equal(trace.find("l_out-0", Full).values, quantscope.trace(DEMO, tokens=IDS).find("l_out-0", Full).values)  # type: ignore[union-attr]

    def test_contradicting_options(self, trace: Trace) -> None:
        with pytest.raises(quantscope.QuantscopeError, match="floor and predicted"):
            quantscope.compare(trace, trace, floor=1e-3, predicted=trace)
        with pytest.raises(quantscope.QuantscopeError, match="prompt and tokens"):
            quantscope.trace(DEMO, prompt="x", tokens=[1])


def test_weights() -> None:
    w = quantscope.weights(DEMO, DEMO)
    assert w.answer.startswith("All 93 tensors agree")
    assert len(w.frames()["tensors"].rows) == 93
    assert Tags(w._repr_html_()).text.startswith(w.answer)


def test_results_are_the_data_with_a_face(study: quantscope.Study) -> None:
    assert isinstance(study, StudyData)
    assert isinstance(study, Face)
