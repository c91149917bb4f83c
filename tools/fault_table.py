"""docs/faults.md, from the catalogue: ``python -m tools.fault_table`` writes it, a test sees that it is fresh."""

from __future__ import annotations

from pathlib import Path

from quantscope.diagnose.faults import ALL, FAULTS, STEMS, Fault
from quantscope.diagnose.twins import PROBES

FILE = Path(__file__).parent.parent / "docs" / "faults.md"
HEAD = """# The fault catalogue

What engines have got wrong, each as a change of the reference: `quantscope diagnose` runs all of them against an unexplained trace.
"Operations" are the taps that the fault makes wrong by themselves; local replay convicts these. Made by `python -m tools.fault_table`.

| fault | the engine ... | operations | places |
|---|---|---|---|
"""
TWINS = """
## Faults that much evidence cannot tell apart

They are named together, with what separates them.

| faults | what tells them apart |
|---|---|
"""
MOST_PLACES = 10


def table() -> str:
    """The whole file."""
    rows = [f"| `{f.name}` | {_says(f)} | {_ops(f)} | {_places(f)} |" for f in FAULTS]
    twins = [f"| {', '.join(f'`{name}`' for name in sorted(names))} | {text} |" for names, text in PROBES]
    return f"{HEAD}{chr(10).join(rows)}\n{TWINS}{chr(10).join(twins)}\n"


def _says(f: Fault) -> str:
    return f.says.replace(" ({place})", "").replace("{place}", "…")


def _ops(f: Fault) -> str:
    return ", ".join(f"`{op}`" for op in f.ops) or "of the place"


def _places(f: Fault) -> str:
    if f.places == ("",):
        return ""
    most = len(f.places) if set(f.places) <= {ALL, *STEMS} else MOST_PLACES
    more = () if f.more is None else (f.more.__doc__ or "",)
    return ", ".join((*f.places[:most], *("…" for _ in f.places[most : most + 1]), *more))


if __name__ == "__main__":
    FILE.write_text(table(), encoding="utf-8")
