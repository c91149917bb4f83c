"""The plan keeps a study within its memory, and makes batches as large as the bound allows."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantscope.errors import UsageError
from quantscope.plan import RUNTIME, make_plan
from quantscope.qtypes import QTYPES
from quantscope.results import PlanInfo
from quantscope.sources.resolve import open_source
from quantscope.weights import Weights
from tests.models import make_gguf

MB = 10**6


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    path = tmp_path_factory.mktemp("plan") / "m.gguf"
    return Weights(open_source(make_gguf(path, n_layer=3, n_embd=256, n_head=4, n_ff=768, n_vocab=1000, n_ctx=512, dtype="F16")))


def plan(w: Weights, memory: int, n_chunks: int = 40, n_ctx: int = 512, types: tuple[str, ...] = ("Q4_0", "Q8_0")) -> PlanInfo:
    stored = {n: w.stored(n).qtype for n in w.stored_names()}
    kinds = [stored, *({n: QTYPES[t] if len(w.shape(n)) == 2 else q for n, q in stored.items()} for t in types)]
    shapes = {n: w.shape(n) for n in stored}
    return make_plan(w.config, shapes, stored, kinds, n_chunks=n_chunks, n_ctx=n_ctx, n_scored=n_ctx // 2, memory=memory)


def test_plenty_of_memory_gives_the_largest_batches(weights: Weights) -> None:
    p = plan(weights, 8000 * MB)
    assert (p.n_batches, p.chunks_per_batch) == (3, 14)  # 40 chunks of at most 16, in equal batches
    assert p.chunks_per_slice == 2
    assert p.planned_bytes < p.memory_bytes


def test_less_memory_gives_smaller_batches_and_slices(weights: Weights) -> None:
    small = plan(weights, RUNTIME + 38 * MB)
    assert small.n_batches > 3
    assert small.chunks_per_slice == 1
    assert small.planned_bytes <= small.memory_bytes


@settings(deadline=None)
@given(memory=st.integers(RUNTIME // MB + 45, 3000), n_chunks=st.integers(1, 60), n_ctx=st.sampled_from([8, 64, 512]))
def test_every_chunk_is_in_a_batch_and_the_bound_holds(weights: Weights, memory: int, n_chunks: int, n_ctx: int) -> None:
    p = plan(weights, memory * MB, n_chunks, n_ctx)
    assert p.planned_bytes <= p.memory_bytes
    assert math.ceil(n_chunks / p.chunks_per_batch) == p.n_batches
    assert p.chunks_per_slice >= 1
    assert p.positions_per_slice >= 1
    assert 1 <= p.ids_per_slice <= 1000


def test_more_variants_need_more_memory(weights: Weights) -> None:
    few, many = (plan(weights, 4000 * MB, 1, types=types).planned_bytes for types in (("Q4_0",), ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")))
    assert many > few


def test_too_small_a_bound_is_an_error_that_names_one_that_does(weights: Weights) -> None:
    with pytest.raises(UsageError, match=r"--memory 100 MB.*3 layers × 256 channels.* 3 variants.*`--memory 0\.\dG`") as e:
        plan(weights, 100 * MB)
    enough = float(str(e.value).split("`--memory ")[1].split("G")[0])
    assert plan(weights, int(enough * 1e9)).chunks_per_batch >= 1
