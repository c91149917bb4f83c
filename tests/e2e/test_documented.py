"""Every quantscope command that README and docs show runs, with the exit code that the text promises; what is mentioned exists."""

from __future__ import annotations

import os
import re
import shutil
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer.main

from quantscope.cli import demo
from quantscope.cli.golden import MAKE
from quantscope.cli.main import app, main
from tests import documented
from tests.documented import ROOT, Command

pytestmark = pytest.mark.long

# command → why no test runs it; what is listed here and in no document fails
NOT_RUN: dict[str, str] = {
    "quantscope study hf-gptq/ --ref hf-folder/ --text -": (
        "needs a GPTQ checkpoint with a vocabulary, and a standard input: each is run by itself, in test_packed.py and test_study_resume.py"
    ),
}
# command → the exit code that its document promises, where it is not 0
EXPECTED = {
    "quantscope diagnose m.gguf --against engine.safetensors": 1,
    "quantscope compare exact.safetensors engine.safetensors": 1,
    "quantscope compare a.safetensors b.safetensors": 1,
    "quantscope diagnose q4.gguf --against my-engine.safetensors": 1,
    'quantscope diagnose q4.gguf --against my-engine.safetensors --prompt "Once upon a time"': 1,
    # the quantization changes the next token of the two-layer model, and the page says what exit code that is
    'quantscope diagnose q4.gguf --against llama.cpp --original f16.gguf --prompt "Once upon a time"': 1,
    "quantscope compare reference.safetensors my-engine.safetensors --model q4.gguf --all": 1,
}


def is_signature(code: str) -> bool:
    """A function as docs/api.md shows it, no program."""
    return code.rstrip().splitlines()[-1].startswith(") ->") or "\n" not in code.strip()


JAPANESE = " --lang ja"  # README.ja.md shows README's commands with it (tests/unit/test_readme.py); each is run once
COMMANDS = {c.text.removesuffix(JAPANESE): c for c in sorted(documented.commands(), key=lambda c: c.page != "README.ja.md")}


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documented")
    documented.write_files(folder)
    return folder


@pytest.fixture
def workspace(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files, so that no command sees what another has written."""
    for path in files.iterdir():
        shutil.copytree(path, tmp_path / path.name) if path.is_dir() else (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "bundled", lambda name: files / {demo.MODEL: "demo-f16.gguf", demo.TEXT: "wiki.txt"}[name])
    return tmp_path


def fresh(command: Command) -> None:
    """A folder that a command is to make is not there yet."""
    for option, value in pairwise(command.words):
        if option in ("-o", "--out") and Path(value).is_dir():
            shutil.rmtree(value)


@pytest.mark.parametrize("command", [c for text, c in COMMANDS.items() if text not in NOT_RUN], ids=lambda c: f"{c.page}:{c.line}")
def test_runs(command: Command, workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fresh(command)
    assert main(command.words[1:]) == EXPECTED.get(command.text, 0), f"{command.text}\n{''.join(capsys.readouterr())}"


FRAGMENTS = {"docs/importing.md"}  # pages whose Python block is a part of an engine, with names of its own
BLOCKS = [b for b in documented.python_blocks() if b[0] not in FRAGMENTS and not is_signature(b[2])]


@pytest.mark.parametrize(("page", "line", "code"), BLOCKS, ids=[f"{page}:{line}" for page, line, _ in BLOCKS])
def test_python_runs(page: str, line: int, code: str, workspace: Path) -> None:
    (workspace / "quantscope-demo").symlink_to(workspace / "quantscope-MODEL")
    exec(compile(code, f"{page}:{line}", "exec"), {"__name__": "documented"})


def test_there_are_commands_and_the_lists_are_not_stale() -> None:
    assert len(COMMANDS) > 30
    assert {c.page for c in COMMANDS.values()} >= {"README.md", "docs/importing.md", "docs/remedies.md"}
    assert [text for text in (*NOT_RUN, *EXPECTED) if text not in COMMANDS] == []


def test_what_is_mentioned_exists() -> None:
    root = typer.main.get_command(app)
    found = documented.mentions()
    assert len(found) > 20
    wrong = [f"{c.page}:{c.line}: {c.text}" for c in (*found, *COMMANDS.values()) if _unknown(root, c.text)]
    assert wrong == []


def _unknown(command: Any, text: str) -> list[str]:
    """What a command line names and the program does not have: a subcommand, options."""
    words = re.findall(r"[^\s\[\]|]+", text)[1:]
    while words and hasattr(command, "commands") and not words[0].startswith("-"):
        inner = command.commands.get(words[0]) or command.commands.get(MAKE)
        if inner is None:
            return words[:1]
        command, words = inner, words[1:]
    options = {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"--help", "-h"}
    return [w for w in words if re.fullmatch(r"--?[a-z][a-z-]*", w) and w not in options]


def test_make_targets_modules_and_extras_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))
    both = {p: [*documented.commands(p), *documented.mentions(p)] for p in ("make", "python -m", "pip", "python")}
    assert both["make"]
    assert [c for c in both["make"] if c.words[1] not in targets] == []
    assert both["python -m"]
    assert [c for c in both["python -m"] if find_spec(c.words[2]) is None] == []
    listed = (ROOT / "pyproject.toml").read_text("utf-8").partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = set(re.findall(r"^(\w+) = \[", listed, re.M))
    named = {e for c in both["pip"] for group in re.findall(r"quantscope\[([\w,]+)\]", c.text) for e in group.split(",")}
    assert named
    assert named <= extras


def test_links_lead_somewhere() -> None:
    broken = []
    for page in documented.PAGES:
        text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.S | re.M)
        for target in re.findall(r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#[^)]*)?\)", text):
            if target and not os.path.exists(page.parent / target):
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert broken == []
