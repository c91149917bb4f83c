"""Predicted sensitivity of models that are no Llama: gradients against finite differences, predictions against measured divergences."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.sensitivity import measure
from quantscope.images import Images
from quantscope.model.forward import embed, forward, layer, tables
from quantscope.model.taps import Recorder
from quantscope.qtypes import QTYPES
from quantscope.quants import encode
from quantscope.recipes import fallback
from quantscope.remedy.probe import back_through
from quantscope.remedy.sensitivity import predict, quantized
from quantscope.report.sensitivity import notes
from quantscope.sources.resolve import open_source
from quantscope.weights import Weights
from tests.arch_models import make_arch

# scaled embeddings, learned positions, a norm of the embeddings, no norm before the attention, ALiBi, one norm for both branches
DENSE = ("gemma2", "granite", "minicpm", "gpt2", "starcoder", "bloom", "olmo2", "exaone4", "mpt", "phi2")
# softmax and sigmoid routers, shared experts with and without a gate, biases of experts, groups, one matrix for gate and up
ROUTED = ("qwen2moe", "qwen3moe", "llama-moe", "gpt-oss", "bailingmoe2", "granite-moe", "dbrx", "glm4moe")
WHOLE = {"token_embd.weight", "output.weight"}  # measured in whole runs
SEED = torch.Generator


def opened(case: str, tmp_path: Path) -> Weights:
    return Weights(open_source(make_arch(tmp_path / "m.gguf", case)), keep=True)


def some_ids(n_chunk: int, n_ctx: int) -> Tensor:
    return torch.randint(3, 280, (n_chunk, n_ctx), generator=SEED().manual_seed(7))


@pytest.mark.parametrize("case", [*DENSE, *ROUTED])
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
        matrices = {name.removesuffix(".weight") for name, x in w.items() if x.ndim >= 2 and name.endswith(".weight")}
        assert set(products) == matrices
        for name, p in products.items():
            matrix = w[f"{name}.weight"]
            step = torch.randn(matrix.shape, generator=draw, dtype=torch.float64) * 1e-6
            up, down = ({**w, f"{name}.weight": matrix + sign * step} for sign in (1, -1))
            changes = step if step.ndim == 3 else step[None]
            predicted = sum(float(p.g[n] @ changes[e] @ p.x[n]) for n, e in enumerate(p.expert.tolist()))
            assert predicted == pytest.approx((loss(up) - loss(down)) / 2, rel=1e-4), name


@pytest.mark.parametrize("case", DENSE)
def test_predicted_is_near_what_is_measured(case: str, tmp_path: Path) -> None:
    """Q8_0 in every matrix alone, embedding and head included: a small change, so that only the drawn labels are between the two."""
    weights, ids, wanted = opened(case, tmp_path), some_ids(16, 32), [QTYPES["Q8_0"]]
    predicted, measured = predict(weights, ids, wanted).kl, measure(weights, ids, wanted)
    assert len(predicted) == len(measured) >= 13
    ratios = {name: row["Q8_0"] / measured[name]["Q8_0"] for name, row in predicted.items()}
    assert 0.85 < median(ratios.values()) < 1.18, ratios
    assert all(0.5 < r < 2 for r in ratios.values()), ratios
    assert ratios["token_embd.weight"] == pytest.approx(1, rel=0.05)


def chosen(weights: Weights, ids: Tensor) -> list[Tensor]:
    """The experts of every token, layer by layer."""
    seen = Recorder({f"ffn_moe_topk-{i}" for i in range(weights.config.n_layer)})
    forward(ids, weights, seen)
    return list(seen.taps.values())


def keeps_its_way(weights: Weights, ids: Tensor, name: str, before: list[Tensor]) -> bool:
    """Whether every token goes through the same experts with a matrix in Q8_0."""
    assert weights._kept is not None
    kept = weights.get(name)
    weights._kept[name] = quantized(kept, fallback(QTYPES["Q8_0"], kept.shape[-1]))
    after = chosen(weights, ids)
    weights._kept[name] = kept
    return all(torch.equal(a.sort(-1).values, b.sort(-1).values) for a, b in zip(before, after, strict=True))


@pytest.mark.long
@pytest.mark.parametrize("case", ["qwen2moe", "gpt-oss", "bailingmoe2"])
def test_predicted_is_near_what_is_measured_where_tokens_keep_their_experts(case: str, tmp_path: Path) -> None:
    """The prediction takes the choice of the experts as it is; every stack is one matrix with one type."""
    weights, ids, wanted = opened(case, tmp_path), some_ids(6, 12), [QTYPES["Q8_0"]]
    runs = [predict(weights, ids, wanted, seed=seed) for seed in range(6)]
    measured, before = measure(weights, ids, wanted), chosen(weights, ids)
    assert set(runs[0].kl) == set(measured)
    names = [name for name in measured if name not in WHOLE and keeps_its_way(weights, ids, name, before)]
    assert sum(name.endswith("_exps.weight") for name in names) >= 3
    predicted = {name: sum(run.kl[name]["Q8_0"] for run in runs) / len(runs) for name in names}
    ratios = {name: predicted[name] / measured[name]["Q8_0"] for name in names}
    assert 0.8 < median(ratios.values()) < 1.25, ratios
    assert all(0.4 < r < 2.5 for r in ratios.values()), ratios
    for name in WHOLE & set(measured):  # from whole runs, other experts included
        assert runs[0].kl[name]["Q8_0"] == pytest.approx(measured[name]["Q8_0"], rel=0.05), name
    stack = "blk.2.ffn_down_exps.weight"
    stored = QTYPES[runs[0].stored[stack]["Q8_0"]]
    assert runs[0].n_bytes[stack]["Q8_0"] == weights.source.tensors[stack].n_elements // stored.block_size * stored.type_size
    assert not any(name.startswith("blk.0.ffn_gate_inp") for name in measured)  # a router keeps its type


def test_experts_that_no_token_reaches_cost_nothing_and_are_named(tmp_path: Path) -> None:
    weights, ids = opened("qwen2moe", tmp_path), torch.tensor([[1, 70]])
    reached = [len(torch.unique(x)) for x in chosen(weights, ids)]
    found = predict(weights, ids, [QTYPES["Q4_0"]])
    assert all(torch.isfinite(torch.tensor(list(row.values()))).all() for row in found.kl.values())
    assert {name: (k, n) for name, k, n in found.idle} == {
        f"blk.{i}.ffn_{part}_exps.weight": (6 - reached[i], 6) for i in range(3) for part in ("gate", "up", "down")
    }
    (note,) = [n for n in notes(found) if "No token reaches" in n]
    assert f"blk.0.ffn_gate_exps.weight: {6 - reached[0]}/6" in note


@pytest.mark.parametrize("qtype", ["Q4_0", "Q5_1"])
def test_each_expert_is_encoded_with_its_own_importance(qtype: str, tmp_path: Path) -> None:
    weights, name = opened("qwen2moe", tmp_path), "blk.1.ffn_up_exps.weight"
    columns = np.random.default_rng(0).random((6, 64), np.float32) ** 4
    made = Images(weights, lambda _: columns.reshape(-1)).encoded(name, QTYPES[qtype]).numpy()
    each = [encode(weights.get(name)[e].numpy(), QTYPES[qtype], 64, columns[e]) for e in range(6)]
    assert np.array_equal(made, np.concatenate(each))
    ids = some_ids(4, 12)
    plain, weighted = (
        predict(weights, ids, [QTYPES[qtype]], importance=lambda n, c=c: c if n == name else None).kl[name]  # type: ignore[misc]
        for c in (None, columns.reshape(-1))
    )
    assert plain != weighted
