"""Latent attention beside the real llama.cpp: its roundings, its steps over the cache, and planted errors in it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch

from quantscope.engines.llama_session import LlamaSession
from quantscope.model.forward import KVCache, forward
from quantscope.model.ggml_arithmetic import ggml_arithmetic
from quantscope.qtypes import KVType
from quantscope.sources.resolve import open_source
from quantscope.weights import Weights
from tests.arch_models import make_arch
from tests.oracle.ggml_cpu import SAME_ORDER
from tests.oracle.llama_quant import quantized_types
from tests.oracle.test_arithmetic import MAX_NMSE, next_logits, nmse, traces

BY_HEAD, IN_ONE = "deepseek2-wide", "deepseek2-wide-one-matrix"
PRESETS = ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q4_K_M", "Q4_0")


@cache
def _folder() -> TemporaryDirectory[str]:
    return TemporaryDirectory(prefix="quantscope-latent-")


@cache
def model(case: str, preset: str = "F32") -> Path:
    """The random model of a case as llama-quantize stores it."""
    path = Path(_folder().name) / f"{case}-{preset}.gguf"
    if preset == "F32":
        return make_arch(path, case)
    assert quantized_types(model(case), path, preset) is not None
    return path


def ids_of(n: int) -> list[int]:
    return np.random.default_rng(7).integers(0, 288, n).tolist()


@pytest.mark.parametrize("kv", ["F16", "F32"])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("case", [BY_HEAD, IN_ONE])
def test_every_tap_of_a_model(case: str, preset: str, kv: KVType) -> None:
    """Bit for bit where the order of summation is the same; elsewhere what attends agrees to it, from inputs that agree to it."""
    theirs, ours, exact = traces_of(model(case, preset), ids_of(40), kv)
    if SAME_ORDER:
        assert [name for name in theirs if not np.array_equal(theirs[name], ours[name])] == []
    keys = "Kcur_latent-0" if case == BY_HEAD else "Kcur-0"
    assert nmse(theirs[keys], ours[keys]) <= MAX_NMSE
    if (preset, kv) != ("F32", "F32"):
        assert nmse(theirs["kqv_out-0"], ours["kqv_out-0"]) < nmse(theirs["kqv_out-0"], exact["kqv_out-0"]) / 4
        assert nmse(theirs["result_output"], ours["result_output"]) < nmse(theirs["result_output"], exact["result_output"]) * 2


def traces_of(path: Path, ids: list[int], kv: KVType) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """``traces`` of the taps that llama.cpp has; it may do without q, k and v of every head."""
    return traces(path, ids, kv, missing=("Qcur", "Kcur", "Vcur"))


@pytest.mark.parametrize("n_tokens", [1, 2, 5])
@pytest.mark.parametrize("preset", ["F16", "Q8_0", "Q6_K", "Q4_K_M"])
def test_short_prompts(preset: str, n_tokens: int) -> None:
    """Fewer than eight rows go one by one through the matrices of K types, one row through all of them."""
    theirs, ours, exact = traces_of(model(BY_HEAD, preset), ids_of(n_tokens), "F16")
    if SAME_ORDER:
        assert [name for name in theirs if not np.array_equal(theirs[name], ours[name])] == []
    assert nmse(theirs["l_out-0"], ours["l_out-0"]) < nmse(theirs["l_out-0"], exact["l_out-0"]) / 4


@pytest.mark.parametrize("case", [BY_HEAD, IN_ONE])
def test_decoding_step_by_step(case: str) -> None:
    """A prompt, then one token after the other over an F16 cache of latent vectors, or of keys and values."""
    path, ids = model(case, "Q4_K_M"), ids_of(12)
    with LlamaSession(path, kv="F16") as llama:
        theirs = [llama.decode(ids[:9]), *(next_logits(llama, ids[t], t) for t in range(9, 12))]
    weights, held, arithmetic = Weights(open_source(path)), KVCache(), ggml_arithmetic("F16")
    parts = [ids[:9], *([token] for token in ids[9:])]
    ours = [forward(torch.tensor([part]), weights, cache=held, arithmetic=arithmetic)[0].numpy() for part in parts]
    for a, b in zip(theirs, ours, strict=True):
        if SAME_ORDER:
            assert np.array_equal(a, b)
        assert nmse(a, b) < 1e-3
