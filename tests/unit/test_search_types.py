"""The assignment of types against all assignments of small models."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantscope.errors import UsageError
from quantscope.remedy.search import Choices, for_kl, for_size, hull, smallest

TYPES = ("Q2_K", "Q4_K", "Q6_K", "Q8_0")


@st.composite
def models(draw: st.DrawFn) -> Choices:
    """Up to five tensors; larger types are mostly better."""
    out = {}
    for k in range(draw(st.integers(1, 5))):
        n, scale = draw(st.integers(10, 400)), draw(st.floats(1e-4, 1))
        out[f"t{k}"] = {t: (n * bits, scale * draw(st.floats(0.1, 1)) / 2**bits) for t, bits in zip(TYPES, (2, 4, 6, 8), strict=True)}
    return out


def every(choices: Choices) -> list[tuple[int, float]]:
    return [(sum(n for n, _ in picked), sum(kl for _, kl in picked)) for picked in product(*(o.values() for o in choices.values()))]


@given(models(), st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_no_assignment_of_this_size_is_better_by_more_than_one_step(choices: Choices, share: float) -> None:
    low = smallest(choices).n_bytes
    high = sum(max(n for n, _ in options.values()) for options in choices.values())
    budget = low + int(share * (high - low))
    found = for_size(choices, budget)
    best = min(kl for n, kl in every(choices) if n <= budget)
    picked = [choices[tensor][kind] for tensor, kind in found.types.items()]
    assert found.n_bytes == sum(n for n, _ in picked)
    assert found.kl == pytest.approx(sum(kl for _, kl in picked))
    assert found.n_bytes <= budget
    one_step = max(options[a][1] - options[b][1] for options in choices.values() for a, b in product(options, repeat=2))
    assert best <= found.kl * (1 + 1e-9) <= best + one_step + 1e-12


@given(models())
@settings(max_examples=100, deadline=None)
def test_with_room_for_all_every_tensor_has_its_best_type(choices: Choices) -> None:
    found = for_size(choices, 10**9)
    assert found.kl == pytest.approx(min(kl for _, kl in every(choices)))


@given(models(), st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_a_kl_is_reached_with_few_bytes(choices: Choices, share: float) -> None:
    least = min(kl for _, kl in every(choices))
    most = least + share * (smallest(choices).kl - least)
    found = for_kl(choices, most + 1e-12)
    fewest = min(n for n, kl in every(choices) if kl <= most * (1 + 1e-9) + 1e-12)
    largest = max(n for options in choices.values() for n, _ in options.values())
    assert found.kl <= most + 1e-9
    assert fewest <= found.n_bytes <= fewest + largest


def test_what_is_larger_and_no_better_is_never_chosen() -> None:
    options = {"Q2_K": (10, 1.0), "Q3_K": (15, 1.5), "Q4_K": (20, 0.4), "Q5_K": (25, 0.35), "Q6_K": (30, 0.0)}
    assert hull(options) == ["Q2_K", "Q4_K", "Q6_K"]


def test_impossible_targets_say_what_is_possible() -> None:
    choices = {"a": {"Q2_K": (1000, 0.5), "Q4_K": (2000, 0.1)}}
    with pytest.raises(UsageError, match=r"expected at least 1\.00 kB"):
        for_size(choices, 900)
    with pytest.raises(UsageError, match=r"expected at least 0\.1"):
        for_kl(choices, 0.01)
