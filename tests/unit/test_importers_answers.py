"""Answers that notes and logs tell: which token, of which engine, in which quantization."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantscope.importers.answers import Answer, answer_of, answers
from quantscope.importers.rustorch import read_rustorch

DATA = Path(__file__).parents[1] / "data" / "rustorch"


def test_the_seeds_table() -> None:
    assert answers((DATA / "seed-tables.md").read_text("utf-8")) == (
        Answer("RusTorch", "Q4_K_M", "Hello", "diplom", 13487, 6),
        Answer("RusTorch", "Q4_0", "Hello", "ER", 1001, 1),
        Answer("llama.cpp", "Q4_0", "Hello", ",", None, None),
    )


def test_english_columns_in_another_order_and_csv() -> None:
    expected = (Answer("mine", "Q6_K", "Hi", "ok", 7, 1),)
    assert (
        answers("| Token ID | Engine | Rank | Quantization | Prompt | Token |\n|-|-|-|-|-|-|\n| 7 | mine | #1 | Q6_K | 'Hi' | ok |\n")
        == expected
    )
    assert answers("engine,quantization,prompt,token,id,rank\nmine,Q6_K,Hi,ok,7,1\n") == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "| Engine | Quantization |\n|-|-|\n| a | Q4_0 |\n",
        "| Token | ID |\n|-|-|\n| a | 1 |\n",
        "layer,engine,quantization,token\n0,a,Q4_0,b\n",
    ],
)
def test_other_tables_hold_no_answers(text: str) -> None:
    assert answers(text) == ()


@pytest.mark.parametrize(("name", "token", "rank"), [("q4_k_m", 13487, 6), ("q4_0", 1001, 1), ("q6_k", 15010, None)])
def test_rustorchs_logs(name: str, token: int, rank: int | None) -> None:
    (run,) = read_rustorch((DATA / f"{name}.log").read_text("utf-8"), name).runs
    found = answer_of(name, run.trace)
    assert found is not None
    assert (found.engine, found.variant, found.id) == ("RusTorch", name, token)
    assert rank is None or found.rank == rank


def test_a_run_that_tells_no_token() -> None:
    runs = read_rustorch((DATA / "q4_k_m-test.log").read_text("utf-8"), "x").runs
    assert [answer_of("x", r.trace) for r in runs] == [None]


cells = st.sampled_from(["|", "---", "Engine", "量子化", "Token", "ID", "0", "\n", "#", ",", '"', "?", "\\"]) | st.text(max_size=5)


@given(st.lists(cells, max_size=60).map("".join))
def test_garbage(text: str) -> None:
    assert all(a.engine and a.variant for a in answers(text))
