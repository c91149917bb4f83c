"""Two languages from one catalogue: complete, without leftovers, and nothing in a report that never went through it."""

from __future__ import annotations

import dataclasses
import re

import pytest

from quantscope import language as language_module
from quantscope import phrases
from quantscope.cli.lang import Lang
from quantscope.errors import UsageError
from quantscope.findings import complete, told
from quantscope.language import LANGUAGES, current, language, mark, retold, say
from quantscope.report.markdown import markdown, pipe_table
from quantscope.report.prose import breaks, pieces
from quantscope.report.table import Table
from quantscope.report.text import render
from quantscope.results import EngineRow, EngineRun, Study
from quantscope.strings import parts
from tests.unit import studies, test_seed_tables
from tests.unit.pseudo import pseudo_language, words_outside
from tests.unit.test_report import shown
from tools.check_catalogue import fields, problems, said, said_in

NAMES = {
    "SHA",
    "demo",
    "llama",
    "cpp",
    "transformers",
    "RusTorch",
    "kB",
    "MB",
    "GB",
    "SwiGLU",
    "silu",
    "gate",
    "up",
}  # models, engines, units, functions
J = r"[぀-ヿ一-鿿]"
JAPANESE = re.compile(J)


OTHERWISE = (  # as study.json keeps it
    "The first tap that differs is Qcur-0 (NMSE 9.29e−3, floor 1.00e−9). Its input Qcur_pre-0 agrees, so the fault is in what makes it: "
    "RoPE. 3 taps of 9 differ in all. RoPE: The engine rotated with theta 500,000 instead of 10,000: NMSE 1.0e−15 with it, 0.0093 with the "
    "expected setting."
)


def full_study() -> Study:
    """With everything that a report can have."""
    base = studies.long_study()
    rows = tuple(EngineRow(tap, 0.01, 1e-4, 1e-4) for tap in ("embd", "l_out-0", "result_output"))
    runs = (
        EngineRun("Q4_0", "llama.cpp", "b1", True, "", None, rows),
        EngineRun("Q5_K_M", "llama.cpp", "b1", False, OTHERWISE, None, rows),
        EngineRun("Q6_K", "transformers", failure="1.2.3"),
    )
    notes = ("No original: no file is the only unquantized one, so errors and KL divergence are missing. Name it with `--ref`.",)
    return complete(dataclasses.replace(base, engines=runs, notes=notes))


class TestCatalogue:
    def test_is_complete_and_has_nothing_else(self) -> None:
        keys = said()
        assert len(keys) > 200
        for name in LANGUAGES[1:]:
            assert not list(problems(keys, parts(name)))

    def test_finds_what_is_wrong(self) -> None:
        keys = {"{n} layers": "a.py:1", "yes": "a.py:2", "no": "a.py:3"}
        found = list(problems(keys, {"ja_a": {"{n} layers": "{m}層", "yes": "はい", "old": "x"}, "ja_b": {"yes": "うん"}}))
        assert [line.split(":")[0] for line in found] == ["ja_a", "ja_a", "ja_b", "a.py"]
        assert [word in line for word, line in zip(["fields", "nothing says", "another translation", "not in"], found, strict=True)] == [
            True
        ] * 4

    def test_reads_templates_from_the_code(self) -> None:
        code = 'from quantscope.phrases import count\nsay("a" "b")\nmark("c")\ncount(2, "batch", "batches")\ncount(1, "layer")\nsay(x)\n'
        assert list(said_in(code)[0]) == ["ab", "c", "{n} batches", "{n} layers"]
        assert said_in('say(f"{x}")\nmark(x)\n')[1] == [1, 2]
        assert said_in('from quantscope.wording import count\ncount(2, "file")')[0] == {}

    def test_grammar_fields_may_be_left_out(self) -> None:
        assert fields("{names} {_are} few") == {"names"}

    def test_japanese_is_written_in_one_style(self) -> None:
        """Full stops where English has them, full-width punctuation, the plain form throughout."""
        half_width = re.compile(rf"{J}[,;:.!?](?!\w)|{J} {J}|{J}\(|（[^（）]*\)|\([^()]*）")
        for strings in parts("ja").values():
            for key, text in strings.items():
                assert key.endswith(".") == text.endswith("。"), key
                assert not re.search(r"です|ます", text), text
                assert not half_width.search(text), text

    def test_every_language_can_be_asked_for(self) -> None:
        assert tuple(x.value for x in Lang) == LANGUAGES


class TestSaying:
    def test_in_both_languages(self) -> None:
        assert say("{n} of it", n=3) == "3 of it"
        with language("ja"):
            assert current() == "ja"
            assert phrases.count(22, "layer") == "22層"
            assert say(mark("Findings")) == "重要な発見"
        assert current() == "en"

    def test_lists_and_numbers(self) -> None:
        assert [phrases.listed("abc"[:n]) for n in range(4)] == ["", "a", "a and b", "a, b and c"]
        assert phrases.some("abcd", 2) == "a, b and 2 more"
        with language("ja"):
            assert phrases.listed("abc") == "a、b、c"
            assert phrases.some("abcd", 2) == "a、b、ほか2件"
            assert phrases.span([1.0, 1.5]) == "1.0倍〜1.5倍"
            assert phrases.times(float("nan")) == "NaN"
            assert phrases.size(12) == "12バイト"
            assert phrases.quantity(8_030_000) == "8.03M"

    def test_a_language_without_a_catalogue(self) -> None:
        with pytest.raises(UsageError, match=r"--lang fr: expected one of en, ja\."), language("fr"):
            pass

    def test_a_sentence_that_was_kept_is_told_again(self) -> None:
        kept = "Of 3 variants, Q8_0 is closest to F16 (KL divergence 0.1 nats) and Q4_0 farthest (0.2 nats)."
        assert retold(kept) == kept
        with language("ja"):
            assert (
                retold(kept)
                == "3個のバリアントのうち、F16に最も近いのはQ8_0（KLダイバージェンス0.1 nats）、最も遠いのはQ4_0（0.2 nats）である。"
            )
            assert retold(f"{kept} All end on the original's side of zero.").endswith("最後の層での符号はすべて元モデルと同じである。")
            assert retold("Written by hand. Twice.") == "Written by hand. Twice."


class TestStudy:
    def test_no_word_was_left_out_of_the_catalogue(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for make in (full_study, test_seed_tables.seed_study):
            with pseudo_language(monkeypatch):
                study = told(make())
                text = markdown(dataclasses.replace(study, provenance={"engine": "RusTorch"}))
                render(study)
            ids = set(re.findall(r"[^\W_]+", " ".join(f.id for f in study.findings)))
            assert words_outside(text) - ids - NAMES == {"engine"}, make

    def test_pseudo_language_finds_a_word(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pseudo_language(monkeypatch):
            assert words_outside(f"{say('Findings')} in {phrases.count(2, 'layer')}") == {"in"}
            with pytest.raises(AssertionError, match="no literal"):
                say("never written anywhere")

    def test_japanese_has_the_same_tables_in_the_same_order(self) -> None:
        study = full_study()
        english = markdown(study)
        with language("ja"):
            japanese = markdown(told(study))
        for pattern in (r"^\|", r"^#+ ", r"^- "):
            assert len(re.findall(pattern, english, re.M)) == len(re.findall(pattern, japanese, re.M))
        headings = [line for line in japanese.splitlines() if line.startswith("#")]
        assert all(JAPANESE.search(h) or re.search("SwiGLU RMS|NMSE", h) for h in headings)
        prose = [line for line in japanese.split(f"## {_in_japanese('Provenance')}")[0].splitlines() if line and line[0] not in "#|"]
        assert all(JAPANESE.search(line) for line in prose)
        order = [
            _in_japanese(t).format(activation="SwiGLU")
            for t in ("Generated token", "Layer by layer", "Input RMS", "{activation}", "Error against the original", "Logits")
        ]
        assert [headings.index(next(h for h in headings if h.endswith(f" {title}"))) for title in order] == [1, 2, 3, 6, 9, 12]

    def test_english_is_as_it_was(self) -> None:
        study = full_study()
        assert told(study) is study

    def test_japanese_fits_the_terminal(self) -> None:
        study = full_study()
        with language("ja"):
            text = shown(told(study))
        lines = [line.rstrip() for line in text.splitlines()]
        assert max(len(line) + len(re.findall(r"[　-ヿ一-鿿！-｠]", line)) for line in lines) <= 100
        assert not any(line.startswith(("。", "、", "）")) for line in lines)

    def test_only_findings_that_were_there_are_told(self) -> None:
        study = dataclasses.replace(full_study(), findings=full_study().findings[:2])
        with language("ja"):
            assert [f.id for f in told(study).findings] == [f.id for f in study.findings]


def _in_japanese(template: str) -> str:
    return language_module.catalogue("ja")[template]


class TestProse:
    def test_breaks_between_characters_but_not_before_punctuation(self) -> None:
        assert pieces("層は3層、Q4_K_Mの（例）。") == ["層", "は", "3", "層、", "Q4_K_M", "の", "（例）。"]
        assert breaks("あいうえお", 4) == [2, 4]
        assert breaks("あい、う", 6) == [3]
        assert breaks("あい、う", 5) == [1, 3]
        assert breaks("a bc def", 4) == [5]
        assert breaks("abcdefgh あ", 3) == [3, 6, 9]

    def test_pipe_tables_line_up_in_columns(self) -> None:
        lines = pipe_table(Table(("層", "値"), (("10", "平均"), ("2", "x")))).splitlines()
        assert lines == ["| 層  | 値   |".replace("値  ", "  値"), "| --- | ---: |", "| 10  | 平均 |", "| 2   |    x |"]
