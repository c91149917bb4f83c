"""Every ``model_type`` of the table of names against Transformers: logits in float32, eager attention, tiny random models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from quantscope.arch.names import HF_TYPES
from quantscope.errors import CorruptFileError, MissingTensorError, PromptError, ShapeError, UnsupportedFeatureError
from quantscope.metrics import nmse
from quantscope.model.forward import forward
from quantscope.sources.resolve import open_source
from quantscope.weights import Weights
from tests.hf_arch_models import CASES, make_hf_arch

MAX_NMSE = 1e-10


def test_every_model_type_has_a_case() -> None:
    assert {model_type for model_type, _ in CASES.values()} == set(HF_TYPES)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    model = make_hf_arch(tmp_path, case)
    ids = torch.from_numpy(np.random.default_rng(3).integers(0, 288, (1, 40)))
    weights = Weights(open_source(tmp_path))
    assert weights.unused == ()
    with torch.no_grad():
        theirs = model(ids).logits
    error = float(nmse(theirs.flatten(), forward(ids, weights).flatten()))
    assert 0 < error <= MAX_NMSE


def edited(folder: Path, **keys: object) -> Weights:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | keys), "utf-8")
    return Weights(open_source(folder))


def test_what_the_table_cannot_express_is_named(tmp_path: Path) -> None:
    make_hf_arch(tmp_path, "phi")
    with pytest.raises(UnsupportedFeatureError, match="'qk_layernorm' is 'True'"):
        edited(tmp_path, qk_layernorm=True)
    with pytest.raises(UnsupportedFeatureError, match="'hidden_act' is 'silu'"):
        edited(tmp_path, qk_layernorm=False, hidden_act="silu")


def test_contradictions_show_both_numbers(tmp_path: Path) -> None:
    make_hf_arch(tmp_path, "mixtral")
    with pytest.raises(CorruptFileError, match="num_experts_per_tok is 9 and num_local_experts is 4"):
        edited(tmp_path, num_experts_per_tok=9)
    with pytest.raises(ShapeError, match=r"'blk\.0\.ffn_gate_inp\.weight' has the shape \[4, 64\], expected \[8, 64\]"):
        edited(tmp_path, num_experts_per_tok=2, num_local_experts=8)


def test_a_missing_expert_is_a_shape_that_differs(tmp_path: Path) -> None:
    make_hf_arch(tmp_path, "qwen3_moe")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ShapeError, match=r"'blk\.1\.ffn_up_exps\.weight' has the shape \[3, 48, 64\], expected \[4, 48, 64\]"):
        Weights(open_source(tmp_path))
    tensors = {name: x for name, x in tensors.items() if ".1.mlp.experts." not in name}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(MissingTensorError, match=r"model\.layers\.1\.mlp\.experts\.0\.down_proj\.weight"):
        Weights(open_source(tmp_path))


@pytest.mark.parametrize("case", ["gpt2", "bloom", "qwen3", "gpt_neox"])
def test_a_model_saved_without_its_head(case: str, tmp_path: Path) -> None:
    """The published GPT-2, BLOOM and Qwen3-Embedding: no ``transformer.`` or ``model.`` before the names."""
    model = make_hf_arch(tmp_path, case)
    if case in ("gpt2", "bloom"):
        model.base_model.save_pretrained(tmp_path)
    else:
        stored = load_file(tmp_path / "model.safetensors")
        save_file({name.removeprefix(f"{model.base_model_prefix}."): x for name, x in stored.items()}, tmp_path / "model.safetensors")
    assert not any(name.startswith(f"{model.base_model_prefix}.") for name in load_file(tmp_path / "model.safetensors"))
    ids, weights = torch.arange(3, 40)[None], Weights(open_source(tmp_path))
    with torch.no_grad():
        theirs = model(ids).logits
    assert float(nmse(theirs.flatten(), forward(ids, weights).flatten())) <= MAX_NMSE


def test_a_window_that_gguf_files_lack_bounds_the_context(tmp_path: Path) -> None:
    """Mistral 7B v0.1: what Transformers computes, as far as its window reaches."""
    model = make_hf_arch(tmp_path, "mistral")
    weights = edited(tmp_path, sliding_window=8)
    model = type(model).from_pretrained(tmp_path, attn_implementation="eager").eval()
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        seen = model(ids[:, :8]).logits
    assert float(nmse(seen.flatten(), forward(ids[:, :8], weights).flatten())) <= MAX_NMSE
    with pytest.raises(PromptError, match="has 10 tokens, expected at most 8"):
        forward(ids, weights)
