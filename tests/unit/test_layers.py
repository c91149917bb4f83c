"""The layer check finds what it must, and the package passes it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tools.check_imports import LAYERS, violations

ROOT = Path(__file__).resolve().parents[2]


def test_package_imports_point_upward() -> None:
    assert violations(ROOT) == []


def test_downward_relative_and_unlisted_imports_are_found(tmp_path: Path) -> None:
    package = tmp_path / "quantscope"
    package.mkdir()
    (package / "errors.py").write_text("def f():\n    from quantscope import cli\n")
    (package / "metrics.py").write_text("from .errors import X\n")
    (package / "stray.py").write_text("")
    found = "\n".join(violations(tmp_path))
    assert "errors imports cli" in found
    assert "relative import" in found
    assert "stray" in found


def test_every_module_is_in_a_layer() -> None:
    names = {p.stem for p in (ROOT / "quantscope").iterdir() if p.suffix == ".py" or (p.is_dir() and any(p.glob("*.py")))}
    assert names - {"__init__", "__main__"} <= set(LAYERS)


def test_importing_the_package_pulls_in_nothing_heavy() -> None:
    code = "import sys, quantscope; print([m for m in ('torch', 'transformers', 'numba', 'gguf') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
