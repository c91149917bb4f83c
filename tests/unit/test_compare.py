"""Comparing traces: what each kind of evidence shows, floors, the first divergence, planted faults."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quantscope.compare import EXACT_FLOOR, PREDICTED_TIMES, ROUNDING_FLOOR, compare, stats_of
from quantscope.errors import TraceContentError, TraceMismatchError
from quantscope.explain import answer
from quantscope.fingerprint import fingerprint
from quantscope.model.taps import graph_order, tap_names
from quantscope.three_way import three_way
from quantscope.trace import Evidence, Full, Origin, Sample, Stats, Trace

T, E = 4, 32
TOKENS = (1, 5, 6, 7)
EXACT = Origin("reference", arithmetic="exact float32", tokens=TOKENS, model_sha256="a" * 64)
ENGINE = Origin("engine", tokens=TOKENS, model_sha256="a" * 64)


def taps(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(T, E, generator=generator) for name in ("embd", "attn_norm-0", "Vcur-0", "attn_out-0", "l_out-0", "l_out-1")}


def trace(origin: Origin, values: Mapping[str, Tensor], as_evidence: Callable[[Tensor], Evidence] = Full) -> Trace:
    return Trace(origin, {name: (as_evidence(x),) for name, x in values.items()})


def as_stats(x: Tensor) -> Evidence:
    return Stats({k: v for k, v in stats_of(x).items() if k in ("rms", "mean", "min", "max")})


def as_sample(x: Tensor) -> Evidence:
    index = torch.tensor([0, 1, 2, x.numel() - 1])
    return Sample((x.flatten()[index] * 1e4).round() / 1e4, index, tuple(x.shape), None, 4)


def noisy(x: Tensor, nmse: float) -> Tensor:
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
    return x + noise * (nmse * x.square().sum() / noise.square().sum()).sqrt()


def test_whole_tensors() -> None:
    ref, test = taps(), taps()
    test["attn_out-0"] = noisy(test["attn_out-0"], 1e-4)
    test["l_out-0"] = noisy(test["l_out-0"], 1e-5)
    c = compare(trace(EXACT, ref), trace(ENGINE, test), floor=1e-6)
    assert [row.tap for row in c.rows] == ["embd", "attn_norm-0", "Vcur-0", "attn_out-0", "l_out-0", "l_out-1"]
    assert c.first_divergence is not None
    assert c.first_divergence.tap == "attn_out-0"
    assert c.first_divergence.nmse == pytest.approx(1e-4, rel=1e-3)
    assert c.last_agreement is not None
    assert c.last_agreement.tap == "Vcur-0"
    worst = c.first_divergence.worst
    assert worst is not None
    difference = (test["attn_out-0"] - ref["attn_out-0"]).abs()
    assert difference[worst.index].item() == difference.max().item()
    assert (worst.ref, worst.test) == (ref["attn_out-0"][worst.index].item(), test["attn_out-0"][worst.index].item())
    assert compare(trace(EXACT, ref), trace(ENGINE, test), floor=1e-3).first_divergence is None


@pytest.mark.parametrize("as_evidence", [Full, fingerprint, as_sample])
def test_a_transposed_signal_is_seen(as_evidence: Callable[[Tensor], Evidence]) -> None:
    ref, test = taps(), taps()
    test["Vcur-0"] = test["Vcur-0"].T.reshape(T, E)
    c = compare(trace(EXACT, ref), trace(ENGINE, test, as_evidence))
    assert c.first_divergence is not None
    assert c.first_divergence.tap == "Vcur-0"
    assert c.first_divergence.nmse == pytest.approx(2, rel=0.9)


def test_statistics_do_not_see_a_transposed_signal_and_say_so() -> None:
    ref, test = taps(), taps()
    test["Vcur-0"] = test["Vcur-0"].T.reshape(T, E)
    c = compare(trace(EXACT, ref), trace(ENGINE, test, as_stats))
    assert {row.verdict for row in c.rows} == {"not shown"}
    assert "proves nothing" in " ".join(c.notes)
    assert answer(c).startswith("Nothing is shown to differ, and nothing is shown to agree")
    assert "No divergence" not in answer(c)


@pytest.mark.parametrize("factor", [1.5, 0.5])
def test_an_rms_that_differs_is_a_lower_bound_of_the_error(factor: float) -> None:
    ref, test = taps(), taps()
    test["Vcur-0"] = noisy(test["Vcur-0"] * factor, 0.01)
    c = compare(trace(EXACT, ref), trace(ENGINE, test, as_stats))
    row = next(row for row in c.rows if row.tap == "Vcur-0")
    whole = next(row for row in compare(trace(EXACT, ref), trace(ENGINE, test)).rows if row.tap == "Vcur-0")
    assert 0 < row.nmse <= whole.nmse
    assert row.nmse == pytest.approx((factor - 1) ** 2, rel=0.3)
    assert c.first_divergence == row


def test_printed_digits_are_no_difference() -> None:
    small = {name: x * 1e-3 for name, x in taps().items()}  # printed with 4 decimals: 0.0012
    c = compare(trace(EXACT, small), trace(ENGINE, small, as_sample), floor=1e-12)
    assert max(row.nmse for row in c.rows) > 1e-12
    assert c.first_divergence is None
    rounded = {n: Stats({"rms": round(stats_of(x)["rms"], 4)}, None, {"rms": 4}) for n, x in small.items()}
    c = compare(trace(EXACT, small), Trace(ENGINE, {n: (s,) for n, s in rounded.items()}), floor=1e-12)
    assert c.first_divergence is None


def test_evidence_works_in_both_directions() -> None:
    ref, test = taps(), taps()
    test["Vcur-0"] = -test["Vcur-0"]
    for as_evidence in (fingerprint, as_sample):
        c = compare(trace(EXACT, ref, as_evidence), trace(ENGINE, test))
        assert c.first_divergence is not None
        assert c.first_divergence.tap == "Vcur-0"
        both = compare(trace(EXACT, ref, as_evidence), trace(ENGINE, test, as_evidence))
        assert both.first_divergence is not None
        assert both.first_divergence.tap == "Vcur-0"
        worst = c.first_divergence.worst
        assert worst is None or worst.ref == pytest.approx(ref["Vcur-0"][worst.index].item(), abs=1e-4)


def test_values_that_are_not_finite_differ() -> None:
    test = taps()
    test["l_out-0"][2, 3] = math.nan
    c = compare(trace(EXACT, taps()), trace(ENGINE, test))
    assert c.first_divergence is not None
    assert c.first_divergence.tap == "l_out-0"
    assert c.first_divergence.worst is not None
    assert c.first_divergence.worst.index == (2, 3)
    assert "1 values are not finite" in c.first_divergence.note


def test_other_shapes_differ() -> None:
    test = taps() | {"Vcur-0": torch.ones(T, E + 1)}
    c = compare(trace(EXACT, taps()), trace(ENGINE, test))
    assert c.first_divergence is not None
    assert "shapes [4, 32] and [4, 33]" in c.first_divergence.note


def test_floors() -> None:
    same = trace(EXACT, taps())
    assert {r.floor for r in compare(same, trace(EXACT, taps())).rows} == {EXACT_FLOOR}
    assert {r.floor for r in compare(same, trace(ENGINE, taps())).rows} == {ROUNDING_FLOOR}
    emulated = {name: noisy(x, 1e-5) for name, x in taps().items()}
    predicted = compare(same, trace(ENGINE, taps()), predicted=trace(ENGINE, emulated))
    assert [r.floor for r in predicted.rows] == pytest.approx([PREDICTED_TIMES * 1e-5 + EXACT_FLOOR] * 6, rel=1e-3)
    knowing = trace(replace(EXACT, predicted=dict.fromkeys(taps(), 1e-5)), taps())
    assert [r.floor for r in compare(knowing, trace(ENGINE, taps())).rows] == pytest.approx([PREDICTED_TIMES * 1e-5 + EXACT_FLOOR] * 6)
    assert {r.floor for r in compare(knowing, trace(EXACT, taps())).rows} == {EXACT_FLOOR}
    worse = trace(ENGINE, {name: noisy(x, 6e-5) for name, x in taps().items()})
    assert compare(same, worse, predicted=trace(ENGINE, emulated)).first_divergence is not None


def test_the_last_positions_only() -> None:
    ref, test = taps(), {n: x[2:] for n, x in taps().items()}
    there = Trace(ENGINE, {name: (Full(x, (2, 3)),) for name, x in test.items()})
    assert compare(trace(EXACT, ref), there).first_divergence is None
    shifted = Trace(ENGINE, {name: (Full(x, (1, 2)),) for name, x in test.items()})
    assert compare(trace(EXACT, ref), shifted).first_divergence is not None


def test_the_last_position_of_a_log_without_ids() -> None:
    ref = taps()
    silent = Origin("log")
    at_end = Trace(silent, {n: (Stats({"rms": stats_of(x[-1])["rms"]}, (-1,)),) for n, x in ref.items()})
    c = compare(trace(EXACT, ref), at_end)
    assert len(c.rows) == len(ref)
    assert c.first_divergence is None
    assert "taken on trust" in " ".join(c.notes)
    wrong = Trace(silent, {n: (Stats({"rms": stats_of(x[0])["rms"]}, (-1,)),) for n, x in ref.items()})
    assert compare(trace(EXACT, ref), wrong).first_divergence is not None


@pytest.mark.parametrize("as_evidence", [Full, fingerprint])
def test_every_step_of_a_decoding_log_is_compared(as_evidence: Callable[[Tensor], Evidence]) -> None:
    def steps(x: Tensor, wrong: int | None) -> tuple[Evidence, ...]:
        rows = [-x[t : t + 1] if t == wrong else x[t : t + 1] for t in range(T)]
        return tuple(replace(as_evidence(row), positions=(t,)) for t, row in enumerate(rows))

    ref = taps()
    right = compare(trace(EXACT, ref), Trace(ENGINE, {n: steps(x, None) for n, x in ref.items()}))
    assert right.first_divergence is None
    assert len(right.rows) == T * len(ref)
    c = compare(trace(EXACT, ref), Trace(ENGINE, {n: steps(x, 3 if n == "Vcur-0" else None) for n, x in ref.items()}))
    assert [(row.tap, row.note) for row in c.rows if row.verdict == "differs"] == [("Vcur-0", "position 3")]


def test_a_sample_of_unknown_width() -> None:
    ref = taps()
    first = {n: Sample(x[-1, :10], torch.arange(10), (1, 10), (-1,)) for n, x in ref.items()}
    assert compare(trace(EXACT, ref), Trace(Origin("log"), {n: (s,) for n, s in first.items()})).first_divergence is None
    wrong = {n: (Sample(x[-1, 1:11], torch.arange(10), (1, 10), (-1,)),) for n, x in ref.items()}
    assert compare(trace(EXACT, ref), Trace(Origin("log"), wrong)).first_divergence is not None


def test_nothing_in_common_is_an_error() -> None:
    with pytest.raises(TraceContentError, match="nothing to compare"):
        compare(trace(EXACT, {"a": torch.ones(T, E)}), trace(ENGINE, {"b": torch.ones(T, E)}))
    elsewhere = Trace(ENGINE, {"embd": (Full(torch.ones(1, E), (9,)),)})
    with pytest.raises(TraceContentError, match="nothing to compare"):
        compare(trace(EXACT, taps()), elsewhere)
    with pytest.raises(TraceMismatchError):
        compare(trace(EXACT, taps()), trace(Origin("x", tokens=(2, 5, 6, 7)), taps()))


def test_half_split_channels_are_put_in_order() -> None:
    config = {"head_dim": 8, "rope": {"layout": "interleaved"}}
    ref = {"Qcur-0": torch.randn(T, E, generator=torch.Generator().manual_seed(1))}
    halves = ref["Qcur-0"].reshape(T, -1, 4, 2).transpose(-1, -2).reshape(T, E)  # [T,H,D/2,2] → [T,H,2,D/2]
    origin = Origin("reference", arithmetic="exact", tokens=TOKENS, config=config)
    c = compare(trace(origin, ref), trace(ENGINE, {"Qcur-0": halves}))
    assert c.rows[0].nmse == 0
    assert "half-split" in c.rows[0].note
    c = compare(trace(origin, {"Vcur-0": ref["Qcur-0"]}), trace(ENGINE, {"Vcur-0": halves}))
    assert c.first_divergence is not None  # v is never rotated, so never reordered


def test_graph_order() -> None:
    names = tap_names(12)
    shuffled = random.Random(0).sample(names, len(names))
    assert sorted(shuffled, key=graph_order) == list(names)
    assert sorted(["x", "l_out-0", "y-0", "result_output"], key=graph_order) == ["l_out-0", "result_output", "x", "y-0"]


def test_three_way_split() -> None:
    original, exact = taps(), {name: noisy(x, 1e-3) for name, x in taps().items()}
    engine = {name: noisy(x, 1e-2) for name, x in exact.items()}
    other_file = Origin("reference", arithmetic="exact float32", tokens=TOKENS, model_sha256="b" * 64)
    rows = three_way(trace(EXACT, exact), trace(ENGINE, engine), original=trace(other_file, original), predicted=trace(ENGINE, exact))
    assert [r.tap for r in rows] == ["l_out-0", "l_out-1"]
    for row in rows:
        assert row.quantization == pytest.approx(1e-3, rel=1e-2)
        assert row.engine == pytest.approx(1e-2, rel=1e-2)
        assert row.predicted == 0
    with pytest.raises(TraceContentError, match="no layer output"):
        three_way(trace(EXACT, {"embd": taps()["embd"]}), trace(ENGINE, taps()))


def test_answers_name_the_operation() -> None:
    test = taps()
    test["attn_out-0"] = -test["attn_out-0"]
    said = answer(compare(trace(EXACT, taps()), trace(ENGINE, test)))
    assert "The first tap that differs is attn_out-0" in said
    assert "the product with attn_output.weight" in said
    assert "The last tap shown to agree is Vcur-0" in said
    test = taps() | {"Vcur-0": taps(3)["Vcur-0"]}
    said = answer(compare(trace(EXACT, taps()), trace(ENGINE, test)))
    assert "Its input attn_norm-0 agrees, so the fault is in what makes it: the product with attn_v.weight" in said
    said = answer(compare(trace(EXACT, taps()), trace(ENGINE, taps(4))))
    assert "Nothing comes before it: it is the rows of token_embd.weight" in said
    assert "No divergence: all 6 taps" in answer(compare(trace(EXACT, taps()), trace(EXACT, taps())))
