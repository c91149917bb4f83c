"""Pages and figures that programs write are as these would write them now; the site's navigation names every page."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from tools import api_reference, architecture, cli_reference, document_schemas, hf_defaults
from tools.check_imports import LAYERS

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("tool", [cli_reference, api_reference, architecture], ids=lambda t: t.__name__)
def test_fresh(tool: object) -> None:
    assert tool.FILE.read_text("utf-8") == tool.page(), f"run `python -m {tool.__name__}`"  # type: ignore[attr-defined]


def test_the_figure_is_fresh_and_has_every_layer() -> None:
    drawn = architecture.figure()
    assert architecture.FIGURE.read_text("utf-8") == drawn
    assert [layer for layer in LAYERS if not re.search(rf"\b{layer}\b", drawn)] == []


def test_every_command_and_option_is_in_the_reference() -> None:
    text = cli_reference.page()
    assert text.count("\n## quantscope ") > 12
    assert all(name in text for name in ("`--until-ci PERCENT`", "`--out, -o DIR`", "golden check"))
    assert "object at 0x" not in text + api_reference.page()


@pytest.mark.parametrize("name", document_schemas.SCHEMAS)
def test_schemas_are_schemas_and_fresh(name: str) -> None:
    made = document_schemas.SCHEMAS[name]()
    Draft202012Validator.check_schema(made)
    kept = document_schemas.PATH.with_name(f"{name}.schema.json").read_text("utf-8")
    assert json.loads(kept) == made, "run `python -m tools.document_schemas`"


def test_the_defaults_of_configs_are_those_of_transformers() -> None:
    assert hf_defaults.PATH.read_text("utf-8") == hf_defaults.text(), "run `python -m tools.hf_defaults`"


def test_the_site_names_every_page() -> None:
    nav = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:")[2]
    pages = {p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md") if p.parent.name != "decisions"}
    assert pages == set(re.findall(r"[\w/-]+\.md", nav))


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    page = (tmp_path / "site" / "nonsense.html").read_text("utf-8")
    assert "<h1" in page
    assert re.findall(r'src="https?://', page) == []  # nothing is fetched from elsewhere
