"""README.ja.md keeps in step with README.md: the same headings, tables and commands in the same order, and each links to the other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
COMMAND = re.compile(r"^(?:\$ )?((?:quantscope|make|pip) .*?)(?: {2,}.*)?$", re.M)


@pytest.fixture(scope="module")
def texts() -> tuple[str, str]:
    english, japanese = ((ROOT / name).read_text("utf-8") for name in ("README.md", "README.ja.md"))
    return english, japanese


def blocks(text: str) -> list[str]:
    return re.findall(r"^```\n(.*?)^```$", text, re.M | re.S)


def commands(block: str) -> list[str]:
    return [command.replace(" --lang ja", "") for command in COMMAND.findall(block)]


def test_the_same_headings(texts: tuple[str, str]) -> None:
    english, japanese = ([re.findall(r"^#+(?= )", re.sub(r"^```.*?^```", "", t, flags=re.M | re.S), re.M)] for t in texts)
    assert english == japanese
    assert len(english[0]) > 5


def test_the_same_commands_in_the_same_blocks(texts: tuple[str, str]) -> None:
    english, japanese = ([commands(b) for b in blocks(t)] for t in texts)
    assert english == japanese
    assert sum(map(len, english)) > 25


def test_the_same_tables(texts: tuple[str, str]) -> None:
    english, japanese = (re.findall(r"^\|.*\|$", t, re.M) for t in texts)
    assert len(english) == len(japanese)
    options = [[line.split("|")[1] for line in rows if line.startswith("| `--")] for rows in (english, japanese)]
    assert options[0] == options[1]


def test_the_same_links_and_each_to_the_other(texts: tuple[str, str]) -> None:
    english, japanese = (set(re.findall(r"\]\(([^)]+)\)", t)) for t in texts)
    assert english - {"README.ja.md"} == japanese - {"README.md"}
    assert "README.ja.md" in english
    assert "README.md" in japanese


def test_japanese_is_japanese(texts: tuple[str, str]) -> None:
    prose = re.sub(r"`[^`]*`|^```.*?^```", "", texts[1], flags=re.M | re.S)
    assert re.findall(r"(?:\b[A-Za-z]{2,}\b[ ,:;.]+){5}", prose) == []
    assert not re.search(r"です|ます(?!ぐ)", prose)
