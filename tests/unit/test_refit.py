"""The closed forms of corrections against what they claim: least squares over the inputs themselves, and functions that stay the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantscope.model.forward import forward
from quantscope.model.taps import MAKERS
from quantscope.remedy import refit
from quantscope.remedy.equalize import Equalized, of_maker, scales
from quantscope.remedy.refit import RIDGE, Sums, bias, gain, product_error, target
from quantscope.sources.resolve import open_source
from quantscope.weights import Weights
from tests.models import STORIES

N_TOKENS, N_IN = 500, 12


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor]:
    """x in the original, x̂ in the corrected model: correlated channels, means that are not zero."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(N_TOKENS, N_IN, generator=g, dtype=torch.float64) @ torch.randn(N_IN, N_IN, generator=g, dtype=torch.float64) + 0.7
    return x, 0.9 * x + 0.2 * torch.randn(x.shape, generator=g, dtype=torch.float64) + 0.1


def matrix(n_out: int, seed: int) -> Tensor:
    return torch.randn(n_out, N_IN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def residual(products: list[refit.Product], x: Tensor, y: Tensor, b: Tensor | None = None) -> float:
    return sum(float((x @ w.T - y @ v.T - (0 if b is None else b)).square().sum()) for w, v in products)


def test_the_error_is_that_of_the_outputs(inputs: tuple[Tensor, Tensor]) -> None:
    products, b = [(matrix(5, 2), matrix(5, 3)), (matrix(3, 4), matrix(3, 5))], None
    assert product_error(products, Sums.of(*inputs)) == pytest.approx(residual(products, *inputs), rel=1e-9)
    b = matrix(1, 6)[0, :5]
    assert product_error(products[:1], Sums.of(*inputs), b) == pytest.approx(residual(products[:1], *inputs, b), rel=1e-9)


def test_sums_of_parts_are_the_sums_of_the_whole(inputs: tuple[Tensor, Tensor]) -> None:
    x, y = inputs
    total = Sums.of(x[:100], y[:100])
    total += Sums.of(x[100:], y[100:])
    whole = Sums.of(x, y)
    for name in ("original", "mixed", "own", "mean", "own_mean", "importance"):
        torch.testing.assert_close(getattr(total, name), getattr(whole, name))
    assert total.n == whole.n == N_TOKENS


def test_scaled_sums_are_those_of_scaled_inputs(inputs: tuple[Tensor, Tensor]) -> None:
    x, y = inputs
    a, b = torch.linspace(0.5, 2, N_IN, dtype=torch.float64), torch.linspace(3, 0.1, N_IN, dtype=torch.float64)
    for name, value in vars(Sums.of(x * a, y * b)).items():
        torch.testing.assert_close(torch.as_tensor(getattr(Sums.of(x, y).scaled(a, b), name)), torch.as_tensor(value))


def test_the_target_is_ridge_regression_towards_the_weights(inputs: tuple[Tensor, Tensor]) -> None:
    """W* minimises ‖XWᵀ − X̂Vᵀ‖² + λ‖V − W‖²: as rows below the data."""
    (x, y), w = inputs, matrix(4, 7)
    s = Sums.of(x, y)
    root = (RIDGE * s.own.diagonal().mean()).sqrt() * torch.eye(N_IN, dtype=torch.float64)
    expected = torch.linalg.lstsq(torch.cat([y, root]), torch.cat([x @ w.T, root @ w.T])).solution.T
    torch.testing.assert_close(target(w, s), expected)


def test_the_bias_is_the_mean_error_and_nothing_lowers_the_error_more(inputs: tuple[Tensor, Tensor]) -> None:
    x, y = inputs
    product = matrix(4, 8), matrix(4, 9)
    s, found = Sums.of(x, y), bias((matrix(4, 8), matrix(4, 9)), Sums.of(x, y))
    torch.testing.assert_close(found, (x @ product[0].T - y @ product[1].T).mean(0))
    best = product_error([product], s, found)
    for k in range(4):
        for step in (-0.01, 0.01):
            other = found.clone()
            other[k] += step
            assert product_error([product], s, other) > best


def test_the_gain_is_least_squares_over_the_channels(inputs: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refit, "RIDGE", 0.0)
    x, y = inputs
    products = [(w := matrix(20, 10), w + 0.1 * matrix(20, 11)), (w := matrix(9, 12), w + 0.1 * matrix(9, 13))]
    columns = torch.cat([(y[:, None, :] * v[None]).reshape(-1, N_IN) for _, v in products])  # [tokens·out, in]: of each factor's effect
    goal = torch.cat([(x @ w.T).reshape(-1) for w, _ in products])
    torch.testing.assert_close(gain(products, Sums.of(x, y)), torch.linalg.lstsq(columns, goal[:, None]).solution[:, 0])


def test_an_equalized_model_is_the_same_function() -> None:
    file = Weights(open_source(STORIES), keep=True)
    ids = torch.tensor([[1, 403, 407, 261, 378, 31, 7, 200]])
    expected = forward(ids, file, dtype=torch.float64)
    model = Equalized(file)
    readers = {"attn_norm": ("attn_q", "attn_k", "attn_v"), "ffn_norm": ("ffn_gate", "ffn_up"), "kqv_out": ("attn_output",)}
    readers["ffn_swiglu"] = ("ffn_down",)
    assert readers.keys() == MAKERS.keys()
    for i in range(file.config.n_layer):
        for tap, maker in MAKERS.items():
            n = file.shape(f"blk.{i}.{readers[tap][0]}.weight")[1]
            sizes = torch.rand(2, n, generator=torch.Generator().manual_seed(i)) + 0.01
            s = scales(*sizes, (0.5, -0.25), tap, file.config)
            assert float(s.max() / s.min()) > 1.5  # it does change the tensors
            model.row_factors[f"blk.{i}.{maker}.weight"] = of_maker(s, tap, file.config)
            model.column_factors |= {f"blk.{i}.{m}.weight": s for m in readers[tap]}
    torch.testing.assert_close(forward(ids, model, dtype=torch.float64), expected, rtol=1e-5, atol=1e-5)


def test_scales_are_powers_of_both_sizes_and_1_for_dead_channels() -> None:
    config = Weights(open_source(STORIES)).config
    inputs, columns = torch.ones(2, config.n_ff)
    inputs[3], inputs[4], columns[5] = 0, 16, 81
    s = scales(inputs, columns, (0.5, -0.25), "ffn_swiglu", config)
    assert float(s[3]) == 1
    assert float(s[4] / s[6]) == pytest.approx(4)
    assert float(s[6] / s[5]) == pytest.approx(3)
    assert torch.equal(scales(torch.zeros(config.n_ff), columns, (0.5, 0.0), "ffn_swiglu", config), torch.ones(config.n_ff))
