"""The command line as a user runs it: what it prints, and how it refuses."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from quantscope.cli.main import main

Capture = pytest.CaptureFixture[str]


def fitting(name: str, printed: str) -> dict[str, Any]:
    """What ``--json`` has printed, which must fit the published schema of that name."""
    schema = json.loads((resources.files("quantscope") / "data" / f"{name}.schema.json").read_text("utf-8"))
    data: dict[str, Any] = json.loads(printed)
    Draft202012Validator(schema).validate(data)
    return data


def ran(capsys: Capture, *arguments: str | Path, code: int = 0) -> tuple[str, str]:
    """(stdout, stderr) of a command that must end with this code."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == code, capsys.readouterr()
    return capsys.readouterr()


def refused(capsys: Capture, *arguments: str | Path) -> str:
    """What a refused command says on stderr, on one line."""
    out, err = ran(capsys, *arguments, code=2)
    assert out == ""
    assert "Traceback" not in err
    return " ".join(err.split())
