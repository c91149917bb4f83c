"""Activation rounding that changes the token, in the real llama.cpp: the engine's token is the emulated one, and the verdict says why."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantscope.diagnose.activation_rounding import activation_rounding
from quantscope.diagnose.attribution import sentences, split_logits, verdict
from quantscope.engines.llama_session import LlamaSession
from quantscope.model.forward import forward
from quantscope.model.ggml_arithmetic import ggml_arithmetic
from quantscope.sources.resolve import open_source
from quantscope.weights import Weights
from tests.huge_channel import CASES, CHANNEL, TAP, make_huge_channel
from tests.oracle.llama_quant import quantized_types


@pytest.mark.parametrize(("seed", "ids"), CASES)
def test_llama_cpp_gives_the_changed_token(tmp_path: Path, seed: int, ids: tuple[int, ...]) -> None:
    original, path = make_huge_channel(tmp_path / "m.gguf", seed), tmp_path / "q4_k_m.gguf"
    types = quantized_types(original, path, "Q4_K_M")
    assert types is not None
    assert {types[f"blk.1.ffn_{x}.weight"].name for x in ("gate", "up")} == {"Q4_K"}
    with LlamaSession(path, kv="F16") as llama:
        engine = torch.from_numpy(llama.decode(ids))
    weights, tokens = Weights(open_source(path)), torch.tensor([ids])
    exact, expected = (forward(tokens, weights, **m)[0] for m in ({}, {"arithmetic": ggml_arithmetic("F16")}))  # type: ignore[arg-type]
    split, rounding = split_logits(exact, expected, engine), activation_rounding(weights, tokens)
    assert rounding is not None
    assert int(engine[-1].argmax()) == rounding.rounded_token != rounding.exact_token
    assert (rounding.places, rounding.channels[0].index) == ((TAP,), CHANNEL)
    assert verdict(split, rounding) == "activation rounding"
    assert f"channel {CHANNEL} of {TAP}" in sentences(split, rounding)[-1].lower()


def test_llama_cpp_keeps_the_token_with_blocks_of_32(tmp_path: Path) -> None:
    """The same model in Q8_0: the huge channel takes 31 others with it, not 255."""
    seed, ids = CASES[0]
    path = tmp_path / "q8_0.gguf"
    assert quantized_types(make_huge_channel(tmp_path / "m.gguf", seed), path, "Q8_0") is not None
    with LlamaSession(path, kv="F16") as llama:
        engine = llama.decode(ids)
    exact = forward(torch.tensor([ids]), Weights(open_source(path)))[0]
    assert int(engine[-1].argmax()) == int(exact[-1].argmax())
