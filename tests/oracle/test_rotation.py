"""The RoPE check on q and k of the real llama.cpp, which is told to rotate otherwise than its file says."""

from __future__ import annotations

from pathlib import Path

import llama_cpp
import numpy as np
import pytest
import torch

from quantscope.arch.read import read_config
from quantscope.engines.llama_session import LlamaSession
from quantscope.model.forward import forward
from quantscope.model.taps import Recorder
from quantscope.rotation import RotationReport, fit_rotation
from quantscope.sources.resolve import open_source
from quantscope.weights import Weights
from tests.models import make_gguf

DEMO = Path(__file__).resolve().parents[2] / "quantscope" / "data" / "demo-f16.gguf"
N_TOKENS = 24
SETTINGS = {
    "as the file says": ({}, "rotated as expected"),
    "theta": ({"rope_freq_base": 500000.0}, "with theta 500,000 instead of 10,000:"),
    "theta, unknown": ({"rope_freq_base": 77000.0}, "with theta 77,000 instead of 10,000:"),
    "linear": ({"rope_freq_scale": 0.25}, "with positions divided by 4 (linear scaling):"),
    "linear, unknown": ({"rope_freq_scale": 0.3}, "with positions times 0.3 (linear scaling by 3.33333):"),
    "both": ({"rope_freq_base": 1000000.0, "rope_freq_scale": 0.5}, "and positions divided by 2 (linear scaling):"),
}


def ids(n_vocab: int) -> list[int]:
    return np.random.default_rng(7).integers(0, n_vocab, N_TOKENS).tolist()


def checked(path: Path, layer: int) -> list[RotationReport]:
    """The check of q and of k in one layer of llama.cpp."""
    config = read_config(open_source(path))
    with LlamaSession(path) as llama:
        taps, _ = llama.taps(ids(config.n_vocab))
    pre = "normed" if config.arch == "qwen3" else "pre"
    reports = []
    for name, n_head in (("Qcur", config.n_head), ("Kcur", config.n_head_kv)):
        before, after = (torch.from_numpy(taps[tap]) for tap in (f"{name}_{pre}-{layer}", f"{name}-{layer}"))
        reports.append(fit_rotation(before, after, n_head, config.rope, range(N_TOKENS)))
    return reports


@pytest.mark.parametrize("name", SETTINGS)
def test_what_llama_cpp_was_told_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, words = SETTINGS[name]
    defaults = llama_cpp.llama_context_default_params

    def told() -> llama_cpp.llama_context_params:
        params = defaults()
        for key, value in options.items():
            setattr(params, key, value)
        return params

    monkeypatch.setattr(llama_cpp, "llama_context_default_params", told)
    for report in checked(DEMO, 3):
        assert words in report.verdict
        assert report.fits[0].nmse < 1e-10
        assert report.as_expected == (not options)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_every_architecture_is_as_expected(arch: str, tmp_path: Path) -> None:
    for report in checked(make_gguf(tmp_path / "m.gguf", arch=arch), 1):
        assert report.as_expected
        assert report.expected_nmse < 1e-10


def test_the_reference_is_as_expected() -> None:
    weights, recorder = Weights(open_source(DEMO)), Recorder()
    config = weights.config
    forward(torch.tensor([ids(config.n_vocab)]), weights, recorder)
    for name, n_head in (("Qcur", config.n_head), ("Kcur", config.n_head_kv)):
        report = fit_rotation(recorder.taps[f"{name}_pre-0"][0], recorder.taps[f"{name}-0"][0], n_head, config.rope, range(N_TOKENS))
        assert report.as_expected
