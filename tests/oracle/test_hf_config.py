"""A config.json means what Transformers takes it to mean, whichever version wrote it and whichever keys it lacks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from quantscope.arch.config import ModelConfig
from quantscope.arch.names import names_of, to_hf
from quantscope.arch.read import read_config
from quantscope.errors import QuantscopeError
from quantscope.qtypes import QTYPES
from quantscope.sources.base import RawTensor
from tests.hf_arch_models import CASES

LISTS = ("layer_types", "no_rope_layers", "mlp_layer_types")  # of layers, which older files do not have
N_LAYER = ("num_hidden_layers", "n_layer", "n_layers")


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as Transformers understands it, with every key."""
    values = dict(config)
    made = CONFIG_MAPPING[values.pop("model_type")].from_dict(values)
    found: dict[str, Any] = json.loads(made.to_json_string(use_diff=False))
    return found


def ours(config: Mapping[str, Any]) -> ModelConfig:
    embedding = str(to_hf("token_embd.weight", names_of(config["model_type"])))
    tensors = {embedding: RawTensor(embedding, QTYPES["F32"], (288, 64))}
    return read_config(SimpleNamespace(path=Path("folder"), format="safetensors", metadata=config, tensors=tensors))  # type: ignore[arg-type]


def deep(case: str) -> dict[str, Any]:
    """The config of a case with eight layers, none of them listed."""
    model_type, sizes = CASES[case]
    given = complete({"model_type": model_type, **sizes})
    depth = next(key for key in N_LAYER if key in given)
    return {key: value for key, value in given.items() if key not in LISTS} | {depth: 8}


def lacking(config: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The config without one of its keys, each of them in turn, and without one of those of its rope_parameters."""
    for key in config:
        if key != "model_type":
            yield key, {k: v for k, v in config.items() if k != key}
    rope = config.get("rope_parameters") or {}
    for key in rope:
        yield f"rope_parameters.{key}", {**config, "rope_parameters": {k: v for k, v in rope.items() if k != key}}


@pytest.mark.parametrize("case", CASES)
def test_a_missing_key_means_what_transformers_takes(case: str) -> None:
    """Or it is an error: never another model in silence."""
    config, compared = complete(deep(case)), 0
    for key, less in lacking(config):
        try:
            theirs, found = complete(less), ours(less)
        except (QuantscopeError, StrictDataclassError, ValueError, KeyError, TypeError, AttributeError):
            continue  # refused here or there
        try:
            expected = ours(theirs)
        except QuantscopeError:
            raise AssertionError(f"{key} missing: read here, but Transformers has {theirs.get(key)!r}, which is refused") from None
        assert found == expected, f"{key} missing, Transformers takes {theirs.get(key)!r}"
        compared += 1
    assert compared > 15


@pytest.mark.parametrize("case", CASES)
def test_lists_of_layers_are_made_as_transformers_makes_them(case: str) -> None:
    config = deep(case)
    assert ours(config) == ours(complete(config))


def older(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same as Transformers 4 wrote it: the base and the part of the channels that turn are keys of their own."""
    values = dict(config)
    rope = values.pop("rope_parameters", None) or {}
    full = rope.get("full_attention", rope)
    values |= {key: full[key] for key in ("rope_theta", "partial_rotary_factor") if key in full}
    if "sliding_attention" in rope and config["model_type"].startswith("gemma3"):
        values["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    if full.get("rope_type", "default") != "default":
        values["rope_scaling"] = {key: value for key, value in full.items() if key not in ("rope_theta", "partial_rotary_factor")}
    return values


@pytest.mark.parametrize("case", CASES)
def test_the_form_of_transformers_4(case: str) -> None:
    config = older(complete(deep(case)))
    assert "rope_parameters" not in config
    assert ours(config) == ours(complete(config)) == ours(complete(deep(case)))


def test_published_configs() -> None:
    """Gemma 3 1B, Pythia and BLOOM as they lie on the hub: a pattern for a list, and older names."""
    gemma = {"model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26} | {
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512, "sliding_window_pattern": 6,
        "rope_theta": 1000000, "rope_local_base_freq": 10000, "rope_scaling": None, "query_pre_attn_scalar": 256,
    }  # fmt: skip
    found = ours(gemma)
    assert [i for i, windowed in enumerate(found.window_layers) if not windowed] == [5, 11, 17, 23]
    assert (found.rope.theta, found.window_rope and found.window_rope.theta) == (1e6, 1e4)
    assert found == ours(complete(gemma))
    pythia = {"model_type": "gpt_neox", "hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 2048} | {
        "rotary_pct": 0.5, "rotary_emb_base": 20000, "layer_norm_eps": 1e-5, "hidden_act": "gelu",
    }  # fmt: skip
    assert (ours(pythia).rope.dim, ours(pythia).rope.theta) == (32, 20000.0)
    assert ours(pythia) == ours(complete(pythia))
    bloom = {"model_type": "bloom", "n_embed": 64, "num_attention_heads": 4, "n_layer": 2, "layer_norm_epsilon": 1e-5}
    assert ours(bloom).n_embd == 64
    assert ours(bloom) == ours(complete(bloom))
