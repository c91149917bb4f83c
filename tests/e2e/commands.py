"""The command line as a user runs it: what it prints, and how it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantscope.cli.main import main

Capture = pytest.CaptureFixture[str]


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
