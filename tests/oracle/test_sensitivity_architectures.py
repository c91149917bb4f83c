"""Predicted sensitivity of models that are no Llama: gradients against finite differences, predictions against measured divergences."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median

import pytest
import torch
from torch import Tensor

from benchmarks.sensitivity import measure
from quantscope.model.forward import embed, layer, tables
from quantscope.qtypes import QTYPES
from quantscope.remedy.probe import back_through
from quantscope.remedy.sensitivity import predict
from quantscope.sources.resolve import open_source
from quantscope.weights import Weights
from tests.arch_models import make_arch

# scaled embeddings, learned positions, a norm of the embeddings, no norm before the attention, ALiBi, one norm for both branches
DENSE = ("gemma2", "granite", "minicpm", "gpt2", "starcoder", "bloom", "olmo2", "exaone4", "mpt", "phi2")
SEED = torch.Generator


def opened(case: str, tmp_path: Path) -> Weights:
    return Weights(open_source(make_arch(tmp_path / "m.gguf", case)), keep=True)


def some_ids(n_chunk: int, n_ctx: int) -> Tensor:
    return torch.randint(3, 280, (n_chunk, n_ctx), generator=SEED().manual_seed(7))


@pytest.mark.parametrize("case", DENSE)
def test_gradients_are_finite_differences(case: str, tmp_path: Path) -> None:
    """⟨Σ g xᵀ, ΔW⟩ of every matrix of a layer is what the loss changes by, to first order."""
    weights = opened(case, tmp_path)
    draw, i = SEED().manual_seed(0), weights.config.n_layer - 1
    w = {name: tensor.double() for name, tensor in weights.layer(i).items()}
    h = embed(some_ids(2, 9), weights, dtype=torch.float64)
    at_output = torch.randn(h.shape, generator=draw, dtype=torch.float64)
    rope = tables(h, weights, dtype=torch.float64)

    def loss(w: Mapping[str, Tensor]) -> float:
        return float((layer(h, w, i, weights.config, rope) * at_output).sum())

    with torch.no_grad():
        _, products = back_through(h, at_output, w, i, weights.config, rope)
        matrices = {name.removesuffix(".weight") for name, x in w.items() if x.ndim == 2}
        assert set(products) == matrices
        for name, (x, g) in products.items():
            matrix = w[f"{name}.weight"]
            step = torch.randn(matrix.shape, generator=draw, dtype=torch.float64) * 1e-6
            up, down = ({**w, f"{name}.weight": matrix + sign * step} for sign in (1, -1))
            predicted = float(torch.einsum("bto,oi,bti->", g, step, x))
            assert predicted == pytest.approx((loss(up) - loss(down)) / 2, rel=1e-4), name


@pytest.mark.parametrize("case", DENSE)
def test_predicted_is_near_what_is_measured(case: str, tmp_path: Path) -> None:
    """Q8_0 in every matrix alone, embedding and head included: a small change, so that only the drawn labels are between the two."""
    weights, ids, wanted = opened(case, tmp_path), some_ids(16, 32), [QTYPES["Q8_0"]]
    predicted, measured = predict(weights, ids, wanted).kl, measure(weights, ids, wanted)
    measured = {name: row for name, row in measured.items() if name in predicted}
    assert len(predicted) == len(measured) >= 13
    ratios = {name: row["Q8_0"] / measured[name]["Q8_0"] for name, row in predicted.items()}
    assert 0.85 < median(ratios.values()) < 1.18, ratios
    assert all(0.5 < r < 2 for r in ratios.values()), ratios
    assert ratios["token_embd.weight"] == pytest.approx(1, rel=0.05)
