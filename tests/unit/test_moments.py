"""TapSums: the formulas, and that batches add up to the whole."""

from __future__ import annotations

import math

import pytest
import torch

from quantscope import metrics
from quantscope.moments import TapSums


def test_sums_agree_with_the_formulas_of_metrics() -> None:
    ref, test = torch.randn(3, 7, 32), torch.randn(3, 7, 32)
    sums = TapSums()
    sums.add(ref, test)
    assert sums.rms == pytest.approx(float(metrics.rms(test.flatten())), rel=1e-12)
    assert sums.mean == pytest.approx(float(metrics.mean(test.flatten())), rel=1e-10)
    assert sums.nmse == pytest.approx(float(metrics.nmse(ref.flatten(), test.flatten())), rel=1e-12)
    assert sums.sqnr_db == pytest.approx(float(metrics.sqnr_db(ref.flatten(), test.flatten())), rel=1e-12)
    assert sums.cos_sim == pytest.approx(float(metrics.cos_sim(ref.flatten(), test.flatten())), rel=1e-10)


def test_batches_add_up_to_the_whole() -> None:
    ref, test = torch.randn(8, 16), torch.randn(8, 16)
    whole, parts = TapSums(), TapSums()
    whole.add(ref, test)
    for r, t in zip(ref.split(3), test.split(3), strict=True):
        parts.add(r, t)
    assert parts.n == whole.n
    assert parts.nmse == pytest.approx(whole.nmse, rel=1e-12)
    assert parts.rms == pytest.approx(whole.rms, rel=1e-12)


def test_edges() -> None:
    empty, zero, lost = TapSums(), TapSums(), TapSums()
    assert math.isnan(empty.rms)
    assert math.isnan(empty.mean)
    zero.add(torch.zeros(4), torch.zeros(4))
    assert (zero.nmse, zero.sqnr_db, zero.cos_sim) == (0.0, math.inf, 1.0)
    lost.add(torch.zeros(4), torch.ones(4))
    assert (lost.nmse, lost.sqnr_db, lost.cos_sim) == (math.inf, -math.inf, 0.0)
