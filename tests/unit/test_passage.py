"""The passage and the tokens after the prompt are those of a plain forward of every variant, whole logits and all."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from quantscope import plan
from quantscope.kld_base import prepare_base, write_base
from quantscope.metrics import kl_nats, rank
from quantscope.model.forward import forward
from quantscope.passage import top_tokens
from quantscope.results import Passage, Study, StudyOptions
from quantscope.stages import Job, prepare
from quantscope.study import run_study
from tests.models import make_gguf

CTX, SCORED = 32, 15
WORDS = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park with her red ball. "


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> StudyOptions:
    folder = tmp_path_factory.mktemp("passage")
    (folder / "text.txt").write_text(WORDS + WORDS.replace("Lily", "Mia"), "utf-8")
    model = make_gguf(folder / "m.gguf", n_layer=1, seed=3)
    return StudyOptions(models=(str(model),), types=("Q4_0", "Q8_0"), text=folder / "text.txt", n_ctx=CTX, n_chunks=4)


def whole_logits(job: Job, stage: str) -> dict[str, Tensor]:
    """Variant → logits at every scored position, [C·P,V]."""
    s = job.stage(stage)
    return {m.name: forward(s.ids, m.weights)[:, s.first : s.last].flatten(0, 1) for m in s.members}


def passage_of(study: Study) -> Passage:
    assert study.passage is not None
    return study.passage


@pytest.mark.parametrize("slicing", [None, (2, 7, 50)])
def test_a_text(options: StudyOptions, monkeypatch: pytest.MonkeyPatch, slicing: tuple[int, int, int] | None) -> None:
    if slicing:
        batch, positions, ids = slicing
        monkeypatch.setattr(plan, "BATCH_TOKENS", batch * CTX)
        monkeypatch.setattr(plan, "SLICE_TOKENS", batch * CTX)
        monkeypatch.setattr(plan, "SLICE_POSITIONS", positions)
        monkeypatch.setattr(plan, "BAND_BYTES", ids * 4 * 64)  # of the vocabulary
    job, done = prepare(options), run_study(options)
    assert done.plan is not None
    assert slicing is None or (done.plan.chunks_per_batch, done.plan.positions_per_slice, done.plan.ids_per_slice) == slicing
    p, logits, tokenizer = passage_of(done), whole_logits(job, "text"), job.inputs.tokenizer
    assert tokenizer is not None
    ids, first = job.stage("text").ids, CTX // 2
    assert p.n_positions == len(p.ids) == len(p.next) == 4 * SCORED
    assert p.ids == tuple(ids[:, first : CTX - 1].flatten().tolist())
    assert p.pieces == tuple(map(tokenizer.piece, p.ids))
    assert p.next == tuple(tokenizer.piece(int(ids[c, t + 1])) for c, t in zip(p.chunk, p.position, strict=True))
    assert [int(ids[c, t]) for c, t in zip(p.chunk, p.position, strict=True)] == list(p.ids)
    assert list(p.kl_nats) == ["Q4_0", "Q8_0"]
    assert list(p.top) == ["m", "Q4_0", "Q8_0"]
    for v in done.variants:
        probs, best = logits[v.name].double().softmax(-1).topk(5)
        assert [[piece for piece, _ in row] for row in p.top[v.name]] == [[tokenizer.piece(i) for i in row] for row in best.tolist()]
        torch.testing.assert_close(torch.tensor([[x for _, x in row] for row in p.top[v.name]]).double(), probs, rtol=1e-4, atol=1e-7)
    for v in done.quantized:
        kl = torch.tensor(p.kl_nats[v.name]).double()
        torch.testing.assert_close(kl, kl_nats(logits["m"], logits[v.name]), rtol=1e-3, atol=1e-8)
        assert v.logits is not None
        assert float(kl.mean()) == pytest.approx(v.logits.kl_nats)
        assert v.logits.kl_histogram is not None
        assert sum(v.logits.kl_histogram.counts) + v.logits.kl_histogram.below == v.logits.n_positions


def test_no_more_than_the_first_positions(options: StudyOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = passage_of(run_study(options))
    monkeypatch.setattr("quantscope.meters.SHOWN", 20)
    p = passage_of(run_study(options))
    assert (p.n_positions, len(p.ids), len(p.kl_nats["Q4_0"]), len(p.top["m"])) == (4 * SCORED, 20, 20, 20)
    assert (p.ids, p.chunk, p.next) == (everything.ids[:20], everything.chunk[:20], everything.next[:20])
    assert p.top["Q8_0"] == everything.top["Q8_0"][:20]
    assert p.kl_nats["Q8_0"] == everything.kl_nats["Q8_0"][:20]


def test_a_prompt(options: StudyOptions) -> None:
    """All of its positions; and, where its continuation is chosen, the tokens of every variant beside each other."""
    given = dataclasses.replace(options, text=None, prompt="Once upon a time")
    job, done = prepare(given), run_study(given)
    p, logits = passage_of(done), whole_logits(job, "prompt")
    assert done.prompt is not None
    assert (p.ids, p.pieces) == (done.prompt.ids, done.prompt.pieces)
    assert p.next == (*done.prompt.pieces[1:], None)
    assert done.top is not None
    t, ids = done.top, torch.tensor(done.top.ids)
    assert set(logits["m"][-1].topk(20).indices.tolist()) <= set(t.ids)
    assert list(t.logits["m"]) == sorted(t.logits["m"], reverse=True)
    for v in done.variants:
        own = logits[v.name][-1]
        assert set(own.topk(5).indices.tolist()) <= set(t.ids)
        torch.testing.assert_close(torch.tensor(t.logits[v.name]), own[ids], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.tensor(t.probs[v.name]), own.softmax(-1)[ids], rtol=1e-4, atol=1e-7)
        assert list(t.ranks[v.name]) == [int(rank(own, torch.tensor(i))) for i in t.ids]
        (token,) = v.generated
        place = t.ranks[v.name].index(1)
        assert (token.id, token.text, token.rank) == (t.ids[place], t.pieces[place], 1)
        assert (token.logit, token.prob) == (t.logits[v.name][place], t.probs[v.name][place])
        assert token.rank_in_original == t.ranks["m"][place]


def test_the_passage_is_the_texts_where_there_is_a_prompt_too(options: StudyOptions) -> None:
    both = run_study(dataclasses.replace(options, prompt="Once"))
    assert both.passage == run_study(options).passage
    assert both.top == run_study(dataclasses.replace(options, text=None, prompt="Once")).top


def test_without_an_original(options: StudyOptions, tmp_path: Path) -> None:
    other = make_gguf(tmp_path / "other.gguf", n_layer=1, seed=3, dtype="Q8_0")
    files = make_gguf(tmp_path / "first.gguf", n_layer=1, seed=3, dtype="Q4_0")
    done = run_study(dataclasses.replace(options, models=(str(files), str(other)), types=()))
    assert done.original is None
    p = passage_of(done)
    assert p.kl_nats == {}
    assert [len(p.top[v.name]) for v in done.variants] == [4 * SCORED] * 2
    assert done.top is not None
    assert list(done.top.logits["first"]) == sorted(done.top.logits["first"], reverse=True)
    assert all(v.logits and v.logits.kl_histogram is None for v in done.variants)


def test_an_original_from_a_file(options: StudyOptions, tmp_path: Path) -> None:
    """Its own most probable tokens are in the file, its logits after a prompt are not."""
    write_base(tmp_path / "b.kld", prepare_base(dataclasses.replace(options, types=())))
    exact, done = run_study(options), run_study(dataclasses.replace(options, base=tmp_path / "b.kld", n_chunks=None))
    p, wanted = passage_of(done), passage_of(exact)
    assert list(p.top) == ["b.kld", *list(p.kl_nats)]
    assert p.top["Q4_0"] == wanted.top["Q4_0"]
    for row, exact_row in zip(p.top["b.kld"], wanted.top["m"], strict=True):
        assert [x for _, x in row] == pytest.approx([x for _, x in exact_row], rel=3e-4)  # half a step of 16 bits
    assert done.top is not None
    assert "b.kld" not in done.top.logits


def test_a_variants_own_choice_is_kept_before_others_second_ones() -> None:
    """25 variants that agree on nothing: 20 tokens of the first, and the first choice of 20 others."""
    x = torch.zeros(25, 200, dtype=torch.float64)
    x[0, :20] = torch.arange(20, 0, -1)
    for m in range(1, 25):
        x[m, 20 + 5 * m : 25 + 5 * m] = torch.tensor([5.0, 4, 3, 2, 1], dtype=torch.float64)
    t = top_tokens([str(m) for m in range(25)], x, None)
    assert len(t.ids) == 40
    assert t.ids == (*range(20), *(20 + 5 * m for m in range(1, 21)))
    assert t.pieces[0] == "#0"


def test_small_vocabularies_and_nan() -> None:
    x = torch.tensor([[1.0, 3.0, torch.nan], [2.0, 2.0, -torch.inf]], dtype=torch.float64)
    t = top_tokens(["a", "b"], x, None)
    assert t.ids == (1, 0, 2)
    assert t.ranks["b"] == (2, 1, 3)
    assert t.probs["b"] == (0.5, 0.5, 0)


@pytest.mark.filterwarnings("error")
def test_a_broken_variant_has_no_most_probable_tokens(options: StudyOptions, tmp_path: Path) -> None:
    broken = make_gguf(tmp_path / "broken.gguf", n_layer=1, seed=3, edit={"output_norm.weight": np.full(64, 3e38, np.float32)})
    done = run_study(dataclasses.replace(options, models=(options.models[0], str(broken)), types=(), ref=options.models[0]))
    p = passage_of(done)
    assert p.top["broken"] == ((),) * len(p.ids)
    assert np.isnan(p.kl_nats["broken"]).all()
    histogram = done.variant("broken").logits.kl_histogram  # type: ignore[union-attr]
    assert histogram is not None
    assert (histogram.nan, sum(histogram.counts)) == (4 * SCORED, 0)
    again = passage_of(Study.from_json(done.to_json()))
    assert again.top == p.top
    assert np.isnan(again.kl_nats["broken"]).all()
