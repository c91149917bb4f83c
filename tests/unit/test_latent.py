"""Latent attention: one function in both forms that files have it in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantscope.compare import compare
from quantscope.engines import Request, run
from quantscope.metrics import nmse
from quantscope.model.forward import KVCache, forward
from quantscope.model.taps import Recorder
from quantscope.results import StudyOptions
from quantscope.sources.resolve import open_source
from quantscope.study import run_study
from quantscope.weights import Weights
from tests.arch_models import make_arch

IDS = (1, 17, 250, 31, 99, 42, 8, 77, 120, 5)
D, DV, C, R = 24, 20, 32, 8  # of the case deepseek2-one-matrix


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A model with attn_kv_b, and the same one with a matrix of each head."""
    one = make_arch(tmp_path / "one.gguf", "deepseek2-one-matrix")
    weights, edit = Weights(open_source(one)), dict[str, Any]()
    for i in range(weights.config.n_layer):
        both = weights.get(f"blk.{i}.attn_kv_b.weight").numpy().reshape(weights.config.n_head, D - R + DV, C)
        edit[f"blk.{i}.attn_kv_b.weight"] = None
        edit[f"blk.{i}.attn_k_b.weight"] = np.ascontiguousarray(both[:, : D - R].transpose(0, 2, 1))
        edit[f"blk.{i}.attn_v_b.weight"] = np.ascontiguousarray(both[:, D - R :])
    keys = {"attention.key_length": C + R, "attention.value_length": C, "attention.head_count_kv": 1}
    keys |= {"attention.key_length_mla": D, "attention.value_length_mla": DV}
    return one, make_arch(tmp_path / "by_head.gguf", "deepseek2-one-matrix", edit=edit, keys=keys)


def taps_of(path: Path) -> dict[str, torch.Tensor]:
    recorder = Recorder()
    forward(torch.tensor([IDS]), Weights(open_source(path)), recorder)
    return recorder.taps


def test_both_forms_are_one_function(pair: tuple[Path, Path]) -> None:
    one, by_head = map(taps_of, pair)
    assert {tap.partition("-")[0] for tap in by_head.keys() - one.keys()} == {"Qcur_latent", "Kcur_latent"}
    assert one.keys() <= by_head.keys()
    assert {tap: float(e) for tap, x in one.items() if (e := nmse(x.flatten(), by_head[tap].flatten())) > 1e-11} == {}
    assert by_head["Kcur_latent-0"].shape == (1, len(IDS), C + R)


def test_a_cache_of_latent_vectors(pair: tuple[Path, Path]) -> None:
    """Step by step over it, and what it holds."""
    weights, cache = Weights(open_source(pair[1])), KVCache()
    steps = [forward(torch.tensor([part]), weights, cache=cache) for part in ([*IDS[:6]], *([t] for t in IDS[6:]))]
    assert float(nmse(forward(torch.tensor([IDS]), weights).flatten(), torch.cat(steps, dim=1).flatten())) < 1e-11
    k, v = cache.layers[1]
    assert (k.shape, v.shape) == ((1, len(IDS), 1, C + R), (1, len(IDS), 1, C))
    assert torch.equal(k[..., :C], v)


def test_floors_of_a_comparison(pair: tuple[Path, Path]) -> None:
    """Every tap of the emulated arithmetic is within what was predicted for it, by a factor that is 1."""
    exact, emulated = (run(Request("reference", str(pair[1]), IDS, arithmetic=m, predict=m == "exact")) for m in ("exact", "ggml"))
    found = compare(exact, emulated)
    assert found.first_divergence is None
    assert {row.tap for row in found.rows} >= {"Qcur_latent-0", "Kcur_latent-2", "kqv_out-1"}
    assert all(row.floor > 1e-9 for row in found.rows if row.tap.startswith(("kqv_out", "attn_out")))


def test_a_study_of_both_forms(pair: tuple[Path, Path]) -> None:
    """As of a folder, whose models have one matrix, beside its converted file."""
    one, by_head = pair
    study = run_study(StudyOptions((str(one), str(by_head)), ref=str(one), tokens=IDS, kv=("f16",)))
    found = {v.name: v for v in study.variants}
    assert found["by_head"].logits.kl_nats < 1e-9 < found["by_head kv=f16"].logits.kl_nats
    assert found["one kv=f16"].kv_bytes == 3 * 4 * (D + DV) * 2
    assert found["by_head kv=f16"].kv_bytes == 3 * (C + R) * 2
