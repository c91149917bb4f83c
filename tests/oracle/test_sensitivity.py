"""Predicted sensitivity of trained models against truly measured divergences: each matrix alone in each type, the model run again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.sensitivity import Truth, agreement, measure, pairs, spearman
from quantscope.cli.demo import MODEL, TEXT, bundled
from quantscope.inputs import read_inputs
from quantscope.metrics import kl_nats
from quantscope.model.forward import forward
from quantscope.qtypes import QTYPES, QuantType
from quantscope.remedy.sensitivity import predict, quantized
from quantscope.results import StudyOptions
from quantscope.sources.resolve import open_source
from quantscope.weights import Weights
from tests.models import STORIES


def opened(model: Path, n_chunk: int, n_ctx: int) -> tuple[Weights, Tensor]:
    """A model and the first chunks of the bundled text."""
    weights = Weights(open_source(str(model)), keep=True)
    options = StudyOptions(models=(str(model),), text=bundled(TEXT), n_ctx=n_ctx, n_chunks=n_chunk)
    text = read_inputs(options, weights.source, weights.config).text
    assert text is not None
    return weights, text.ids


def types(names: str) -> list[QuantType]:
    return [QTYPES[name] for name in names.split()]


def test_ranks_of_a_small_trained_model() -> None:
    """stories260K, 36 matrices × 3 types."""
    weights, ids = opened(STORIES, 24, 64)
    wanted = types("Q4_0 Q5_0 Q8_0")
    predicted, measured = predict(weights, ids, wanted).kl, measure(weights, ids, wanted)
    groups = agreement(predicted, measured)
    assert groups["all"]["pairs"] == 3 * len(predicted) == 3 * len(measured) >= 108
    assert groups["all"]["spearman"] > 0.97
    for t in wanted:
        assert groups[t.name]["spearman"] > 0.93, (t, groups[t.name])
        assert 0.7 < groups[t.name]["ratio"] < 1.4, (t, groups[t.name])


def test_what_is_measured_is_a_whole_run() -> None:
    """``Truth`` starts at the layer that is changed; the plain forward and the definition of the KL divergence give the same."""
    weights, ids = opened(STORIES, 2, 64)
    assert weights._kept is not None
    names = ["token_embd", "blk.0.attn_k", "blk.3.attn_output", f"blk.{weights.config.n_layer - 1}.ffn_up"]
    with torch.no_grad():
        truth, before = Truth(weights, ids), forward(ids, weights)
        for name in (f"{stem}.weight" for stem in names):
            kept, coarse = weights.get(name), quantized(weights.get(name), QTYPES["Q4_0"])
            weights._kept[name] = coarse
            after = forward(ids, weights)
            weights._kept[name] = kept
            assert truth.kl(name, coarse) == pytest.approx(float(kl_nats(before, after).mean()), rel=2e-3), name


def test_rank_correlation() -> None:
    assert spearman([1, 20, 3, 4], [0.1, 0.9, 0.2, 0.3]) == pytest.approx(1)
    assert spearman([1, 2, 3], [9, 5, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(0.8)
    assert pairs({"a": {"x": 1.0, "y": 2.0}}, {"a": {"x": 3.0, "y": 4.0}}, lambda name, t: t == "y") == ([2.0], [4.0])


@pytest.mark.slow
def test_ranks_of_the_demo_model() -> None:
    """72 matrices × 4 types, 1,024 tokens."""
    weights, ids = opened(bundled(MODEL), 4, 256)
    wanted = types("Q2_K Q4_K Q6_K Q8_0")
    groups = agreement(predict(weights, ids, wanted).kl, measure(weights, ids, wanted))
    assert groups["all"]["pairs"] == 4 * 72
    assert groups["all"]["spearman"] > 0.98
    assert min(groups[t.name]["spearman"] for t in wanted) > 0.95
