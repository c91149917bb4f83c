"""Diagnosis, comparison, import, weights, recipe, sensitivity and inspect in the pseudo-language: all their words are in the catalogue."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import numpy_engine
from quantscope.compare import compare
from quantscope.diagnose.convictions import replayed, sentence
from quantscope.diagnose.diagnosis import judge
from quantscope.diagnose.faults import FAULTS
from quantscope.diagnose.gather import from_trace
from quantscope.diagnose.ledger import Facts, ledger
from quantscope.diagnose.next_steps import what_to_record
from quantscope.diagnose.table_ledger import ledger_of_tables
from quantscope.diagnose.token_ids import ids_verdict
from quantscope.diagnose.token_rules import ENDS, RULES
from quantscope.engines.reference import trace as exact_trace
from quantscope.explain import MADE_BY, answer, rotation
from quantscope.findings import told
from quantscope.findings.traces import study_of
from quantscope.fingerprint import fingerprint_trace
from quantscope.importers.answers import answers
from quantscope.importers.base import read_text
from quantscope.importers.read import read
from quantscope.language import language, retold, say
from quantscope.remedy.candidates import RULE, SEARCHED
from quantscope.remedy.recipe import Found, Target
from quantscope.report import diagnosis as of_diagnosis
from quantscope.report import imported, inspect
from quantscope.report import recipe as of_recipe
from quantscope.report import sensitivity as of_sensitivity
from quantscope.report import weights as of_weights
from quantscope.report.compare import split_table, taps_table
from quantscope.report.markdown import pipe_table
from quantscope.report.table import Table
from quantscope.sources.resolve import open_source
from quantscope.sources.summary import summarize
from quantscope.three_way import three_way
from quantscope.trace import Trace
from quantscope.weight_compare import compare_weights
from quantscope.weights import Weights
from tests.e2e.test_diagnose import planted, statistics
from tests.models import STORIES, make_gguf
from tests.unit.pseudo import pseudo_language, words_outside
from tests.unit.test_recipe import candidate
from tests.unit.test_sensitivity import SAMPLE

IDS = (1, 403, 407, 261, 378, 77, 205, 13)
NAMES = {"numpy", "embd", "rms", "mean", "min", "max", "sum", "file", "ids", "weights", "taps", "replay", "tokenizer", "reference", "exact"}
NAMES |= {"kB", "MB", "RusTorch", "llama", "sha", "RoPE", "SwiGLU"}
RUSTORCH = Path(__file__).parent.parent / "data" / "rustorch"


def drawn(tables: Sequence[Table]) -> str:
    return "\n\n".join(
        part
        for t in tables
        for part in (t.caption, pipe_table(dataclasses.replace(t, rows=t.rows or (("",) * len(t.columns),))), *t.footnotes)
    )


@pytest.fixture(scope="module")
def clean() -> Trace:
    return numpy_engine.run(STORIES, IDS)


@pytest.fixture(scope="module")
def turned() -> Trace:
    return numpy_engine.run(STORIES, IDS, planted("rope-theta"))


class TestDiagnosis:
    def test_a_fault_by_replay(self, turned: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
        with pseudo_language(monkeypatch):
            text = of_diagnosis.markdown(judge(from_trace(str(STORIES), turned, "t.safetensors", str(STORIES))))
        assert words_outside(text) - NAMES == set()

    def test_statistics_and_what_to_record(self, turned: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
        with pseudo_language(monkeypatch):
            text = of_diagnosis.markdown(judge(from_trace(str(STORIES), statistics(turned), "t.safetensors", None)))
        assert words_outside(text) - NAMES == set()

    def test_other_ids(self, clean: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
        with pseudo_language(monkeypatch):
            text = of_diagnosis.markdown(judge(from_trace(str(STORIES), clean, "t.safetensors", None, prompt="Once upon")))
        assert words_outside(text) - NAMES == set()

    def test_no_ids(self, clean: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
        unknown = Trace(dataclasses.replace(clean.origin, tokens=None, model_sha256=None), clean.taps)
        with pseudo_language(monkeypatch):
            text = of_diagnosis.markdown(judge(from_trace(str(STORIES), unknown, "t.safetensors", None)))
        assert words_outside(text) - NAMES == set()

    def test_the_ledger_of_every_case(self, monkeypatch: pytest.MonkeyPatch) -> None:
        known = {"same_file": True, "same_ids": True, "same_tokenization": True}
        kl = {"kl_quantization": 0.2, "kl_expected": 0.3, "kl_engine": 4.0, "token_original": 1, "token_quantized": 2, "token_engine": 3}
        cases = [Facts(), Facts(**known), Facts(same_file=False), Facts(same_file=True, same_ids=False, first_other_id=(3, None, 7))]  # type: ignore[arg-type]
        cases.append(Facts(**known, **kl, token_expected=3, growth_original=2.0, growth_engine=3.0, other_tensors=("a.b",)))  # type: ignore[arg-type]
        with pseudo_language(monkeypatch):
            text = drawn([imported.ledger_table(ledger(f)) for f in cases])
        assert words_outside(text) - NAMES == set()

    def test_the_rows_of_the_catalogues_are_said(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pseudo_language(monkeypatch):
            text = " ".join([*(say(f.says, place="") for f in FAULTS), *(say(r.says, what="") for r in (*RULES, *ENDS.values()))])
            text += " ".join(say(words) for words, _ in MADE_BY.values())
        assert words_outside(text) == set()

    def test_ways_to_record(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pseudo_language(monkeypatch):
            ways = [what_to_record(e, (), (), layer) for e in ("llama.cpp", "transformers", "rustorch", "mine") for layer in (None, 2)]
        code = {"eprintln", "qsfp", "format", "layer", "hidden"}  # a line of Rust
        assert words_outside("\n".join(s for way in ways for s in way)) - NAMES - code == set()

    def test_token_ids(self, monkeypatch: pytest.MonkeyPatch) -> None:
        source = open_source(str(STORIES))
        right = [1, 403, 407]
        with pseudo_language(monkeypatch):
            said = [
                ids_verdict(source, "Once upon", None, ids).sentence for ids in (right, right[1:], [1, 9, 9, 9], right[:2], [*right, 4, 5])
            ]
            said += [ids_verdict(source, None, right, [9999]).sentence, ids_verdict(source, None, None, right).sentence]
        assert words_outside(" ".join(said)) == set()


class TestOthers:
    def test_comparison(self, turned: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
        ref = exact_trace(str(STORIES), IDS)
        with pseudo_language(monkeypatch):
            c = compare(ref, turned)
            weak = compare(ref, statistics(turned))
            said = [answer(c), answer(weak), rotation(ref, turned, c) or "", c.floor_source, *c.notes, *weak.notes]
            said.append(sentence(replayed(turned, str(STORIES))))
            tables = [taps_table(c), taps_table(weak, every=True), split_table(three_way(ref, turned))]
            text = "\n".join(said) + drawn(tables)
        assert words_outside(text) - NAMES == set()

    def test_what_an_engine_showed_is_told_again_as_it_would_be_said(self, clean: Trace, turned: Trace) -> None:
        """study.json keeps these sentences in English."""
        ref = exact_trace(str(STORIES), IDS)

        def sentences() -> list[str]:
            out = []
            for test in (clean, turned, fingerprint_trace(turned), statistics(clean), statistics(turned)):
                c = compare(ref, test)
                out += [answer(c), *c.notes, *([r] if (r := rotation(ref, test, c)) else [])]
            return out

        kept = sentences()
        with language("ja"):
            assert [retold(sentence) for sentence in kept] == sentences()

    def test_import(self, monkeypatch: pytest.MonkeyPatch) -> None:
        path = RUSTORCH / "seed-tables.md"
        found = read(path)
        traces = [(r.name, r.trace) for r in found.runs]
        study = study_of(traces)
        assert study is not None
        with pseudo_language(monkeypatch):
            lines = [line for name, trace in traces for line in imported.summary(name, trace)]
            tables = [*imported.layer_tables(told(study)), imported.ledger_table(ledger_of_tables(study, answers(read_text(path))))]
            text = "\n".join([*lines, *(f.text for f in told(study).findings)]) + drawn(tables)
        assert words_outside(text) - NAMES - {"too", "coarse", "drift"} == set()

    def test_weights(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        one, two = (Weights(open_source(str(make_gguf(tmp_path / f"{seed}.gguf", seed=seed)))) for seed in (1, 2))
        with pseudo_language(monkeypatch):
            text = ""
            for c in (compare_weights(one, one), compare_weights(one, two)):
                text += of_weights.answer(c) + drawn([of_weights.weights_table(c, every=True)]) + "\n".join(of_weights.notes(c))
        assert words_outside(text) - NAMES == set()

    def test_recipe(self, monkeypatch: pytest.MonkeyPatch) -> None:
        mix, best = candidate("lowest predicted KL", SEARCHED, 900_000, 0.01, 0.011), candidate("Q4_K_M", "preset", 950_000, 0.02, 0.021)
        rule = candidate("first and last layers high (Q4_K, Q6_K)", RULE, 900_000, 0.03, 0.031)
        found = Found(Target(n_bytes=10**6), mix, (mix, best, rule), (), n_chunks=(4, 2), n_ctx=64, barred=("Q4_0",), absent=("IQ1_S",))
        with pseudo_language(monkeypatch):
            said = [of_recipe.answer(dataclasses.replace(found, target=t)) for t in (found.target, Target(bpw=4.5), Target(kl=0.01))]
            text = "\n".join([*said, *of_recipe.notes(found)]) + drawn(of_recipe.tables(found))
        assert words_outside(text) - NAMES == set()

    def test_sensitivity(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pseudo_language(monkeypatch):
            text = of_sensitivity.markdown(SAMPLE, "m.gguf")
        assert words_outside(text) - NAMES - {"output"} == set()

    def test_inspect(self, monkeypatch: pytest.MonkeyPatch) -> None:
        out = io.StringIO()
        with pseudo_language(monkeypatch):
            Console(file=out, width=400, highlight=False).print(inspect.render(summarize(open_source(str(STORIES)))))
        assert (
            words_outside(out.getvalue().partition("⟦Metadata⟧")[0]) - NAMES - {"GGUF", "version", "alignment", "data", "offset"} == set()
        )

    def test_japanese_error_messages_stay_english(self, clean: Trace) -> None:
        from quantscope.errors import TraceMismatchError

        other = Trace(dataclasses.replace(clean.origin, tokens=(1, 2, 3)), clean.taps)
        with language("ja"), pytest.raises(TraceMismatchError) as error:
            compare(exact_trace(str(STORIES), IDS), other)
        assert str(error.value).isascii()
