"""The same weights as a Hugging Face folder and as the GGUF file that llama.cpp's own converter makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantscope.model.forward import forward
from quantscope.model.taps import Recorder
from quantscope.sources.resolve import open_source
from quantscope.weights import Weights
from tests.hf_models import make_hf
from tests.oracle.converter import convert, sentencepiece_model

N_VOCAB = 320
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied, biases": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama3 rope": ("llama", {"rope_parameters": LLAMA3, "head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1}),
    "llama yarn": ("llama", {"rope_parameters": YARN | {"attention_factor": 0.9}}),
    "qwen2 linear": ("qwen2", {"head_dim": None, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 3.0}}),
    "qwen3": ("qwen3", {"head_dim": 32}),
}


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return sentencepiece_model(tmp_path_factory.mktemp("vocabulary"), N_VOCAB)


@pytest.mark.parametrize("case", CASES)
def test_converted_file_has_the_same_bits(case: str, vocabulary: bytes, tmp_path: Path) -> None:
    arch, config = CASES[case]
    folder, gguf = tmp_path / "hf", tmp_path / "m.gguf"
    make_hf(folder, arch, seed=len(case), vocab_size=N_VOCAB, **config)
    (folder / "tokenizer.model").write_bytes(vocabulary)
    convert(folder, gguf)

    hf, converted = Weights(open_source(folder)), Weights(open_source(gguf))
    assert hf.unused == converted.unused == ()
    assert set(hf.names()) == set(converted.names())
    assert len(hf.names()) > 20
    for name in hf.names():
        assert torch.equal(hf.get(name), converted.get(name)), name

    ids = torch.from_numpy(np.random.default_rng(3).integers(0, N_VOCAB, (1, 40)))
    a, b = Recorder(), Recorder()
    forward(ids, hf, a)
    forward(ids, converted, b)
    assert a.taps.keys() == b.taps.keys()
    assert [name for name in a.taps if not torch.equal(a.taps[name], b.taps[name])] == []
