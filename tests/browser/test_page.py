"""Pages in a real browser: what is drawn, what the keys and buttons do, that it fits a phone, and that nothing named is run.

Run with ``make test-browser``.  Screenshots of the pages, to be looked at, go to the folder that QUANTSCOPE_SCREENSHOTS names.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from quantscope.findings import complete, told
from quantscope.language import language
from quantscope.report.page import html
from quantscope.report.page.study import study_page
from quantscope.results import Study
from tests.unit import studies
from tests.unit.test_page import EVIL, many, with_ops

sync = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed: pip install quantscope[browser]")

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FOUND = next((path for name in BROWSERS if (path := shutil.which(name))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(FOUND is None, reason=f"none of {', '.join(BROWSERS)} is installed: make test-browser installs one"),
]
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with sync.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=FOUND, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium: Any, tmp_path: Path) -> Iterator[Open]:
    """Opens a study's page; at the end nothing may have been said on the console."""
    complaints: list[str] = []
    contexts = []

    def open_(study: Study, lang: str = "en", width: int = 1280, **options: Any) -> Any:
        path = tmp_path / f"{lang}.html"
        with language(lang):
            path.write_text(html(study_page(told(study))), "utf-8")
        context = chromium.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: complaints.append(str(e)))
        page.on("request", lambda r: complaints.append(r.url) if not r.url.startswith(("file:", "data:", "blob:")) else None)
        page.goto(path.as_uri())
        draw_all(page)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert not complaints


def draw_all(page: Any) -> None:
    """Charts are drawn when they come into view."""
    for box in page.locator(".plot").all():
        box.scroll_into_view_if_needed()
        box.locator(".main-svg").first.wait_for(timeout=20_000)
    page.evaluate("scrollTo(0, 0)")


def looked_at(page: Any, name: str) -> None:
    folder = os.environ.get("QUANTSCOPE_SCREENSHOTS")
    if folder:
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def full_study() -> Study:
    return with_ops(studies.long_study())


MARKS = ".scatterlayer .trace .point, .scatterlayer .trace .lines path, .scatterlayer .trace text, .heatmaplayer image"


def marks(page: Any, chart: str) -> int:
    """Visible marks of a chart."""
    return int(page.locator(f"#chart-{chart}").locator(MARKS).count())


def test_every_chart_has_marks(opened: Open) -> None:
    page = opened(full_study())
    names = [box.get_attribute("id").removeprefix("chart-") for box in page.locator(".plot").all()]
    assert {"rms", "mean", "nmse", "operations", "pareto"} <= set(names)
    assert {name: marks(page, name) for name in names if not marks(page, name)} == {}
    looked_at(page, "study")


def test_a_button_hides_a_variant_in_all_charts_and_tables(opened: Open) -> None:
    page = opened(full_study())
    before = {name: marks(page, name) for name in ("rms", "mean", "nmse", "pareto")}
    headings = page.locator("th", has_text="Q6_K").count()
    assert headings > 3
    chip = page.get_by_role("button", name="Q6_K")
    chip.click()
    assert chip.get_attribute("aria-pressed") == "false"
    for name, n in before.items():
        assert marks(page, name) < n, name
    assert page.locator("th:not(.hidden)", has_text="Q6_K").count() == 0
    assert page.locator("td.hidden").count() > 20
    page.get_by_role("button", name="Show all").click()
    assert {name: marks(page, name) for name in before} == before
    assert page.locator(".hidden").count() == 0


def test_numbers_can_be_seen_and_copied(opened: Open) -> None:
    page = opened(full_study(), permissions=["clipboard-read", "clipboard-write"])
    figure = page.locator("figure", has=page.locator("#chart-nmse"))
    figure.locator("summary").click()
    assert figure.locator("tbody tr").count() == 10
    figure.get_by_role("button", name="Copy as TSV").click()
    figure.get_by_role("button", name="Copied").wait_for()
    rows = [line.split("\t") for line in page.evaluate("navigator.clipboard.readText()").splitlines()]
    assert rows[0] == ["layer", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0"]
    assert rows[1][:2] == ["0", "1.000e−5"]


def test_the_heat_map_shows_another_variant(opened: Open) -> None:
    page = opened(full_study())
    shown = "document.getElementById('chart-operations').data[0].customdata"
    study = full_study()
    worse = dataclasses.replace(study.variant("Q4_0"), ops=tuple(dataclasses.replace(r, nmse=0.5) for r in study.variant("Q4_0").ops))
    page = opened(dataclasses.replace(study, variants=(*study.variants[:-1], worse)))
    first = page.evaluate(shown)
    page.locator('select[data-chart="operations"]').select_option(label="Q4_0")
    assert page.evaluate(shown) != first
    assert page.evaluate(shown)[0][0] == 0.5


def test_light_and_dark(opened: Open) -> None:
    page = opened(full_study(), color_scheme="dark")
    ink = "getComputedStyle(document.body).color"
    background = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(f"[{ink}, {background}]")
    looked_at(page, "dark")
    page.locator("#theme").click()
    light = page.evaluate(f"[{ink}, {background}]")
    assert dark != light
    assert light[1] == "rgb(255, 255, 255)"
    ticks = "getComputedStyle(document.querySelector('#chart-rms .xtick text')).fill"
    assert page.evaluate(ticks) == light[0]  # the charts are drawn anew


@pytest.mark.parametrize("lang", ["en", "ja"])
def test_a_phone_needs_no_scrolling_sideways(opened: Open, lang: str) -> None:
    page = opened(full_study(), lang, width=360, is_mobile=True, has_touch=True)
    for summary in page.locator("summary").all():
        summary.evaluate("s => s.parentElement.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    looked_at(page, f"phone-{lang}")


def test_japanese_has_glyphs(opened: Open) -> None:
    """Each of some characters of the page is drawn, and not as the box that stands for a missing one."""
    page = opened(full_study(), "ja")
    assert page.evaluate("document.documentElement.lang") == "ja"
    drawn = page.evaluate(
        """() => {
          const canvas = document.createElement("canvas"), at = canvas.getContext("2d", { willReadFrequently: true });
          at.font = `32px ${getComputedStyle(document.body).fontFamily}`;
          const picture = (text) => {
            at.clearRect(0, 0, 64, 64);
            at.fillText(text, 4, 44);
            return at.getImageData(0, 0, 64, 64).data.join();
          };
          return [..."量子化層平均誤差\\u{10FFFE}"].map(picture);
        }"""
    )
    *characters, missing = drawn
    assert len(set(characters)) == len(characters)
    assert missing not in characters
    looked_at(page, "japanese")


def test_names_are_not_run(opened: Open) -> None:
    study = full_study()
    variants = tuple(dataclasses.replace(v, name=EVIL) if v.name == "Q4_0" else v for v in study.variants)
    evil = complete(dataclasses.replace(study, variants=variants, notes=(EVIL,), provenance={EVIL: EVIL}, paired=()))
    page = opened(evil)  # an alert would be a dialog, a picture a request, a handler an error
    assert page.evaluate("document.images.length") == 0
    assert page.locator("script").count() == 3
    assert "alert(1)" in page.locator(".chip").last.inner_text()


def test_the_keyboard_reaches_everything(opened: Open) -> None:
    page = opened(full_study())
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.className || document.activeElement.tagName"))
    assert {"chip", "A", "scroll", "copy"} <= reached
    page.locator(".chip").nth(1).focus()
    page.keyboard.press("Space")
    assert page.locator(".chip").nth(1).get_attribute("aria-pressed") == "false"
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


def test_many_variants_and_layers(opened: Open) -> None:
    page = opened(many(200, 80))
    assert page.locator(".chip").count() == 201
    assert marks(page, "rms") > 200
    looked_at(page, "many")


def test_printing_draws_everything(opened: Open) -> None:
    page = opened(full_study())
    page.emulate_media(media="print")
    assert not page.locator(".legend").is_visible()
    assert page.locator("#chart-nmse .main-svg").first.is_visible()
