"""The bundled trained model in several quantizations, as files that llama.cpp itself writes, made once per test run."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from quantscope.cli.demo import MODEL, bundled
from tests.oracle.llama_quant import quantized_types

PRESETS = ("F32", "F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0")


@cache
def _folder() -> TemporaryDirectory[str]:
    return TemporaryDirectory(prefix="quantscope-files-")


@cache
def demo_file(preset: str) -> Path:
    """``demo-PRESET.gguf``; the F16 one is the bundled file."""
    if preset == "F16":
        return bundled(MODEL)
    path = Path(_folder().name) / f"demo-{preset}.gguf"
    assert quantized_types(bundled(MODEL), path, preset) is not None
    return path
