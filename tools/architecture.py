"""docs/architecture.md and its figure, from LAYERS and the modules' first lines: ``python -m tools.architecture``; tested to be fresh."""

from __future__ import annotations

import ast
from html import escape
from pathlib import Path

from tools.check_imports import LAYERS

ROOT = Path(__file__).resolve().parent.parent
FILE, FIGURE = ROOT / "docs" / "architecture.md", ROOT / "docs" / "figures" / "architecture.svg"
# the first layer of each group of LAYERS → its name, and what it is about
GROUPS = {
    "errors": ("words", "errors, languages, how numbers read, files that are complete or absent"),
    "qtypes": ("file", "bytes on disk → named tensors in one layout; quantization types, recipes, tokenizers"),
    "model": ("forward", "the reference, exact or with an engine's arithmetic; all variants in lockstep"),
    "trace": ("trace", "what one engine showed at its taps; who can produce one, and logs of others"),
    "logit_kernel": ("study", "sums over a text, stored batch by batch; what runs, in which memory"),
    "rotation": ("compare", "two traces, two files, two runs: where they part, and the floor"),
    "diagnose": ("diagnose", "evidence, replay, the catalogue of faults, the verdict"),
    "remedy": ("remedy", "sensitivity, recipes, corrections, the file that is written"),
    "findings": ("answer", "sentences from numbers; the whole study"),
    "frames": ("report", "tables, text, Markdown, JSON, CSV: pure renderers"),
    "api": ("surface", "the Python interface and the commands"),
}
HEAD = """# Architecture

The package is flat, one idea a file, and reads from top to bottom: a module imports only from its own layer and from layers above it. A
test enforces it (`python -m tools.check_imports`, whose `LAYERS` is the order). Compute returns data, reports render it, the command line
prints it.

![The layers from top to bottom, in groups, from words and files over forward, trace and comparison to reports and commands.](FIGURE)

Five ideas that everything follows from are in [Concepts](concepts.md). What was decided, and why, is in [the decisions](#decisions). This
page is made by `python -m tools.architecture`.
""".replace("FIGURE", f"figures/{FIGURE.name}")
WIDTH, ROW, GAP, LEFT, PER_LINE = 900, 22, 12, 150, 105  # [px], and characters of module names on a line


def groups() -> dict[str, list[str]]:
    """First layer of each group → its layers."""
    found: dict[str, list[str]] = {}
    first = ""
    for layer in LAYERS:
        first = layer if layer in GROUPS else first
        found.setdefault(first, []).append(layer)
    missing = set(GROUPS) - set(found)
    if missing:
        raise ValueError(f"GROUPS names {', '.join(sorted(missing))}, which are no layers of tools/check_imports.py")
    return found


def page() -> str:
    """The whole file."""
    parts = [HEAD.rstrip()]
    for first, layers in groups().items():
        name, about = GROUPS[first]
        rows = [f"| `{layer}` | {says(layer)} |" for layer in layers]
        parts += [f"## {name.capitalize()}", f"{about[0].upper()}{about[1:]}.", "\n".join(["| module | |", "|---|---|", *rows])]
    titles = [f"- [{_title(p)}](decisions/{p.name})" for p in sorted((ROOT / "docs" / "decisions").glob("*.md"))]
    return "\n\n".join([*parts, "## Decisions", "\n".join(titles)]) + "\n"


def says(layer: str) -> str:
    """The first sentence of a module's docstring."""
    single, package = ROOT / "quantscope" / f"{layer}.py", ROOT / "quantscope" / layer / "__init__.py"
    path = single if single.exists() else package
    text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).replace("``", "`").replace("|", "\\|")


def _title(path: Path) -> str:
    return path.read_text("utf-8").partition("\n")[0].removeprefix("# ")


def figure() -> str:
    """Groups as boxes from top to bottom, with the layers in each."""
    parts, y = [], 8
    for first, layers in groups().items():
        lines = _wrapped(layers)
        height = ROW * len(lines) + 2 * GAP
        name = GROUPS[first][0]
        parts.append(f'<rect x="8" y="{y}" width="{WIDTH - 60}" height="{height}" rx="6" fill="#f4f6fa" stroke="#8a94a6"/>')
        parts.append(f'<text x="24" y="{y + GAP + 15}" font-weight="bold" fill="#1f2a44">{escape(name)}</text>')
        for i, line in enumerate(lines):
            parts.append(f'<text x="{LEFT}" y="{y + GAP + 15 + ROW * i}" fill="#333">{escape(line)}</text>')
        y += height + GAP
    x = WIDTH - 30
    arrow = f'<path d="M{x} {y - GAP} V16 M{x - 6} 26 L{x} 14 L{x + 6} 26" fill="none" stroke="#1f2a44" stroke-width="2"/>'
    label = f'<text transform="rotate(-90 {x + 18} {y // 2})" x="{x + 18}" y="{y // 2}" text-anchor="middle" fill="#1f2a44">imports</text>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" font-family="sans-serif" font-size="14">'
    back = f'<rect width="{WIDTH}" height="{y}" fill="white"/>'
    return "\n".join([head, back, *parts, arrow, label, "</svg>", ""])


def _wrapped(layers: list[str]) -> list[str]:
    lines = [""]
    for layer in layers:
        if lines[-1] and len(lines[-1]) + len(layer) > PER_LINE:
            lines.append("")
        lines[-1] += ("  ·  " if lines[-1] else "") + layer
    return lines


if __name__ == "__main__":
    FILE.write_text(page(), "utf-8")
    FIGURE.write_text(figure(), "utf-8")
