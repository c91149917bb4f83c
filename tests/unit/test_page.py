"""Pages as data and as text: charts hold the study's numbers, nothing can be run that was only named, size stays bounded."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from quantscope.cli.report import told_of
from quantscope.errors import CorruptFileError, MissingFileError, UsageError
from quantscope.findings import complete
from quantscope.language import language
from quantscope.report.markdown import markdown
from quantscope.report.page import html
from quantscope.report.page.content import Chart, Page, Series, rounded
from quantscope.report.page.render import data, in_script, table_of
from quantscope.report.page.study import MOST_HEAVY, study_page
from quantscope.report.study_json import dump
from quantscope.results import EngineRow, EngineRun, Interrupted, OpRow, Study
from tests.unit import studies

LIMIT = 6_000_000  # bytes of a page
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u2028\u202e\x00"


def charts(page: Page) -> dict[str, Chart]:
    return {c.id: c for block in page.blocks for c in block.charts}


def embedded(text: str) -> dict[str, object]:
    """The JSON that page.js reads."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    return json.loads(found[1])


class Outline(HTMLParser):
    """Tags with their attributes, and the text outside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, text: str) -> None:
        if self._inside not in ("script", "style"):
            self.words.append(text)


def with_ops(study: Study, n_layer: int = 3) -> Study:
    taps = ("attn_norm", "ffn_out", "l_out")

    def ops(error: float | None) -> tuple[OpRow, ...]:
        return tuple(
            OpRow(t, i, 10, 0.0, 1.0, 1.0, -2.0, 2.0, 2.0 + i, 0, 1, 2, nmse=None if error is None else error * (i + 1), sqnr_db=20.0)
            for i in range(n_layer)
            for t in taps
        )

    variants = tuple(dataclasses.replace(v, ops=ops(None if v.name == study.original else 1e-3)) for v in study.variants)
    return dataclasses.replace(study, variants=variants)


def test_charts_hold_the_studys_numbers() -> None:
    study = with_ops(studies.long_study())
    found = charts(study_page(study))
    for v in study.variants:
        (line,) = [s for s in found["rms"].series if s.key and s.key.startswith(v.name)]
        assert line.y == rounded([r.output_rms for r in v.layers])
        assert line.original == (v.name == study.original)
    assert [s.key for s in found["nmse"].series] == [v.name for v in study.quantized]
    assert found["rms"].log_y
    assert not found["mean"].log_y
    heat = found["operations"]
    assert (heat.x, heat.y) == ([0, 1, 2], ["attn_norm", "ffn_out", "l_out"])
    assert heat.frames[0].z[1] == [0.001, 0.002, 0.003]
    assert {s.name: (s.x, s.y) for s in found["pareto"].series}["Q8_0"] == ([8.5], [0.0004])


def test_engines_have_the_predicted_error_as_a_band() -> None:
    rows = tuple(EngineRow(tap, 0.01, 2e-4, 1e-4) for tap in ("l_out-0", "l_out-1", "result_output"))
    study = dataclasses.replace(studies.long_study(), engines=(EngineRun("Q4_0", "llama.cpp", "1", True, "", None, rows),))
    chart = charts(study_page(study))["engines-0"]
    assert [(s.name, s.style) for s in chart.series] == [("quantization", "dash"), ("llama.cpp, predicted", "band"), ("llama.cpp", "")]
    assert chart.series[1].high == [1e-4] * 3
    assert chart.series[0].x == ["0", "1", "logits"]


def test_every_chart_has_its_numbers_as_a_table_and_every_key_a_button() -> None:
    text = html(study_page(with_ops(studies.long_study())))
    outline = Outline(text)
    plots = [a["id"] for tag, a in outline.tags if tag == "div" and a.get("class") == "plot"]
    assert plots == [f"chart-{name}" for name in embedded(text)["charts"]]  # type: ignore[union-attr]
    assert sum(tag == "summary" for tag, _ in outline.tags) >= len(plots)
    chips = [a["data-key"] for tag, a in outline.tags if tag == "button" and a.get("class") == "chip"]
    assert chips == [str(i) for i in range(6)]
    columns = {a["data-key"] for tag, a in outline.tags if tag == "th" and "data-key" in a}
    assert columns == set(chips)
    (root,) = [a for tag, a in outline.tags if tag == "html"]
    assert root["lang"] == "en"


def test_the_table_of_a_chart() -> None:
    lines = Chart("a", "A", "lines", "layer", "y", (Series("p", [0, 1], [1.5, None]), Series("q", [1, 2], [2.5e-9, 3.0])))
    table = table_of(lines)
    assert table.columns == ("layer", "p", "q")
    assert table.rows == (("0", "1.500", "–"), ("1", "–", "2.500e−9"), ("2", "–", "3.000"))


def test_nothing_is_loaded_from_elsewhere() -> None:
    outline = Outline(html(study_page(studies.long_study())))
    for tag, attributes in outline.tags:
        assert tag not in ("link", "img", "iframe")
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#"), (tag, attributes)


def test_names_are_shown_and_not_run() -> None:
    study = studies.long_study()
    study = dataclasses.replace(study, notes=(EVIL,), provenance={EVIL: EVIL}, original=EVIL)
    variants = tuple(dataclasses.replace(v, name=EVIL) if v.name == "F16" else v for v in study.variants)
    text = html(study_page(complete(dataclasses.replace(study, variants=variants))))
    outline = Outline(text)
    assert sum(tag == "script" for tag, _ in outline.tags) == 3
    assert not any(tag == "img" for tag, _ in outline.tags)
    assert any("alert(1)" in w for w in outline.words)  # it is shown
    assert not set(text) & set("\u2028\u202e\x00")
    assert "alert(1)" in str(embedded(text)["keys"])


def test_json_in_a_script_cannot_end_it() -> None:
    text = in_script({"a": "</script><!--&\u2028\ud800"})
    assert not set(text) & set("<>&\u2028")
    assert json.loads(text)["a"].startswith("</script><!--&\u2028")


def test_numbers_that_are_none_are_left_out_of_charts() -> None:
    assert rounded([1.23456789, float("nan"), float("inf"), None, -1e-300]) == [1.2346, None, None, None, -1e-300]
    data(study_page(studies.long_study()))  # JSON without NaN: in_script refuses it
    in_script(data(study_page(with_ops(studies.long_study()))))


def many(n_variants: int, n_layer: int) -> Study:
    study = studies.long_study()
    one = study.quantized[0]
    layers = studies.rows(n_layer, 1.05, error=(1e-3, 1.01))
    others = tuple(dataclasses.replace(one, name=f"variant-{k}", layers=layers, path=None) for k in range(n_variants))
    first = dataclasses.replace(study.variant("F16"), layers=layers)
    return with_ops(dataclasses.replace(study, variants=(first, *others), paired=()), n_layer)


def test_200_variants_of_80_layers_fit_and_what_is_left_out_is_said() -> None:
    page = study_page(many(200, 80))
    found = charts(page)
    assert len(found["rms"].series) == 201
    assert len(found["operations"].frames) == MOST_HEAVY
    assert found["operations"].note == "The first 16 of 200 variants are in this figure; study.json has all."
    assert len(html(page).encode()) < LIMIT


def test_one_variant_only() -> None:
    study = studies.long_study()
    alone = dataclasses.replace(study, variants=(study.variant("Q4_0"),), original=None, paired=(), floor=None)
    text = html(study_page(complete(alone)))
    assert 'class="chip"' not in text  # nothing to choose from
    assert "rms" in embedded(text)["charts"]  # type: ignore[operator]


def test_an_incomplete_study_says_so() -> None:
    study = dataclasses.replace(studies.long_study(), interrupted=Interrupted("text", 3, 8))
    text = html(study_page(study))
    assert '<p class="warning" role="alert">Incomplete: interrupted after 3 of 8 batches of the text' in text
    assert text.count("Incomplete: interrupted") == 1
    assert "Incomplete: interrupted after 3 of 8 batches" in markdown(study)
    assert "stopped early" not in text + markdown(study)
    assert "Incomplete: interrupted before the text" in html(
        study_page(dataclasses.replace(study, interrupted=Interrupted("prompt", 1, 1)))
    )


def test_an_engine_is_shown_operation_by_operation() -> None:
    ops = tuple(EngineRow(f"{tap}-{i}", 1e-3, 1e-6 * (i + 1), None) for i in range(2) for tap in ("ffn_out", "l_out"))
    run = EngineRun("Q4_0", "llama.cpp", "1", True, "", None, ops[1::2], ops)
    chart = charts(study_page(dataclasses.replace(studies.long_study(), engines=(run,))))["engine-operations-0"]
    assert (chart.x, chart.y) == ([0, 1], ["ffn_out", "l_out"])
    assert {f.name: f.z for f in chart.frames} == {"llama.cpp": [[1e-6, 2e-6]] * 2, "quantization": [[1e-3, 1e-3]] * 2}


def test_the_floor_of_float32_stands_under_the_errors() -> None:
    study = studies.long_study()
    assert study.floor is not None
    noted = dataclasses.replace(study, floor=dataclasses.replace(study.floor, layer_nmse=(1e-14, 3e-14)))
    assert "3.0e−14" in charts(study_page(noted))["nmse"].note
    assert charts(study_page(study))["nmse"].note == ""


def test_japanese() -> None:
    with language("ja"):
        text = html(study_page(with_ops(studies.long_study())))
    outline = Outline(text)
    assert ("html", {"lang": "ja"}) in outline.tags
    assert "TSVとしてコピー" in "".join(outline.words)


def test_opening_a_study(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"study\.json: no such file"):
        told_of(tmp_path)
    (tmp_path / "study.db").touch()
    with pytest.raises(UsageError, match="was interrupted"):
        told_of(tmp_path)
    path = tmp_path / "study.json"
    path.write_text("{", "utf-8")
    with pytest.raises(CorruptFileError, match="cut short"):
        told_of(tmp_path)
    path.write_text(dump(studies.long_study()), "utf-8")
    assert dump(told_of(tmp_path)) == dump(told_of(path)) == dump(studies.long_study())
