"""Check that imports inside the package only point upward in the layer list of the architecture.

    python -m tools.check_imports

A module may import modules of its own layer and of any layer above it in LAYERS, nothing below.  Reading order for a
newcomer is therefore the order of this list: file → numbers → forward → trace → compare → diagnose → remedy → report → cli.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

# fmt: off
LAYERS = (
    "errors", "strings", "language", "wording", "phrases", "new_file", "qtypes", "sources", "quants", "recipes", "imatrix",
    "tokenizers", "arch", "weights", "images", "model", "lockstep", "trace", "fingerprint", "trace_file", "metrics", "engines",
    "importers", "logit_kernel", "logit_sums", "top_tokens", "tap_sums", "tap_kernel", "results", "lock", "mismatch", "store",
    "tap_stats", "logit_stats", "monitor", "inputs", "routing", "meters", "plan", "variants", "importance", "rotation", "compare",
    "three_way", "explain", "engine_effects", "kld_base", "golden", "weight_causes", "weight_scales", "weight_compare", "diagnose",
    "remedy", "findings", "stages", "cluster", "passage", "assemble", "study", "frames", "table_files", "report", "api", "cli",
)
# fmt: on
PACKAGE = "quantscope"


def layer_of(module: str) -> str | None:
    """The layer a dotted module belongs to; None for the package's own ``__init__``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def imported_modules(path: Path, module: str) -> list[tuple[int, str]]:
    """(line, dotted module) of every import of the package in a file, also inside functions."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"), str(path))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, a.name) for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module == PACKAGE:
            found += [(node.lineno, f"{PACKAGE}.{a.name}") for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.append((node.lineno, node.module))
        elif isinstance(node, ast.ImportFrom) and node.level:
            found.append((node.lineno, f"{module}: relative import"))
    return [(line, name) for line, name in found if name.split(".")[0].split(":")[0] == PACKAGE or "relative" in name]


def violations(root: Path) -> list[str]:
    """One line per import that points downward, and per module that belongs to no layer."""
    rank = {name: i for i, name in enumerate(LAYERS)}
    out = []
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        own = layer_of(module)
        if own is None or own == "__main__":
            continue
        if own not in rank:
            out.append(f"{path}: module {module} is in no layer; add it to LAYERS in tools/check_imports.py")
            continue
        for line, name in imported_modules(path, module):
            if "relative" in name:
                out.append(f"{path}:{line}: relative import; write it absolute")
                continue
            target = layer_of(name)
            if target in rank and rank[target] > rank[own]:
                out.append(f"{path}:{line}: {own} imports {target}, which is below it")
    return out


def main() -> int:
    found = violations(Path(__file__).resolve().parent.parent)
    print("\n".join(found) if found else "imports point upward only")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
