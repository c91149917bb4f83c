"""Reports: readable at 100 columns, complete, in the seed's order, and safe to print whatever a model's tokens contain."""

from __future__ import annotations

import dataclasses
import io
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from quantscope import phrases, wording
from quantscope.report.markdown import escaped, markdown
from quantscope.report.table import FLAG
from quantscope.report.tables import sections
from quantscope.report.text import folded, render
from quantscope.results import Generated, Study
from tests.unit import studies, test_seed_tables

ORDER = ("Generated token", "Layer by layer", "SwiGLU", "Error against the original", "Logits", "Size", "Findings")
NASTY = 'a|b`c\n\x1b[31m*_x_*<b>[red]\\"\u202e\udc80'


def shown(study: Study, width: int = 100, color: bool = False) -> str:
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=color, no_color=not color, highlight=False).print(render(study, width))
    return out.getvalue()


def nasty_study() -> Study:
    """Names, tokens and texts that try to leave their cell."""
    base = studies.study()
    assert base.prompt is not None
    assert base.model is not None
    variants = [dataclasses.replace(v, generated=(Generated(NASTY, 7, 1.0, 1, 1, 0.5),)) for v in base.variants]
    variants[-1] = dataclasses.replace(variants[-1], name=NASTY)
    prompt = dataclasses.replace(base.prompt, text=NASTY)
    model = dataclasses.replace(base.model, name=NASTY)
    return studies.study(variants=tuple(variants), prompt=prompt, model=model, notes=(NASTY,), provenance={"file": NASTY})


def many_variants() -> Study:
    base = studies.study(40)
    more = tuple(dataclasses.replace(v, name=f"tinyllama-1.1b-chat-v1.0.{v.name}-imatrix{i}") for i in range(3) for v in base.quantized)
    return studies.study(40, variants=(base.variants[0], *more))


class TestText:
    def test_sections_in_the_seeds_order(self) -> None:
        lines = shown(studies.study()).splitlines()
        assert [line for line in lines if line in ORDER] == list(ORDER)

    def test_the_answer_is_on_top(self) -> None:
        study = studies.study()
        assert " ".join(shown(study).split()).startswith(study.findings[0].text[:90])

    @pytest.mark.parametrize("width", [80, 100, 120])
    @pytest.mark.parametrize("make", [studies.study, studies.long_study, nasty_study, many_variants, test_seed_tables.seed_study])
    def test_no_line_is_wider_than_the_terminal(self, make: type[Study], width: int) -> None:
        assert max(cell_len(line.rstrip()) for line in shown(make(), width).splitlines()) <= width

    @pytest.mark.parametrize("make", [studies.study, studies.long_study, many_variants])
    def test_no_cell_is_cut_at_100_columns(self, make: type[Study]) -> None:
        assert "…" not in shown(make()).replace(" …)", "")

    def test_all_layers_up_to_12(self) -> None:
        text = shown(studies.study(12))
        assert "layers shown" not in text
        assert re.findall(r"^ +(\d+) ", text.split("Mean of the output")[1].split("SwiGLU")[0], re.M) == [str(i) for i in range(12)]

    def test_a_sample_of_more_layers_with_first_last_and_flagged(self) -> None:
        base = studies.study(40)
        rows = list(base.variants[-1].layers)
        assert rows[37].swiglu_mean is not None
        rows[37] = dataclasses.replace(rows[37], swiglu_mean=rows[37].swiglu_mean * 9)
        study = studies.study(40, variants=(*base.variants[:-1], dataclasses.replace(base.variants[-1], layers=tuple(rows))))
        part = shown(study).split("SwiGLU mean\n")[1].split("Error against")[0]
        numbers = [int(n) for n in re.findall(r"^ +(\d+)  +\S", part, re.M)]
        assert {0, 37, 39} <= set(numbers)
        assert len(numbers) == 13
        assert "13 of 40 layers shown; all of them are in report.md" in part
        assert f"{FLAG} Q4_0, layer 37: |mean|/RMS is 0.0720, 9.0× the median 0.00800 of 5 other variants" in part

    def test_nothing_in_a_token_reaches_the_terminal_raw(self) -> None:
        text = shown(nasty_study())
        assert not set(text) & {"\x1b", "\u202e", "\udc80"}
        assert "[red]" in text
        assert '"a|b`c\\n\\x1b[31m*_x_*<b>[red]\\\\\\"\\u202e\\udc80"' in text

    def test_colour_is_only_decoration(self) -> None:
        plain, coloured = shown(studies.study()), shown(studies.study(), color=True)
        assert "\x1b[" in coloured
        assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain

    def test_missing_numbers_are_no_errors(self) -> None:
        bare = tuple(
            dataclasses.replace(v, generated=(), logits=None, layers=(), file_bytes=None, bpw=None) for v in studies.study().variants
        )
        study = studies.study(variants=bare, model=None, prompt=None, text=None)
        assert [s.title for s in sections(study)] == ["Size"]  # the types are known
        assert "Findings" in shown(study) or len(study.findings) == 1

    def test_broken_numbers_are_shown_as_such(self) -> None:
        base = studies.study()
        rows = tuple(dataclasses.replace(r, output_rms=math.nan, sqnr_db=-math.inf, nmse=math.inf) for r in base.variants[1].layers)
        text = shown(studies.study(variants=(base.variants[0], dataclasses.replace(base.variants[1], layers=rows), *base.variants[2:])))
        assert "NaN" in text
        assert "−∞" in text

    def test_a_text_adds_its_sections(self) -> None:
        text = shown(studies.long_study())
        titles = [line for line in text.splitlines() if line in (*ORDER, "Which is better", "Operation by operation", "Outliers")]
        assert titles == [*ORDER[:5], "Which is better", "Operation by operation", "Outliers", *ORDER[5:]]
        flat = " ".join(text.split())
        assert (
            "5 chunks of 512 (of 20: stopped early, every mean KL being known well enough), 1,275 positions scored: the second half" in flat
        )
        assert "Plan: 2 batches of 3 chunks of 512 tokens, 2 chunks at a time through a layer" in flat
        assert "Numerical floor: float32 rounding alone makes a KL divergence of 3.0e−13 nats on average" in flat
        assert re.search(r"Q8_0 +Q6_K +0\.00140 +0\.001\d+ to 0\.001\d+ +yes", text)
        assert re.search(r"ffn_out +43\.0 @ 1 ", text)
        assert re.search(rf"^ +2 +7\.000 +0, 17 +2\.0% +{FLAG} 5 +1\.500 ± 0\.030", text, re.M)

    def test_seed(self) -> None:
        text = shown(test_seed_tables.seed_study())
        for growth in ("10.3×", "21.2×", "33.1×", "74.9×", "10.0×", "19.9×", "32.4×", "72.1×", "211×", "262×"):
            assert growth in text
        assert f"{FLAG} 0.0154" in text

    def test_long_names_are_folded(self) -> None:
        assert folded("tinyllama-1.1b-chat-v1.0.Q4_K_M", 16) == "tinyllama-1.1b-\nchat-v1.0.Q4_K_M"
        assert folded("Q4_K_M", 16) == "Q4_K_M"
        assert folded("F16 (original)", 16) == "F16 (original)"
        assert folded("x" * 30, 16) == "x" * 30


class TestMarkdown:
    @pytest.mark.parametrize("make", [studies.study, studies.long_study, nasty_study, many_variants, test_seed_tables.seed_study])
    def test_every_table_is_a_rectangle(self, make: type[Study]) -> None:
        blocks = [b.splitlines() for b in markdown(make()).split("\n\n") if b.startswith("|")]
        assert blocks
        for rows in blocks:
            cells = [len(re.split(r"(?<!\\)(?:\\\\)*\|", row)) for row in rows]
            assert len(set(cells)) == 1, rows[0]
            assert re.fullmatch(r"\|( -+:? \|)+", rows[1])

    def test_has_every_layer(self) -> None:
        text = markdown(studies.study(40))
        assert len(re.findall(r"^\| +39 \|", text, re.M)) == 7
        assert "layers shown" not in text

    def test_begins_with_title_and_answer(self) -> None:
        study = studies.study()
        title, answer = markdown(study).split("\n\n")[:2]
        assert title == "# quantscope study of demo"
        assert answer.startswith("**Q8_0, Q6_K, Q5_K_M and Q4_K_M keep")

    def test_no_control_characters(self) -> None:
        assert not {c for c in markdown(nasty_study()) if not c.isprintable() and c != "\n"}

    def test_provenance_is_listed(self) -> None:
        text = markdown(studies.study(provenance={"files": {"a.gguf": "ab12"}, "torch": "2"}))
        assert "- files.a.gguf: ab12" in text

    @given(st.text())
    def test_escaped_stays_on_one_line_and_can_be_undone(self, text: str) -> None:
        out = escaped(text)
        assert len(out.splitlines()) <= 1
        assert re.sub(r"\\([\\`*{}\[\]<>#|~&$_])", r"\1", out) == wording.printable(text)

    def test_names_of_types_stay_readable(self) -> None:
        assert escaped("Q4_K_M") == "Q4_K_M"
        assert escaped("_x_ <b> a|b") == r"\_x\_ \<b\> a\|b"


class TestWording:
    @pytest.mark.parametrize(
        ("x", "text"),
        [(10.327, "10.3×"), (211.4, "211×"), (99.94, "99.9×"), (99.96, "100×"), (1, "1.0×"), (-0.5, "−0.5×"), (12345.6, "12,346×"),
         (math.nan, "NaN×"), (math.inf, "∞×"), (None, "–×")],
    )  # fmt: skip
    def test_times(self, x: float | None, text: str) -> None:
        assert wording.times(x) == text.replace("NaN×", "NaN").replace("∞×", "∞").replace("–×", "–")

    @pytest.mark.parametrize(
        ("x", "text"),
        [(0.0123456, "0.0123"), (-0.000174, "−0.000174"), (0.0999999, "0.100"), (1.23e-7, "1.23e−7"), (1234567, "1.23e6"), (0.0, "0"),
         (-0.0, "0"), (12.345, "12.3"),
         (123456, "123,456"), (0.000123, "0.000123"), (0.00009996, "0.000100"), (8.42e-6, "8.42e−6"), (-math.inf, "−∞"), (None, "–")],
    )  # fmt: skip
    def test_sig(self, x: float | None, text: str) -> None:
        assert wording.sig(x) == text

    def test_mean_and_quantity(self) -> None:
        assert [wording.mean(x) for x in (-0.000018, 0.0154, 1e-7)] == ["−0.0000180", "0.0154", "1.00e−7"]
        assert [phrases.quantity(n) for n in (260_032, 8_030_000, 1_100_048_384)] == ["260,032", "8.03 million", "1.10 billion"]

    def test_sci_percent_size(self) -> None:
        assert [wording.sci(x) for x in (0.000123, 12.0, 0.0, math.inf)] == ["1.23e−4", "1.20e1", "0", "∞"]
        assert [wording.percent(x) for x in (0.0123, 1.0, 0.0)] == ["1.2%", "100%", "0%"]
        assert [wording.size(n) for n in (12, 1054304, 637_700_000_000, None)] == ["12 bytes", "1.05 MB", "638 GB", "–"]

    def test_lists(self) -> None:
        assert [wording.listed("abc"[:n]) for n in range(4)] == ["", "a", "a and b", "a, b and c"]
        assert phrases.span([1.04, 1.01]) == "1.0×"
        assert phrases.span([1.5, 1.0]) == "1.0× to 1.5×"
        assert (wording.count(1, "layer"), wording.count(2000, "layer")) == ("1 layer", "2,000 layers")

    @given(st.text())
    def test_printable_is_printable(self, text: str) -> None:
        assert wording.printable(text).isprintable()
