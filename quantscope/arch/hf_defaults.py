"""What a config.json means where it does not say it: the defaults of Transformers' configuration classes.

    hf_defaults("phi")["partial_rotary_factor"]  →  0.5

Which keys a file has depends on the version of Transformers that wrote it.  The data are made by ``python -m tools.hf_defaults``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

PATH = Path(__file__).resolve().parent.parent / "data" / "hf_defaults.json"


def hf_defaults(model_type: object) -> Mapping[str, Any]:
    """Key → value of a ``model_type``; nothing of one that is not known."""
    return _all().get(str(model_type), {})


@cache
def _all() -> Mapping[str, Mapping[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(PATH.read_text("utf-8"))
    return found
