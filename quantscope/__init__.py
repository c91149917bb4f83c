"""quantscope: why a quantized language model's output differs, layer by layer."""

from __future__ import annotations

__version__ = "0.1.0"
