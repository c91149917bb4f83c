"""Meters: layer tables and logit statistics are the formulas of metrics.py applied to what was walked."""

from __future__ import annotations

import math

import pytest
import torch

from quantscope import metrics
from quantscope.meters import LayerMeter, LogitMeter, NextToken

B, T, V = 2, 8, 20
FIRST, LAST = 4, 7
IDS = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(1))
LOGITS = torch.randn(2, B, T, V, generator=torch.Generator().manual_seed(2))  # [member,B,T,V]


def metered(slice_length: int, *, labelled: bool = True, has_reference: bool = True) -> LogitMeter:
    meter = LogitMeter(2, first=FIRST, last=LAST, has_reference=has_reference, labelled=labelled)
    for b in range(B):
        for start in range(0, T, slice_length):
            meter.logits(IDS, b, start, [x[b, start : start + slice_length] for x in LOGITS])
    return meter


@pytest.mark.parametrize("slice_length", [1, 3, T])
def test_logit_statistics_are_those_of_the_scored_positions(slice_length: int) -> None:
    stats = metered(slice_length).stats(1)
    ref, test = (x[:, FIRST:LAST].flatten(0, 1) for x in LOGITS)
    labels = IDS[:, FIRST + 1 : LAST + 1].flatten()
    assert stats.n_positions == B * (LAST - FIRST)
    assert stats.kl_nats == pytest.approx(float(metrics.kl_nats(ref, test).mean()))
    assert stats.kl_nats_max == pytest.approx(float(metrics.kl_nats(ref, test).max()))
    assert stats.top1_agree == pytest.approx(float(metrics.top1_agree(ref, test).double().mean()))
    assert stats.ppl == pytest.approx(float(metrics.ppl(test, labels)))
    assert stats.rms_dp == pytest.approx(float(metrics.rms_dp(ref, test, labels)))
    assert stats.ln_ppl_ratio == pytest.approx(math.log(float(metrics.ppl(test, labels) / metrics.ppl(ref, labels))))


def test_the_original_has_no_divergence_and_a_prompt_no_perplexity() -> None:
    meter = metered(T)
    assert meter.stats(0).kl_nats is None
    assert meter.stats(0).ppl is not None
    assert meter.stats(0).n_positions == meter.stats(1).n_positions
    prompt = metered(T, labelled=False)
    assert prompt.stats(1).ppl is None
    assert prompt.stats(1).kl_nats is not None
    assert metered(T, has_reference=False).stats(1).kl_nats is None


def test_layer_table_positions_and_comparison() -> None:
    shape = (1, 3, 4)
    tensors = {name: torch.randn(shape) for name in ("embd", "l_out-0", "ffn_swiglu-0")}
    meter, last = LayerMeter(1, 2), LayerMeter(1, 2, "last")
    for m in (meter, last):
        for name, x in tensors.items():
            m.tap(0, name, None, x)
            m.tap(1, name, x, x + 0.1)
    (row,) = meter.rows(1, compared=True)
    assert row.input_rms == pytest.approx(float(metrics.rms((tensors["embd"] + 0.1).flatten())))
    assert row.mean == pytest.approx(float((tensors["l_out-0"] + 0.1).mean()), rel=1e-5)
    out = tensors["l_out-0"]
    assert row.nmse == pytest.approx(float(metrics.nmse(out.flatten(), (out + 0.1).flatten())))
    assert meter.rows(0, compared=False)[0].nmse is None
    assert last.rows(0, compared=False)[0].output_rms == pytest.approx(float(metrics.rms(out[:, -1].flatten())))


def test_next_token_is_after_the_last_position_of_the_first_chunk() -> None:
    token = NextToken()
    for b in range(B):
        for start in range(0, T, 3):
            token.logits(b, [x[b, start : start + 3] for x in LOGITS])
    own, ref = LOGITS[1, 0, -1].double(), LOGITS[0, 0, -1].double()
    best = int(own.argmax())
    got = token.generated(1, {best: "x"}, has_reference=True)
    assert (got.id, got.text, got.rank) == (best, "x", 1)
    assert got.prob == pytest.approx(float(own.softmax(-1)[best]))
    assert got.rank_in_original == int((ref > ref[best]).sum()) + 1
    assert token.generated(1, {best: "x"}, has_reference=False).rank_in_original is None
