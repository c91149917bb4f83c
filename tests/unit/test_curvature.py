"""The curvature at the embedding against the KL divergence of perturbed embeddings."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantscope.metrics import kl_nats
from quantscope.model.forward import embed, head, layer, tables
from quantscope.remedy.curvature import embedding_curvature
from quantscope.sources.resolve import open_source
from quantscope.weights import Weights
from tests.models import STORIES

N_TOKENS = 48


@pytest.fixture(scope="module")
def weights() -> Weights:
    return Weights(open_source(STORIES), keep=True)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, 500, (12, N_TOKENS), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def kl_of(weights: Weights, ids: Tensor, change: Tensor) -> float:
    """Σ over positions, mean over chunks, of the KL divergence when ``change`` [C,T,E] is added to the embeddings."""

    def logits(h: Tensor) -> Tensor:
        rope = tables(h, weights)
        for i in range(weights.config.n_layer):
            h = layer(h, weights.layer(i), i, weights.config, rope)
        return head(h, weights.top(), weights.config)

    h = embed(ids, weights)
    return float(kl_nats(logits(h), logits(h + change)).sum() / len(ids))


def test_it_predicts_what_independent_changes_cost(weights: Weights, ids: Tensor) -> None:
    """KL of a chunk ≈ ½ Σ over positions of δᵀFδ, F of one position on average."""
    curvature = embedding_curvature(ids, weights) / ids.numel()  # [E,E]
    change = 0.01 * torch.randn(*ids.shape, weights.config.n_embd, generator=torch.Generator().manual_seed(2))
    predicted = 0.5 * N_TOKENS * 0.01**2 * float(curvature.trace())
    assert kl_of(weights, ids, change) == pytest.approx(predicted, rel=0.25)


def test_it_knows_the_directions_that_matter(weights: Weights, ids: Tensor) -> None:
    values, vectors = torch.linalg.eigh(embedding_curvature(ids, weights))
    assert values.min() > -1e-9 * values.max()
    sign = torch.randint(0, 2, (*ids.shape, 1), generator=torch.Generator().manual_seed(3)) * 2.0 - 1
    least, most = (kl_of(weights, ids, 0.02 * sign * vectors[:, k].float()) for k in (0, -1))
    assert most > 5 * least
