"""The largest logits of a position are those of a stable sort, whatever the slices of the vocabulary, ties, NaN and infinities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantscope.top_tokens import TopTokens

N, V, K = 6, 40, 5


def streamed(x: Tensor, widths: list[int], rows: list[int] | None = None) -> TopTokens:
    """x: [M,n,V]."""
    kept = list(range(x.shape[1])) if rows is None else rows
    top, v0 = TopTokens(len(x), len(kept), K), 0
    for width in [*widths, x.shape[-1]]:
        part = x[:, :, v0 : v0 + width]
        if part.shape[-1]:
            top.add(np.arange(len(kept)), np.array(kept), v0, list(part))
        v0 += part.shape[-1]
    return top


@settings(deadline=None)
@given(widths=st.lists(st.integers(1, 15), max_size=6), seed=st.integers(0, 99), n_values=st.sampled_from([2, 5, 1000]))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_stable_sort(dtype: torch.dtype, widths: list[int], seed: int, n_values: int) -> None:
    """Few values make many ties: of equal logits the smaller id comes first."""
    x = torch.randint(-n_values, n_values, (2, N, V), generator=torch.Generator().manual_seed(seed)).to(dtype) / 7
    top, (values, ids) = streamed(x, widths), x.sort(dim=-1, descending=True, stable=True)
    assert top.ids.tolist() == ids[..., :K].tolist()
    assert top.logits.tolist() == values[..., :K].double().tolist()


def test_some_of_the_rows() -> None:
    x = torch.randn(2, N, V, generator=torch.Generator().manual_seed(1))
    assert streamed(x, [7], [1, 4]).ids.tolist() == streamed(x, []).ids[:, [1, 4]].tolist()


def test_what_has_no_place_in_a_distribution_takes_none() -> None:
    x = torch.full((1, 1, V), -torch.inf)
    x[0, 0, [3, 20, 30]] = torch.tensor([1.0, torch.nan, 2.0])
    for widths in ([], [10, 15]):
        top = streamed(x, widths)
        assert top.ids[0, 0].tolist() == [30, 3, -1, -1, -1]
        assert top.logits[0, 0].tolist() == [2, 1, -np.inf, -np.inf, -np.inf]
    assert streamed(torch.zeros(1, 1, 3), []).ids[0, 0].tolist() == [0, 1, 2, -1, -1]  # a vocabulary of three
