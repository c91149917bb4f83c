"""Rounding under the output error: it falls, it can be told from chance, and nothing but codes and scales changes."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from quantscope.qtypes import QTYPES
from quantscope.quants import decode, encode
from quantscope.quants.codes import LAYOUTS, codes
from quantscope.remedy.rounding import HALVES, descended, error_feedback, output_error, rescaled

N_OUT, N_IN = 24, 512
TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


@pytest.fixture(scope="module")
def w() -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).standard_normal((N_OUT, N_IN)).astype(np.float32)) * 0.05


@pytest.fixture(scope="module")
def gram() -> Tensor:
    """Of inputs that hang together, as real ones do: 40 directions and some noise."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((3000, 40)) @ rng.standard_normal((40, N_IN)) + 0.3 * rng.standard_normal((3000, N_IN))
    return torch.from_numpy(x.T @ x)


def plain(w: Tensor, name: str) -> np.ndarray:
    return encode(w.numpy(), QTYPES[name], N_IN)


@pytest.mark.parametrize("name", TYPES)
def test_error_feedback_halves_the_output_error(name: str, w: Tensor, gram: Tensor) -> None:
    qtype = QTYPES[name]
    before, after = (output_error(w, raw, gram, qtype) for raw in (plain(w, name), error_feedback(w, gram, qtype)))
    assert after < 0.5 * before


@pytest.mark.parametrize("name", TYPES)
def test_each_step_can_only_help(name: str, w: Tensor, gram: Tensor) -> None:
    qtype, raw = QTYPES[name], plain(w, name)
    errors = [output_error(w, raw, gram, qtype)]
    for step in (descended, rescaled, descended):
        raw = step(w, raw, gram, qtype)
        errors.append(output_error(w, raw, gram, qtype))
    assert all(b <= a * (1 + 1e-9) for a, b in pairwise(errors)), errors
    assert errors[-1] < 0.7 * errors[0]


@pytest.mark.parametrize("name", TYPES)
def test_the_descent_keeps_the_scales_and_rescaling_keeps_the_codes(name: str, w: Tensor, gram: Tensor) -> None:
    qtype, raw = QTYPES[name], plain(w, name)
    size = qtype.type_size
    touched = np.zeros(size, bool)
    for at in HALVES[name]:
        touched[at : at + 2] = True
    changed = (descended(w, raw, gram, qtype) != raw).reshape(-1, size)
    assert changed.any()
    assert not changed[:, touched].any()
    other = rescaled(w, raw, gram, qtype)
    assert np.array_equal(codes(other, qtype), codes(raw, qtype))
    assert not (other != raw).reshape(-1, size)[:, ~touched].any()


def test_with_uncorrelated_inputs_there_is_nothing_to_feed_back(w: Tensor) -> None:
    qtype, eye = QTYPES["Q4_0"], torch.eye(N_IN, dtype=torch.float64)
    nearest = descended(w, plain(w, "Q4_0"), eye, qtype)
    again = error_feedback(w, eye, qtype)
    assert output_error(w, nearest, eye, qtype) <= output_error(w, plain(w, "Q4_0"), eye, qtype)
    assert output_error(w, again, eye, qtype) <= 1.2 * output_error(w, nearest, eye, qtype)


def test_a_gram_without_an_inverse_is_damped(w: Tensor) -> None:
    """Fewer tokens than channels, and a channel that no token uses."""
    x = torch.from_numpy(np.random.default_rng(2).standard_normal((20, N_IN)))
    x[:, 7] = 0
    raw = error_feedback(w, x.T @ x, QTYPES["Q4_K"])
    assert np.isfinite(decode(raw, QTYPES["Q4_K"])).all()
    assert output_error(w, raw, x.T @ x, QTYPES["Q4_K"]) < output_error(w, plain(w, "Q4_K"), x.T @ x, QTYPES["Q4_K"])
    nothing = error_feedback(w, torch.zeros(N_IN, N_IN, dtype=torch.float64), QTYPES["Q4_K"])
    assert np.isfinite(decode(nothing, QTYPES["Q4_K"])).all()


def test_every_type_with_codes_has_its_halves() -> None:
    assert set(HALVES) == set(LAYOUTS)
