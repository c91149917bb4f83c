"""Write the defaults of Transformers' configuration classes, as far as the forward reads them.

    python -m tools.hf_defaults

A config.json holds what differs from them, more or less: which keys it has depends on the version that wrote it.
``quantscope/data/hf_defaults.json`` ships in the package; a test fails when the installed Transformers says otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from quantscope.arch.hf_keys import READ
from quantscope.arch.names import HF_TYPES

OTHER_SIZES = {"hidden_size": 48, "num_attention_heads": 6}  # what changes with them is made from them
PATH = Path(__file__).resolve().parent.parent / "quantscope" / "data" / "hf_defaults.json"


def defaults_of(model_type: str) -> dict[str, Any]:
    """Key → value of the keys that are read and have one, whatever the sizes; RoPE in the form that has a key for each number."""
    found, other = _values(model_type), _values(model_type, **OTHER_SIZES)
    rope = found.pop("rope_parameters", None) or {}
    fixed = (key for key in sorted(READ) if found.get(key) is not None and (found[key] == other[key] or key == "num_attention_heads"))
    return {key: found[key] for key in fixed} | (_rope(rope) if rope else {})


def _values(model_type: str, **sizes: int) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(CONFIG_MAPPING[model_type](**sizes).to_json_string(use_diff=False))
    return values


def _rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    if "full_attention" in rope:
        return {"rope_theta": rope["full_attention"]["rope_theta"], "rope_local_base_freq": rope["sliding_attention"]["rope_theta"]}
    flat = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    return flat if rope.get("rope_type", "default") == "default" else flat | {"rope_scaling": rope}


def hf_defaults() -> dict[str, dict[str, Any]]:
    return {model_type: defaults_of(model_type) for model_type in HF_TYPES}


def text() -> str:
    """One line a type."""
    lines = (f" {json.dumps(name)}: {json.dumps(values)}" for name, values in hf_defaults().items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main() -> None:
    PATH.write_text(text(), "utf-8")


if __name__ == "__main__":
    main()
