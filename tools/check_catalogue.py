"""Check that every sentence the package can say has a template in every catalogue, and that no catalogue has others.

    python -m tools.check_catalogue           missing keys, stale keys, fields that a translation loses or invents

What can be said is found by reading the code: ``say("...")``, ``mark("...")``, ``english("...")`` and ``phrases.count(n, "layer")`` with
literal templates.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from string import Formatter

from quantscope.language import ENGLISH, LANGUAGES
from quantscope.strings import parts

PACKAGE = Path(__file__).resolve().parent.parent / "quantscope"
SAID = {"say": 0, "mark": 0, "english": 0, "Fault": 1, "Rule": 1}  # function or row of a table → which of its arguments is a template


def said_in(source: str) -> tuple[dict[str, int], list[int]]:
    """({template: line}, lines where one is no literal) of a module's text."""
    tree = ast.parse(source)
    counts = any(
        isinstance(node, ast.ImportFrom) and node.module == "quantscope.phrases" and any(a.name == "count" for a in node.names)
        for node in ast.walk(tree)
    )
    found: dict[str, int] = {}
    others: list[int] = []
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args):
            continue
        if node.func.id in SAID:
            at = SAID[node.func.id]
            key = _literal(node.args[at]) if len(node.args) > at else None
        elif node.func.id == "count" and counts:
            key = _counted(node.args[1:])
        else:
            continue
        if key is None:
            others += [node.lineno] if node.func.id == "mark" or isinstance(node.args[0], ast.JoinedStr | ast.BinOp) else []
        else:
            found.setdefault(key, node.lineno)
    return found, others


def _literal(node: ast.expr) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _counted(words: list[ast.expr]) -> str | None:
    """The key of ``count(n, "layer")``: ``{n} layers``."""
    *_, last = [_literal(w) for w in words] or [None]
    return None if last is None else f"{{n}} {last if len(words) > 1 else last + 's'}"


def said(package: Path = PACKAGE) -> dict[str, str]:
    """Template → where it is first said.  Raises ValueError for one that is put together from parts."""
    out: dict[str, str] = {}
    for path in sorted(package.rglob("*.py")):
        if path.name in ("language.py", "phrases.py") and path.parent == package:
            found, others = said_in(path.read_text("utf-8"))[0], []
        else:
            found, others = said_in(path.read_text("utf-8"))
        where = path.relative_to(package.parent)
        if others:
            raise ValueError(f"{where}:{others[0]}: a template that is said must be one literal.")
        for key, line in found.items():
            out.setdefault(key, f"{where}:{line}")
    return out


def fields(template: str) -> set[str]:
    """Names in braces; those that begin with an underscore are English grammar and not counted."""
    return {name for _, name, _, _ in Formatter().parse(template) if name is not None and not name.startswith("_")}


def problems(keys: Mapping[str, str], catalogue: Mapping[str, Mapping[str, str]]) -> Iterable[str]:
    """One line each; catalogue: the parts of one language."""
    known: dict[str, str] = {}
    for part, strings in catalogue.items():
        for key, text in strings.items():
            if known.setdefault(key, text) != text:
                yield f"{part}: another translation than an earlier part's: {key!r}"
            if key not in keys:
                yield f"{part}: nothing says {key!r}"
            elif fields(key) != fields(text):
                yield f"{part}: fields {sorted(fields(text))} of {text!r}, expected {sorted(fields(key))}"
    yield from (f"{where}: not in the catalogue: {key!r}" for key, where in keys.items() if key not in known)


def main() -> int:
    keys = said()
    found = [f"{name}: {line}" for name in LANGUAGES if name != ENGLISH for line in problems(keys, parts(name))]
    print("\n".join(found) if found else f"{len(keys)} templates, all of them in every catalogue")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
