"""Metadata → ModelConfig, from GGUF keys and from config.json."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from quantscope.arch import names
from quantscope.arch.config import Llama3Scaling, ModelConfig
from quantscope.arch.gguf_keys import HARMLESS, REFUSED, SECTIONS
from quantscope.arch.read import read_config
from quantscope.arch.table import ARCHS
from quantscope.errors import (
    CorruptFileError,
    MissingTensorError,
    UnsupportedArchitectureError,
    UnsupportedFeatureError,
)
from quantscope.model.rope import yarn_ramp
from quantscope.sources.resolve import open_source
from tests.models import make_gguf
from tools import arch_table


def gguf_config(tmp_path: Path, metadata: dict[str, Any] | None = None, **shape: Any) -> ModelConfig:
    return read_config(open_source(make_gguf(tmp_path / "m.gguf", n_layer=1, metadata=metadata, **shape)))


def hf_config(
    folder: Path, remove: tuple[str, ...] = (), tensors: tuple[str, ...] = ("model.embed_tokens.weight",), **config: Any
) -> ModelConfig:
    base = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in (base | config).items() if k not in remove}), "utf-8")
    save_file({name: np.zeros((300, 64), np.float32) for name in tensors}, folder / "model.safetensors")
    return read_config(open_source(folder))


# --- GGUF ---


def test_the_table_in_the_docs_is_fresh() -> None:
    """After a new row: ``python -m benchmarks.architectures && python -m tools.arch_table``."""
    assert arch_table.FILE.read_text(encoding="utf-8") == arch_table.table()
    found = json.loads(arch_table.FIGURES.read_text("utf-8"))
    assert set(found["llama_cpp_exact"]) == set(found["llama_cpp_emulated"]) == set(ARCHS)
    assert set(found["transformers_exact"]) == set(names.HF_TYPES)


def test_gguf_sizes(tmp_path: Path) -> None:
    c = gguf_config(tmp_path, n_embd=48, n_head=6, n_head_kv=3, head_dim=16, n_ff=80, n_vocab=300, n_ctx=77)
    assert (c.arch, c.n_layer, c.n_embd, c.n_head, c.n_head_kv, c.head_dim, c.n_ff, c.n_vocab, c.n_ctx) == (
        "llama", 1, 48, 6, 3, 16, 80, 300, 77,
    )  # fmt: skip
    assert c.n_group == 2
    assert c.norm_eps == float(np.float32(1e-5))
    assert c.kq_scale == 0.25
    assert not c.tied
    assert (c.rope.theta, c.rope.dim, c.rope.layout, c.rope.scaling, c.rope.magnitude) == (10000.0, 16, "interleaved", "none", 1.0)
    assert [c.axis(a) for a in "EFVDQKR1"] == [48, 80, 300, 16, 96, 48, 8, 1]


def test_gguf_optional_keys(tmp_path: Path) -> None:
    c = gguf_config(tmp_path, {"llama.attention.scale": 0.5, "llama.rope.dimension_count": 8, "llama.rope.freq_base": 5e5}, tied=True)
    assert (c.kq_scale, c.rope.dim, c.rope.theta, c.tied) == (0.5, 8, 5e5, True)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_layout_is_the_architectures(arch: str, tmp_path: Path) -> None:
    assert gguf_config(tmp_path, arch=arch).rope.layout == ("interleaved" if arch == "llama" else "half")


@pytest.mark.parametrize(
    ("keys", "scaling", "factor", "magnitude"),
    [
        ({"type": "linear", "factor": 4.0}, "linear", 4.0, 1.0),
        ({"type": "linear"}, "none", 1.0, 1.0),
        ({"factor": 2.0}, "linear", 2.0, 1.0),
        ({"type": "none", "factor": 4.0}, "none", 4.0, 1.0),
        ({"type": "linear", "factor": 4.0, "attn_factor": 0.5}, "linear", 4.0, 0.5),
        ({"type": "yarn", "factor": 4.0}, "yarn", 4.0, 0.1 * math.log(4) + 1),
        ({"type": "yarn", "factor": 4.0, "attn_factor": 0.5}, "yarn", 4.0, 0.5 * (0.1 * math.log(4) + 1)),
        ({"type": "yarn", "factor": 4.0, "yarn_attn_factor": 0.75}, "yarn", 4.0, 0.75),
        ({"type": "yarn", "factor": 0.5}, "yarn", 0.5, 1.0),
    ],
)
def test_gguf_rope_scaling(keys: dict[str, Any], scaling: str, factor: float, magnitude: float, tmp_path: Path) -> None:
    rope = gguf_config(tmp_path, {f"llama.rope.scaling.{k}": v for k, v in keys.items()}).rope
    assert (rope.scaling, rope.factor) == (scaling, factor)
    assert rope.magnitude == pytest.approx(magnitude, rel=1e-12)


def test_gguf_yarn_constants(tmp_path: Path) -> None:
    keys = {"type": "yarn", "factor": 4.0, "original_context_length": 32, "yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0}
    rope = gguf_config(tmp_path, {f"llama.rope.scaling.{k}": v for k, v in keys.items()}).rope
    assert (rope.n_ctx_orig, rope.beta_fast, rope.beta_slow) == (32, 16.0, 2.0)


OTHER = {int: 3, float: 2.5, bool: False, str: "gelu"}


@pytest.mark.parametrize("key", [k for k in REFUSED if k not in (*SECTIONS, "expert_count")])
def test_every_refused_key_names_itself(key: str, tmp_path: Path) -> None:
    neutral = REFUSED[key][0]
    value = not neutral if isinstance(neutral, bool) else OTHER[type(neutral)]
    with pytest.raises(UnsupportedFeatureError, match=rf"llama\.{key} is .*expected"):
        gguf_config(tmp_path, {f"llama.{key}": value})


@pytest.mark.parametrize("key", [k for k in REFUSED if k not in SECTIONS])
def test_neutral_values_pass(key: str, tmp_path: Path) -> None:
    assert gguf_config(tmp_path, {f"llama.{key}": REFUSED[key][0]}).ignored_keys == ()


@pytest.mark.parametrize(
    ("metadata", "match"),
    [
        ({"llama.rope.scaling.type": "longrope"}, "rope.scaling.type is 'longrope'"),
        ({"llama.rope.dimension_sections": [8, 4, 4, 0]}, "rope.dimension_sections"),
        ({"llama.attention.value_length": 32}, "attention.value_length is 32, expected 16"),
        ({"llama.attention.head_count": [4, 8]}, "attention.head_count is .*same value for every layer"),
    ],
)
def test_other_unsupported_features(metadata: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFeatureError, match=match):
        gguf_config(tmp_path, metadata)


def test_equal_numbers_for_each_layer_are_one_number(tmp_path: Path) -> None:
    assert gguf_config(tmp_path, {"llama.feed_forward_length": [96, 96]}).n_ff == 96


def test_unknown_keys_are_listed(tmp_path: Path) -> None:
    metadata: dict[str, Any] = {"llama.new_invention": 1.0, "general.author": "x", "llama.vocab_size": 288}
    assert gguf_config(tmp_path, metadata).ignored_keys == ("llama.new_invention",)
    assert "vocab_size" in HARMLESS


@pytest.mark.parametrize(
    ("metadata", "match"),
    [
        ({"llama.attention.head_count_kv": 3}, "4 attention heads do not divide among 3"),
        ({"llama.rope.dimension_count": 7}, "dimension_count is 7, expected an even number"),
        ({"llama.rope.dimension_count": 32}, "dimension_count is 32"),
        ({"llama.block_count": 0}, "block_count is 0, expected a whole number"),
        ({"llama.block_count": "two"}, "block_count is 'two', expected a number"),
        ({"llama.embedding_length": True}, "embedding_length is True, expected a number"),
        ({"llama.rope.freq_base": math.nan}, "freq_base is nan"),
    ],
)
def test_contradicting_headers(metadata: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(CorruptFileError, match=match):
        gguf_config(tmp_path, metadata)


def test_layers_counted_and_layers_there(tmp_path: Path) -> None:
    with pytest.raises(
        MissingTensorError, match=r"'blk\.1\.attn_norm\.weight': llama\.block_count is 2, but the file has tensors of 1 layer"
    ):
        gguf_config(tmp_path, {"llama.block_count": 2})
    one_more: dict[str, Any] = {"blk.1.attn_norm.weight": np.ones(64, np.float32)}
    with pytest.raises(CorruptFileError, match=r"llama\.block_count is 1, but the file has tensors of 2 layers"):
        gguf_config(tmp_path, edit=one_more)
    further: dict[str, Any] = {"llama.block_count": 2, "llama.nextn_predict_layers": 1}  # with its last layer and without
    assert gguf_config(tmp_path, further, edit=one_more).n_layer == gguf_config(tmp_path, further).n_layer == 1


@pytest.mark.parametrize("arch", ["bert", "llama4", "mamba"])
def test_unsupported_architecture_lists_the_supported(arch: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedArchitectureError, match=f"is '{arch}', expected one of llama, qwen2, qwen3"):
        gguf_config(tmp_path, arch=arch)


def test_no_embedding(tmp_path: Path) -> None:
    with pytest.raises(MissingTensorError, match=r"token_embd\.weight"):
        gguf_config(tmp_path, edit={"token_embd.weight": None})


# --- config.json ---


def test_hf_sizes(tmp_path: Path) -> None:
    c = hf_config(tmp_path)
    assert (c.arch, c.n_layer, c.n_embd, c.n_head, c.n_head_kv, c.head_dim, c.n_ff, c.n_vocab, c.n_ctx) == (
        "llama", 2, 64, 4, 2, 16, 96, 300, 512,
    )  # fmt: skip
    assert c.norm_eps == float(np.float32(1e-6))  # as a GGUF file stores it
    assert c.biases == frozenset()
    assert not c.tied


def test_hf_explicit_head_dim_and_flags(tmp_path: Path) -> None:
    c = hf_config(tmp_path, head_dim=32, attention_bias=True, tie_word_embeddings=True, remove=("num_key_value_heads",))
    assert (c.head_dim, c.kq_scale, c.rope.dim, c.n_head_kv, c.tied) == (32, 32**-0.5, 32, 4, True)
    assert c.biases == {"attention_bias"}


@pytest.mark.parametrize(
    "config",
    [
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "rope_theta": 5e5},
        {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 5e5},
    ],
)
def test_hf_old_and_new_rope_mean_the_same(config: dict[str, Any], tmp_path: Path) -> None:
    rope = hf_config(tmp_path, **config).rope
    assert (rope.theta, rope.scaling, rope.factor) == (5e5, "linear", 4.0)


@pytest.mark.parametrize("config", [{}, {"rope_scaling": None}, {"rope_theta": 10000.0}, {"rope_parameters": {"rope_type": "default"}}])
def test_hf_plain_rope(config: dict[str, Any], tmp_path: Path) -> None:
    rope = hf_config(tmp_path, **config).rope
    assert (rope.theta, rope.scaling, rope.llama3) == (10000.0, "none", None)


def test_hf_llama3(tmp_path: Path) -> None:
    s = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256}
    assert hf_config(tmp_path, rope_scaling=s, rope_theta=5e5).rope.llama3 == Llama3Scaling(8.0, 1.0, 4.0, 256)
    with pytest.raises(UnsupportedFeatureError, match="rope_type"):
        hf_config(tmp_path, model_type="qwen2", rope_scaling=s)


@pytest.mark.parametrize(
    ("more", "magnitude"),
    [
        ({}, 0.1 * math.log(4) + 1),
        ({"attention_factor": 0.75}, 0.75),
        ({"mscale": 0.8, "mscale_all_dim": 0.5}, (0.08 * math.log(4) + 1) / (0.05 * math.log(4) + 1)),
        ({"mscale": 0.8}, 0.1 * math.log(4) + 1),
    ],
)
def test_hf_yarn_magnitude(more: dict[str, float], magnitude: float, tmp_path: Path) -> None:
    rope = hf_config(tmp_path, rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128} | more).rope
    assert (rope.scaling, rope.factor, rope.n_ctx_orig, rope.beta_fast, rope.beta_slow) == ("yarn", 4.0, 128, 32.0, 1.0)
    assert rope.magnitude == pytest.approx(magnitude, rel=1e-12)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"hidden_act": "gelu"}, "'hidden_act' is 'gelu', expected 'silu'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_parameters.rope_type"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 8}}, "rope_parameters.rope_type"),
        ({"alibi": True}, "'alibi' is 'True', expected False"),
    ],
)
def test_hf_refuses_by_name(config: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFeatureError, match=match):
        hf_config(tmp_path, **config)


def test_hf_ends_of_yarns_ramp(tmp_path: Path) -> None:
    """gpt-oss ramps between fractions of pairs; ggml always between whole ones."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    whole, fractions = (hf_config(tmp_path, rope_scaling=yarn | more).rope for more in ({}, {"truncate": False}))
    assert (whole.truncate, fractions.truncate) == (True, False)
    assert not torch.equal(yarn_ramp(whole), yarn_ramp(fractions))


@pytest.mark.parametrize("config", [{"sliding_window": None}, {"sliding_window": 512}, {"sliding_window": 8, "use_sliding_window": False}])
def test_hf_window_that_hides_nothing(config: dict[str, Any], tmp_path: Path) -> None:
    assert hf_config(tmp_path, **config).n_ctx == 512


def test_hf_window_that_a_gguf_file_lacks_bounds_the_context(tmp_path: Path) -> None:
    found = hf_config(tmp_path, sliding_window=128)
    assert (found.n_ctx, found.window, found.window_layers) == (128, 0, ())


def test_hf_unsupported_or_missing_type(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedArchitectureError, match="is 't5', expected one of llama, mistral, ministral3, mixtral, qwen2, qwen3"):
        hf_config(tmp_path, model_type="t5")
    with pytest.raises(UnsupportedArchitectureError, match=r"\(model_type\) is missing"):
        hf_config(tmp_path, remove=("model_type",))


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "intermediate_size"])
def test_hf_missing_key_is_named(key: str, tmp_path: Path) -> None:
    with pytest.raises(CorruptFileError, match=f"'{key}' is missing, expected a number"):
        hf_config(tmp_path, remove=(key,))


def test_hf_missing_key_means_what_transformers_takes(tmp_path: Path) -> None:
    assert hf_config(tmp_path, remove=("max_position_embeddings",)).n_ctx == 2048


def test_hf_contradictions(tmp_path: Path) -> None:
    with pytest.raises(CorruptFileError, match="4 attention heads do not divide among 3"):
        hf_config(tmp_path, num_key_value_heads=3)
    with pytest.raises(CorruptFileError, match="'head_dim' is 0"):
        hf_config(tmp_path, num_attention_heads=128)


def test_hf_no_embedding(tmp_path: Path) -> None:
    with pytest.raises(MissingTensorError, match=r"model\.embed_tokens\.weight"):
        hf_config(tmp_path, tensors=("model.norm.weight",))


# --- names ---


@given(st.integers(0, 999), st.sampled_from([*names.LAYER, *names.TOP]), st.sampled_from(["weight", "bias"]))
def test_names_go_both_ways(layer: int, stem: str, kind: str) -> None:
    gguf = f"{stem}.{kind}" if stem in names.TOP else f"blk.{layer}.{stem}.{kind}"
    hf = names.to_hf(gguf)
    assert hf is not None
    assert names.to_gguf(hf) == gguf


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.x.mlp.up_proj.weight", "weight", ""])
def test_names_without_counterpart(name: str) -> None:
    assert names.to_gguf(name) is None
    assert names.to_hf(name) is None
