"""Progress of a study on stderr: a bar per stage with tokens/s and time left, and the KL divergences so far below it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from quantscope.cli.console import console
from quantscope.monitor import Monitor
from quantscope.wording import printable, sig

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import TaskID


@contextmanager
def watching() -> Iterator[Monitor]:
    """A monitor that draws on stderr; where that is no terminal it prints the notes and draws nothing."""
    if not sys.stderr.isatty():
        yield Notes()
        return
    from rich.live import Live

    on = console(sys.stderr)
    bars = Bars(on)
    with Live(bars, console=on, transient=True, refresh_per_second=4):
        yield bars


class Notes(Monitor):
    """One line for each note."""

    def note(self, text: str) -> None:
        console(sys.stderr).print(text, markup=False, soft_wrap=True)


class Bars(Monitor):
    """A rich renderable that follows the study."""

    def __init__(self, on: Console) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[what]}"),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=on,
        )
        self.tasks: dict[str, tuple[TaskID, float]] = {}  # stage → its bar, tokens per step
        self.kl: Mapping[str, float] = {}

    def note(self, text: str) -> None:
        self.progress.console.print(text, markup=False, soft_wrap=True)

    def begin(self, stage: str, n_steps: int, n_tokens: int) -> None:
        self.tasks[stage] = self.progress.add_task(stage, total=n_steps, what="", speed=""), n_tokens / n_steps

    def step(self, stage: str, done: int, what: str) -> None:
        task, per_step = self.tasks[stage]
        rate = self.progress.tasks[task].speed
        speed = f"{rate * per_step:,.0f} tokens/s" if rate and per_step else ""
        self.progress.update(task, completed=done, what=what, speed=speed)

    def scores(self, kl_nats: Mapping[str, float]) -> None:
        self.kl = kl_nats

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        if not self.kl:
            return self.progress
        so_far = ", ".join(f"{printable(name)} {sig(x)}" for name, x in self.kl.items())
        return Group(self.progress, Text(f"KL so far [nats]: {so_far}", style="dim"))
