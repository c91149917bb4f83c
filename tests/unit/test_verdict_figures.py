"""The figures on which the verdict rests, on the bundled model: those that must hold exactly, and that the probes see what they must."""

from __future__ import annotations

import pytest
import torch

from tools import verdict_figures as v
from tools.attention_faults import BLIND, ByHand


@pytest.fixture(scope="module")
def rows() -> dict[str, v.Figure]:
    return {f.what: f for f in v.figures()}


def found(rows: dict[str, v.Figure], words: str) -> v.Figure:
    (row,) = [f for what, f in rows.items() if words in what]
    return row


@pytest.mark.parametrize("name", ["uniform", "Gaussian", "Laplace", "spike"])
def test_the_formula_of_rounding_holds(rows: dict[str, v.Figure], name: str) -> None:
    assert {found(rows, f"ε of {kind}, {name}").holds for kind in ("Q8_0", "Q8_K")} == {"yes"}


def test_one_token_is_blind_to_all_of_the_attention_but_v(rows: dict[str, v.Figure]) -> None:
    assert found(rows, "one token: change of the logits").here == f"exactly 0 for {len(BLIND)} of {len(BLIND)}"
    assert found(rows, "one token: the same for faults of v and FFN").holds == "yes"


def test_the_same_faults_show_with_two_tokens() -> None:
    """So that the zeros above are the token's doing, not a fault that was never applied."""
    ids = v.text_ids()[4:8]
    right, by_hand = v.taps(ids)["result_output"], v.taps(ids, ByHand())["result_output"]
    assert v.error(right, by_hand) < 1e-10
    for name, m in BLIND.items():
        change = v.error(right, v.taps(ids, m)["result_output"])
        assert change < 1e-8 if name == "RoPE offset" else change > 1e-8, (name, change)


def test_a_repeated_token_needs_no_reference(rows: dict[str, v.Figure]) -> None:
    assert [found(rows, w).holds for w in ("right engine", "but the axis", "over queries", "lost cache")] == ["yes"] * 4
    assert found(rows, "stale cache").holds == "this probe is blind to it"


def test_figures_that_follow_from_a_definition(rows: dict[str, v.Figure]) -> None:
    for words in ("LayerNorm", "positions +1", "eps 1e-6 for 1e-5 at an RMS of 0.0093", "ΔRMS/RMS", "16 sums", "four decimals"):
        assert found(rows, words).holds == "yes", words


def test_the_table_is_markdown(rows: dict[str, v.Figure]) -> None:
    lines = v.table(list(rows.values())).splitlines()
    assert len(lines) == len(rows) + 2
    assert {line.count("|") for line in lines} == {5}


def test_rounding_by_hand() -> None:
    x = torch.zeros(1, 32)
    x[0, :3] = torch.tensor([127.0, 1.4, -0.6])
    assert v.rounded(x, "Q8_0")[0, :4].tolist() == [127.0, 1.0, -1.0, 0.0]
    assert v.predicted(x, "Q8_0") == pytest.approx(127**2 / (float(x.square().sum()) / 32) / 193548 * 31 / 32, rel=1e-6)
