"""docs/cli.md, from the commands: ``python -m tools.cli_reference`` writes it, a test sees that it is fresh."""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import typer.main

from quantscope.cli.main import app

FILE = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
HEAD = """# Commands

Every command with its arguments and options, as `--help` shows them. Made by `python -m tools.cli_reference`.

Exit codes of all commands: 0 done, or nothing found beyond the expected arithmetic; 1 a difference or fault was found; 2 bad usage or
input, with one paragraph that says what is wrong and what to do; 3 an internal error. What is printed for people goes to stdout, or to
stderr with `--json`, which puts one JSON document on stdout. `NO_COLOR` is respected, and without a terminal there are no progress bars.
"""
BLANK = " "


def page() -> str:
    """The whole file."""
    root = typer.main.get_command(app)
    found = list(_commands(root, "quantscope"))
    rows = [f"| [`{name}`](#{_anchor(name)}) | {_short(command)} |" for name, command in found]
    index = "\n".join(["| command | |", "|---|---|", *rows])
    return "\n\n".join([HEAD.rstrip(), index, *(_section(name, command) for name, command in found)]) + "\n"


def _commands(group: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """(full name, command), groups opened, in the order of --help."""
    for name, command in group.commands.items():
        full = f"{prefix} {name}"
        if hasattr(command, "commands"):
            yield from _commands(command, full)
        else:
            yield full, command


def _anchor(name: str) -> str:
    return name.replace(" ", "-")


def _short(command: Any) -> str:
    return _cell(command.short_help or (command.help or "").split("\n")[0])


def _section(name: str, command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and "--help" not in p.opts]
    usage = " ".join([name, *(_argument(p) for p in arguments), *(["[OPTIONS]"] if options else [])])
    parts = [f"## {name}", f"    {usage}", _paragraphs(command.help or "")]
    if arguments:
        parts.append("\n".join(["| argument | |", "|---|---|", *(f"| `{_argument(p)}` | {_cell(p.help or '')} |" for p in arguments)]))
    if options:
        parts.append("\n".join(["| option | default | |", "|---|---|---|", *map(_option, options)]))
    return "\n\n".join(parts)


def _argument(p: Any) -> str:
    name = p.metavar or p.name.upper()
    return f"{name}..." if p.nargs == -1 and not name.endswith("...") else name


def _option(p: Any) -> str:
    value = "" if p.is_flag else f" {p.metavar or _choices(p.default)}"
    said, default = _default(p)
    return f"| `{', '.join(sorted(p.opts, key=len, reverse=True))}{_escaped(value)}` | {default} | {_cell(said)} |"


def _choices(default: Any) -> str:
    """``cpu|cuda`` of an option whose values are an enumeration; all of those have a default."""
    return "|".join(str(m.value) for m in type(default)) if isinstance(default, Enum) else "VALUE"


def _default(p: Any) -> tuple[str, str]:
    """The help without its ``[default: x]``, and x."""
    text = p.help or ""
    m = re.search(r"\s*\[default: (.*?)\]$", text)
    if m:
        return text[: m.start()], f"`{_escaped(m[1])}`"
    plain = p.default is not None and not p.is_flag and not callable(p.default)
    return text, f"`{getattr(p.default, 'value', p.default)}`" if plain else BLANK


def _paragraphs(text: str) -> str:
    """Paragraphs of a docstring, each on one line."""
    blocks = re.split(r"\n\s*\n", text.strip())
    return "\n\n".join(_marked(" ".join(b.split())) for b in blocks)


def _marked(text: str) -> str:
    """Angle brackets and asterisks stay what they are."""
    return re.sub(r"(?<!`)([<>*])", r"\\\1", text)


def _cell(text: str) -> str:
    return _escaped(_marked(" ".join(text.split())))


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    FILE.write_text(page(), "utf-8")
