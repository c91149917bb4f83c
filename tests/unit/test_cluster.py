"""How variants are spread over tasks, and what is said where there is no ray or no cluster.  A cluster itself: tests/e2e/test_ray.py."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantscope.cluster import connected, member_groups
from quantscope.errors import MissingExtraError


@given(st.integers(1, 20), st.booleans(), st.integers(0, 30))
def test_every_variant_is_in_one_group_and_the_original_leads_all(n_variants: int, has_reference: bool, n_groups: int) -> None:
    n_members = n_variants + has_reference
    groups = member_groups(n_members, has_reference, n_groups)
    assert 1 <= len(groups) <= max(1, n_groups)
    if has_reference:
        assert all(group[0] == 0 for group in groups)
        groups = [group[1:] for group in groups]
    assert [m for group in groups for m in group] == list(range(has_reference, n_members))
    assert max(map(len, groups)) - min(map(len, groups)) <= 1


def test_an_original_alone_is_one_group() -> None:
    assert member_groups(1, True, 4) == [[0]]


def test_without_ray_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'quantscope\[ray\]'"), connected("local"):
        pass
