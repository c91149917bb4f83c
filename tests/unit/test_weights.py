"""Canonical tensors: shapes, order, laziness, and what is wrong with a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from quantscope.arch import names
from quantscope.errors import MissingTensorError, NonFiniteError, ShapeError, UnsupportedTypeError
from quantscope.sources.base import Bytes
from quantscope.sources.resolve import open_source
from quantscope.weights import Weights, interleave_rows
from tests.models import LINEARS, STORIES, make_gguf


def weights(tmp_path: Path, **model: Any) -> Weights:
    return Weights(open_source(make_gguf(tmp_path / "m.gguf", **model)))


def hf_folder(folder: Path, source: Weights, **config: Any) -> Path:
    """The tensors of a GGUF model as a Hugging Face folder, under their HF names, rows as they are."""
    c = source.config
    folder.mkdir()
    flags = {"tie_word_embeddings": c.tied, "max_position_embeddings": c.n_ctx, "rms_norm_eps": c.norm_eps}
    sizes = {"hidden_size": c.n_embd, "intermediate_size": c.n_ff, "num_hidden_layers": c.n_layer, "num_attention_heads": c.n_head}
    text = json.dumps({"model_type": c.arch, "num_key_value_heads": c.n_head_kv, "head_dim": c.head_dim} | flags | sizes | config)
    (folder / "config.json").write_text(text, "utf-8")
    save_file({str(names.to_hf(n)): source.get(n).numpy() for n in source.names()}, folder / "model.safetensors")
    return folder


def test_names_and_shapes(tmp_path: Path) -> None:
    w = weights(tmp_path, n_layer=2, biases=LINEARS, scales=("attn_q",), rope_freqs=[1.0] * 8)
    assert len(w.names()) == 3 + 1 + 2 * (2 + 7 + 7 + 1)
    assert w.names()[0] == "token_embd.weight"
    assert all(w.get(name).shape == w.shape(name) for name in w.names())
    assert all(w.get(name).dtype == torch.float32 for name in w.names())
    assert w.unused == ()


def test_layer_holds_local_names(tmp_path: Path) -> None:
    w = weights(tmp_path, arch="qwen3")
    layer = w.layer(1)
    assert {"attn_q_norm.weight", "attn_k_norm.weight", "ffn_down.weight"} <= set(layer)
    assert len(layer) == 11
    assert torch.equal(layer["attn_q.weight"], w.get("blk.1.attn_q.weight"))


def test_tied_head_is_the_embedding(tmp_path: Path) -> None:
    w = weights(tmp_path, tied=True)
    assert "output.weight" not in w.names()
    assert torch.equal(w.top()["output.weight"], w.get("token_embd.weight"))


def test_rows_are_rows_of_get(tmp_path: Path) -> None:
    w = weights(tmp_path, dtype="F16")
    ids = torch.tensor([[3, 3, 200], [0, 287, 1]])
    assert torch.equal(w.rows("token_embd.weight", ids), w.get("token_embd.weight")[ids])
    kept = Weights(w.source, keep=True)
    assert torch.equal(kept.rows("token_embd.weight", ids), w.get("token_embd.weight")[ids])


def test_only_what_is_asked_for_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    w = weights(tmp_path)
    read, raw = [], w.source.raw

    def counted(name: str) -> Bytes:
        read.append(name)
        return raw(name)

    monkeypatch.setattr(w.source, "raw", counted)
    layer = w.layer(1)
    assert not read  # a tensor is read when it is asked for
    assert "attn_q.weight" in layer
    assert "attn_q.bias" not in layer
    assert not read
    dict(layer)
    assert len(read) == 9
    assert {name.split(".")[1] for name in read} == {"1"}
    dict(layer)
    assert len(read) == 18  # nothing is held
    kept = Weights(w.source, keep=True)
    dict(kept.layer(1)), dict(kept.layer(1))
    assert len(read) == 27


def test_bands_are_rows_of_get(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    w = weights(tmp_path, dtype="Q8_0")
    whole = w.get("output.weight")
    monkeypatch.setattr(w, "get", None)  # a band does not decode the whole
    assert torch.equal(w.band("output.weight", slice(100, 180)), whole[100:180])
    assert torch.equal(w.top(slice(30, 31))["output.weight"], whole[30:31])


def test_a_band_with_nan_is_named_by_its_row(tmp_path: Path) -> None:
    table = np.ones((288, 64), np.float32)
    table[200, 9] = np.nan
    w = weights(tmp_path, edit={"output.weight": table})
    w.band("output.weight", slice(0, 200))
    with pytest.raises(NonFiniteError, match=r"output\.weight' holds nan at index \[200, 9\]"):
        w.band("output.weight", slice(192, 208))


def test_unused_tensors_are_reported(tmp_path: Path) -> None:
    extra = {f"blk.{i}.attn_sinks.weight": np.ones(4, np.float32) for i in (0, 1)}
    assert weights(tmp_path, edit=extra).unused == tuple(extra)
    assert weights(tmp_path, arch="qwen2", rope_freqs=[1.0] * 8).unused == ("rope_freqs.weight",)


@pytest.mark.parametrize("name", ["blk.1.ffn_up.weight", "output_norm.weight", "blk.0.attn_norm.weight"])
def test_missing_tensor_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(MissingTensorError, match=f"there is no tensor '{name}'"):
        weights(tmp_path, edit={name: None})


def test_missing_bias_of_qwen2(tmp_path: Path) -> None:
    with pytest.raises(MissingTensorError, match=r"blk\.0\.attn_k\.bias"):
        weights(tmp_path, arch="qwen2", edit={"blk.0.attn_k.bias": None})


def test_absurd_layer_count_fails_at_the_first_missing_layer(tmp_path: Path) -> None:
    with pytest.raises(MissingTensorError, match=r"blk\.2\.attn_norm\.weight"):
        weights(tmp_path, metadata={"llama.block_count": 4_000_000_000})


def test_wrong_shape_gives_both(tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match=r"'blk\.0\.attn_k\.weight' has the shape \[32, 64\], expected \[64, 64\]"):
        weights(tmp_path, metadata={"llama.attention.head_count_kv": 4})


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedTypeError, match=r"'blk\.0\.ffn_up\.weight' has the type I32"):
        weights(tmp_path, edit={"blk.0.ffn_up.weight": np.ones((96, 64), np.int32)})


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_weight_is_named_with_its_index(bad: float, tmp_path: Path) -> None:
    up = np.ones((96, 64), np.float32)
    up[17, 5] = up[90, 3] = bad
    w = weights(tmp_path, edit={"blk.1.ffn_up.weight": up})
    dict(w.layer(0))
    with pytest.raises(NonFiniteError, match=rf"'blk\.1\.ffn_up\.weight' holds {bad} at index \[17, 5\] \(2 of 6,144"):
        dict(w.layer(1))


def test_non_finite_embedding_row(tmp_path: Path) -> None:
    table = np.ones((288, 64), np.float32)
    table[200, 9] = np.nan
    w = weights(tmp_path, edit={"token_embd.weight": table})
    w.rows("token_embd.weight", torch.tensor([1, 2]))
    with pytest.raises(NonFiniteError, match=r"token_embd\.weight' holds nan at index \[200, 9\] \(1 of 128"):
        w.rows("token_embd.weight", torch.tensor([1, 200]))


def test_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(MissingTensorError, match=r"there is no tensor 'blk\.0\.attn_z\.weight'"):
        weights(tmp_path).get("blk.0.attn_z.weight")


def test_stored_type_and_own_name(tmp_path: Path) -> None:
    assert weights(tmp_path, dtype="Q8_0").stored("blk.0.attn_q.weight").qtype.name == "Q8_0"
    hf = Weights(open_source(hf_folder(tmp_path / "hf", weights(tmp_path))))
    assert hf.stored("blk.0.attn_q.weight").name == "model.layers.0.self_attn.q_proj.weight"


# --- Hugging Face folders ---


def test_llama_q_and_k_are_interleaved_and_nothing_else(tmp_path: Path) -> None:
    gguf = weights(tmp_path, biases=("attn_q", "attn_k", "attn_v", "attn_output"))
    hf = Weights(open_source(hf_folder(tmp_path / "hf", gguf, attention_bias=True)))
    for name in gguf.names():
        same = torch.equal(hf.get(name), gguf.get(name))
        assert same == (name.split(".")[-2] not in ("attn_q", "attn_k")), name
    head = gguf.get("blk.0.attn_k.weight")[16:32]  # second head, D = 16
    assert torch.equal(hf.get("blk.0.attn_k.weight")[16:32:2], head[:8])
    assert torch.equal(hf.get("blk.0.attn_k.weight")[17:32:2], head[8:])
    ids = torch.tensor([5, 0, 31])
    assert torch.equal(hf.rows("blk.0.attn_k.weight", ids), hf.get("blk.0.attn_k.weight")[ids])


@pytest.mark.parametrize("arch", ["qwen2", "qwen3"])
def test_qwen_keeps_its_order(arch: str, tmp_path: Path) -> None:
    gguf = weights(tmp_path, arch=arch)
    hf = Weights(open_source(hf_folder(tmp_path / "hf", gguf)))
    assert all(torch.equal(hf.get(name), gguf.get(name)) for name in gguf.names())


def test_biases_follow_the_flags(tmp_path: Path) -> None:
    gguf = weights(tmp_path, biases=("attn_q", "attn_k", "attn_v", "attn_output"))
    off = Weights(open_source(hf_folder(tmp_path / "off", gguf)))
    assert len(off.unused) == 8  # Transformers does not read them either
    assert "blk.0.attn_q.bias" not in off.names()
    with pytest.raises(MissingTensorError, match=r"mlp\.gate_proj\.bias"):
        Weights(open_source(hf_folder(tmp_path / "on", gguf, attention_bias=True, mlp_bias=True)))


def test_untied_folder_needs_its_head(tmp_path: Path) -> None:
    gguf = weights(tmp_path, tied=True)
    with pytest.raises(MissingTensorError, match=r"lm_head\.weight"):
        Weights(open_source(hf_folder(tmp_path / "hf", gguf, tie_word_embeddings=False)))


def test_stored_head_of_a_tied_model_is_unused(tmp_path: Path) -> None:
    hf = Weights(open_source(hf_folder(tmp_path / "hf", weights(tmp_path), tie_word_embeddings=True)))
    assert hf.unused == ("lm_head.weight",)


def test_llama3_factors_are_made(tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    folder = hf_folder(tmp_path / "hf", weights(tmp_path), rope_scaling=scaling | {"original_max_position_embeddings": 64})
    factors = Weights(open_source(folder)).rope_factors()
    assert factors is not None
    assert factors[0] == 1  # turns fastest: untouched
    assert factors[-1] == 8  # slowest
    assert ((factors >= 1) & (factors <= 8)).all()
    assert ((factors > 1) & (factors < 8)).any()


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**31))
def test_interleave_rows_is_a_permutation(n_head: int, half: int, seed: int) -> None:
    w = torch.randn(n_head * 2 * half, 3, generator=torch.Generator().manual_seed(seed))
    out = interleave_rows(w, n_head).reshape(n_head, half, 2, 3)
    assert torch.equal(out.transpose(1, 2).reshape(w.shape), w)


def test_trained_model_loads() -> None:
    w = Weights(open_source(STORIES))
    assert len(w.names()) == 47
    assert w.unused == ()
    assert w.config.tied
