"""A batch's record holds the metrics of what walked, and records join to what one large batch gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantscope import metrics
from quantscope.images import Images, Requantized
from quantscope.lockstep import Member, Slices, walk
from quantscope.meters import N_TOP, BatchMeter, Record, join_batches, join_groups, tap_list
from quantscope.model.forward import forward
from quantscope.model.taps import Recorder
from quantscope.qtypes import QTYPES
from quantscope.sources.resolve import open_source
from quantscope.tap_stats import TapStats
from quantscope.weights import Weights
from tests.models import make_gguf

IDS = torch.randint(1, 288, (4, 12), generator=torch.Generator().manual_seed(3))
FIRST, LAST = 6, 11


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> list[Member]:
    w = Weights(open_source(make_gguf(tmp_path_factory.mktemp("meters") / "m.gguf", seed=5)))
    images = Images(w)
    types = [{n: QTYPES[t] for n in w.names() if len(w.shape(n)) == 2} for t in ("Q8_0", "Q4_0")]
    return [Member("f32", w), *(Member(str(i), Requantized(images, t)) for i, t in enumerate(types))]


def record(
    members: list[Member], rows: slice = slice(None), *, labelled: bool = True, has_reference: bool = True, **options: str
) -> Record:
    ids = IDS[rows]
    meter = BatchMeter(
        ids,
        members[0].weights,
        len(members),
        chunk0=rows.start or 0,
        first=FIRST,
        last=LAST,
        has_reference=has_reference,
        labelled=labelled,
        **options,
    )
    walk(ids, members, meter, has_reference=has_reference, slices=Slices(1, 7, 100), first=FIRST)
    return meter.record()


def logits(member: Member) -> torch.Tensor:
    return forward(IDS, member.weights)


def test_logits_are_compared_at_the_scored_positions(members: list[Member]) -> None:
    r = record(members)
    ref, labels = logits(members[0])[:, FIRST:LAST], IDS[:, FIRST + 1 : LAST + 1]
    for m, member in enumerate(members):
        own = logits(member)[:, FIRST:LAST]
        torch.testing.assert_close(torch.tensor(r["kl"][m]), metrics.kl_nats(ref, own), rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(torch.tensor(r["log_p"][m]), metrics.log_prob(own, labels), rtol=1e-5, atol=1e-5)
        assert (torch.tensor(r["same_top"][m]) == metrics.top1_agree(ref, own)).float().mean() > 0.9  # slices may round a tie otherwise
    assert r["kl"].shape == (3, 4, LAST - FIRST)


def test_the_last_logits_are_those_after_the_first_chunk(members: list[Member]) -> None:
    r = record(members)
    for m, member in enumerate(members):
        torch.testing.assert_close(torch.tensor(r["last"][m]), logits(member)[0, -1], rtol=1e-5, atol=1e-5)
    assert "last" not in record(members, slice(2, 4))


def test_the_most_probable_tokens_are_those_of_the_whole_logits(members: list[Member]) -> None:
    r = record(members)
    for m, member in enumerate(members):
        log_p, ids = logits(member)[:, FIRST:LAST].flatten(0, 1).double().log_softmax(-1).topk(N_TOP)
        assert r["top_ids"][m].tolist() == ids.tolist()
        torch.testing.assert_close(torch.tensor(r["top_log_p"][m]).double(), log_p, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("shown", "in_batches"), [(0, (0, 0)), (7, (7, 0)), (13, (10, 3)), (400, (10, 10))])
def test_the_first_positions_of_the_input_are_shown(
    members: list[Member], monkeypatch: pytest.MonkeyPatch, shown: int, in_batches: tuple[int, int]
) -> None:
    everything = record(members)
    monkeypatch.setattr("quantscope.meters.SHOWN", shown)
    batches = [record(members, slice(0, 2)), record(members, slice(2, 4))]
    assert tuple(r["top_ids"].shape[1] for r in batches) == in_batches
    joined = join_batches(batches)
    assert joined["top_ids"].tolist() == everything["top_ids"][:, :shown].tolist()
    np.testing.assert_allclose(joined["top_log_p"], everything["top_log_p"][:, :shown], rtol=1e-4, atol=1e-6)


def test_taps_are_measured_beside_the_originals(members: list[Member]) -> None:
    r = record(members)
    names = tap_list(members[0].weights)
    for m, member in enumerate(members):
        seen = [Recorder(), Recorder()]
        forward(IDS, members[0].weights, seen[0])
        forward(IDS, member.weights, seen[1])
        for name in ("embd", "Qcur-1", "ffn_swiglu-0", "l_out-1", "result_norm"):
            stats = TapStats.from_vector(r["taps"][m, names.index(name)])
            ref, x = (s.taps[name].flatten() for s in seen)
            assert stats.rms == pytest.approx(float(metrics.rms(x)), rel=1e-5)
            assert stats.mean == pytest.approx(float(metrics.mean(x)), abs=1e-6)
            if m:
                assert stats.nmse == pytest.approx(float(metrics.nmse(ref, x)), rel=1e-3, abs=1e-12)
    assert TapStats.from_vector(r["taps"][0, names.index("Qcur_normed-0")]).n == 0  # this architecture has none


def test_the_last_position_only(members: list[Member]) -> None:
    r = record(members, positions="last")
    names, seen = tap_list(members[0].weights), Recorder()
    forward(IDS, members[0].weights, seen)
    stats = TapStats.from_vector(r["taps"][0, names.index("l_out-1")])
    assert stats.rms == pytest.approx(float(metrics.rms(seen.taps["l_out-1"][:, -1].flatten())), rel=1e-5)
    assert stats.abs_max_at[1] == IDS.shape[1] - 1


def test_batches_join_to_the_whole(members: list[Member]) -> None:
    whole = record(members)
    joined = join_batches([record(members, slice(0, 2)), record(members, slice(2, 4))])
    assert joined.keys() == whole.keys()
    for key in ("kl", "log_p", "same_top", "last", "top_ids", "top_log_p"):
        np.testing.assert_allclose(joined[key], whole[key], rtol=1e-4, atol=1e-7)  # slices of the head cross chunks
    np.testing.assert_allclose(joined["taps"], whole["taps"], rtol=1e-9, atol=1e-12)


def test_groups_join_to_the_same_bits(members: list[Member]) -> None:
    whole = record(members)
    joined = join_groups([record(members[:2]), record([members[0], members[2]])], has_reference=True)
    assert {k: v.tobytes() for k, v in joined.items()} == {k: v.tobytes() for k, v in whole.items()}
    alone = record(members, has_reference=False)
    joined = join_groups([record(members[:1], has_reference=False), record(members[1:], has_reference=False)], has_reference=False)
    assert {k: v.tobytes() for k, v in joined.items()} == {k: v.tobytes() for k, v in alone.items()}


def test_groups_with_different_originals_do_not_join(members: list[Member]) -> None:
    other = record([members[1], members[2]])
    with pytest.raises(ArithmeticError, match="original"):
        join_groups([record(members[:2]), other], has_reference=True)


def test_what_is_not_asked_for_is_not_there(members: list[Member]) -> None:
    always = {"last", "top_ids", "top_log_p"}
    assert record(members, labelled=False).keys() == {"taps", "kl", "same_top", *always}
    assert record(members, has_reference=False).keys() == {"taps", "log_p", *always}
