"""Where things are printed: results on stdout, everything about the run on stderr."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from typing import TYPE_CHECKING, TextIO

from quantscope.wording import printable

if TYPE_CHECKING:
    from rich.console import Console

WIDEST = 120  # [columns] longer lines are hard to read, however wide the terminal is
PIPED = 100  # [columns] when the output is no terminal


def complain(kind: str, message: str) -> None:
    """One paragraph on stderr, ``kind: message``, wrapped; the kind in bold red where stderr is a terminal that wants colour."""
    width = min(shutil.get_terminal_size((PIPED, 24)).columns, WIDEST)
    text = textwrap.fill(f"{kind}: {printable(' '.join(message.split()))}", width, break_long_words=False, break_on_hyphens=False)
    if sys.stderr.isatty() and not os.environ.get("NO_COLOR"):
        text = f"\x1b[1;31m{kind}\x1b[0m" + text.removeprefix(kind)
    print(text, file=sys.stderr)


def console(stream: TextIO) -> Console:
    """A rich console on a stream; it honours NO_COLOR and writes no colour where there is no terminal."""
    from rich.console import Console

    columns = shutil.get_terminal_size((PIPED, 24)).columns if stream.isatty() or "COLUMNS" in os.environ else PIPED
    return Console(file=stream, width=max(60, min(columns, WIDEST)), highlight=False)
