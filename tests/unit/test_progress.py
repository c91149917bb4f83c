"""Progress on stderr: a bar per stage with where it is, tokens/s and time left, the KL divergences so far; nothing without a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from quantscope.cli import progress
from quantscope.cli.progress import Bars, Notes, watching


def drawn(bars: Bars, width: int = 120) -> str:
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=False).print(bars)
    return out.getvalue()


def test_bars() -> None:
    bars = Bars(Console(file=io.StringIO(), width=120))
    bars.begin("text", 24, 24_000)
    for done in range(1, 13):
        bars.step("text", done, f"batch 1/2, layer {done}/10")
    bars.scores({"Q4_0": 0.0123, "Q8\x1b[31m": 0.0001})
    text = drawn(bars)
    assert "text" in text
    assert "batch 1/2, layer 12/10" in text
    assert "tokens/s" in text
    assert "KL so far [nats]: Q4_0 0.0123, Q8\\x1b[31m 0.000100" in text
    assert max(map(len, text.splitlines())) <= 120


def test_no_speed_before_the_second_step() -> None:
    bars = Bars(Console(file=io.StringIO(), width=120))
    bars.begin("text", 24, 24_000)
    bars.step("text", 1, "embedding")
    assert "tokens/s" not in drawn(bars)


def test_without_a_terminal_only_notes(capsys: pytest.CaptureFixture[str]) -> None:
    with watching() as monitor:
        assert isinstance(monitor, Notes)
        monitor.note("Plan: one batch [of] two chunks.")
        monitor.begin("text", 2, 10)
        monitor.step("text", 1, "layer 1/1")
        monitor.scores({"Q4_0": 0.1})
    out, err = capsys.readouterr()
    assert (out, err) == ("", "Plan: one batch [of] two chunks.\n")


def test_on_a_terminal_bars_that_vanish(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr(progress, "console", lambda stream: Console(file=terminal, width=100, force_terminal=True))
    with watching() as monitor:
        monitor.note("Plan: one batch.")
        monitor.begin("text", 2, 10)
        monitor.step("text", 1, "layer 1/1")
    assert isinstance(monitor, Bars)
    shown = terminal.getvalue()
    assert "Plan: one batch." in shown
    assert "layer 1/1" in shown
    assert shown.rstrip().endswith("\x1b[2K") or "\x1b[1A" in shown  # the bars are erased
