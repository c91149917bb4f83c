"""The reference forward against the real llama.cpp: every tap, F32 weights, F32 KV cache, no flash attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantscope.engines.llama_session import LlamaSession
from quantscope.metrics import nmse
from quantscope.model.forward import forward
from quantscope.model.generate import generate
from quantscope.model.taps import USUAL_TAPS, Recorder, tap_names
from quantscope.sources.resolve import open_source
from quantscope.weights import Weights
from tests.models import LINEARS, STORIES, STORIES_PROMPT, STORIES_TEXT, make_gguf

MAX_NMSE = 1e-10
N_TOKENS = 48


def scaling(arch: str, kind: str, **more: float) -> dict[str, Any]:
    keys = {"type": kind, "factor": 4.0} | more
    return {"metadata": {f"{arch}.rope.scaling.{key}": value for key, value in keys.items()}}


CASES: dict[str, dict[str, Any]] = {
    "llama, gqa": {},
    "llama, mha": {"n_head_kv": 4},
    "llama, one kv head, wide": {"n_head_kv": 1, "head_dim": 32},
    "llama, tied": {"tied": True},
    "llama, all biases and scales": {"biases": LINEARS, "scales": LINEARS},
    "llama, some biases": {"biases": ("attn_q", "ffn_down")},
    "llama, theta": {"metadata": {"llama.rope.freq_base": 500000.0}},
    "llama, linear": scaling("llama", "linear"),
    "llama, linear, old key": {"metadata": {"llama.rope.scale_linear": 2.0}},
    "llama, scaling none": scaling("llama", "none"),
    "llama, rope_freqs": {"rope_freqs": (1, 1, 1, 1.5, 2.5, 4, 8, 8)},
    "llama, yarn": scaling("llama", "yarn", original_context_length=32),
    "llama, yarn, ramp from pair 2": scaling("llama", "yarn", original_context_length=4096),
    "llama, yarn, attn_factor": scaling("llama", "yarn", original_context_length=32, attn_factor=0.8),
    "llama, linear, attn_factor": scaling("llama", "linear", attn_factor=0.8),
    "qwen2": {"arch": "qwen2"},
    "qwen2, tied": {"arch": "qwen2", "tied": True},
    "qwen2, yarn": {"arch": "qwen2"} | scaling("qwen2", "yarn", original_context_length=32),
    "qwen3": {"arch": "qwen3"},
    "qwen3, wide, attention scales": {"arch": "qwen3", "head_dim": 32, "scales": ("attn_q", "attn_output", "ffn_gate", "ffn_down")},
    "qwen3, linear": {"arch": "qwen3"} | scaling("qwen3", "linear"),
}


def tap_errors(path: Path, ids: list[int]) -> dict[str, float]:
    """NMSE of every tap; both programs must have the same taps."""
    with LlamaSession(path) as llama:
        theirs, logits = llama.taps(ids)
        assert np.array_equal(llama.decode(ids), logits)  # observing every node changes nothing
    recorder, weights = Recorder(), Weights(open_source(path))
    forward(torch.tensor([ids]), weights, recorder)
    assert set(theirs) == set(recorder.taps)
    optional = {f"{name}-{i}" for name in ("Qcur_normed", "Kcur_normed") for i in range(weights.config.n_layer)}
    assert set(theirs) >= set(tap_names(weights.config.n_layer)) - optional
    assert len(theirs) >= (len(USUAL_TAPS) - 2) * weights.config.n_layer
    return {name: float(nmse(torch.from_numpy(x).flatten(), recorder.taps[name][0].flatten())) for name, x in theirs.items()}


def assert_within(errors: dict[str, float]) -> None:
    assert max(errors.values()) <= MAX_NMSE, {name: f"{e:.1e}" for name, e in errors.items() if e > MAX_NMSE}
    assert max(errors.values()) > 0  # two programs of different order of summation: all zero means the comparison is empty


def random_ids(n: int, n_vocab: int) -> list[int]:
    return np.random.default_rng(7).integers(0, n_vocab, n).tolist()


@pytest.mark.parametrize("case", CASES)
def test_every_tap_equals_llama_cpp(case: str, tmp_path: Path) -> None:
    path = make_gguf(tmp_path / "m.gguf", seed=len(case), **CASES[case])
    assert_within(tap_errors(path, random_ids(N_TOKENS, 288)))


@pytest.mark.parametrize("n_tokens", [1, 5, 512])
def test_a_trained_model_equals_llama_cpp(n_tokens: int) -> None:
    assert_within(tap_errors(STORIES, [*STORIES_PROMPT, *random_ids(512, 512)][:n_tokens]))


def test_greedy_text_of_a_trained_model() -> None:
    """The continuation that llama.cpp gives; one token a step over our cache, all at once in llama.cpp."""
    weights = Weights(open_source(STORIES), keep=True)
    new = generate(STORIES_PROMPT, weights, 40)
    pieces = weights.source.metadata["tokenizer.ggml.tokens"]
    assert "".join(pieces[i] for i in new).replace("▁", " ") == STORIES_TEXT
    with LlamaSession(STORIES) as llama:
        theirs = llama.decode([*STORIES_PROMPT, *new])
    assert theirs[len(STORIES_PROMPT) - 1 : -1].argmax(-1).tolist() == new


def test_a_wrong_weight_is_seen(tmp_path: Path) -> None:
    """The oracle can fail: the same comparison with one value of one weight changed in one of the two files."""
    good = make_gguf(tmp_path / "good.gguf")
    source = open_source(good)
    down = Weights(source).get("blk.1.ffn_down.weight").numpy().copy()
    down[3, 5] += 0.01
    bad = make_gguf(tmp_path / "bad.gguf", edit={"blk.1.ffn_down.weight": down})
    ids = random_ids(N_TOKENS, 288)
    with LlamaSession(good) as llama:
        theirs, _ = llama.taps(ids)
    recorder = Recorder()
    forward(torch.tensor([ids]), Weights(open_source(bad)), recorder)
    errors = {n: float(nmse(torch.from_numpy(x).flatten(), recorder.taps[n][0].flatten())) for n, x in theirs.items()}
    assert errors["ffn_swiglu-1"] <= MAX_NMSE < errors["ffn_out-1"]
