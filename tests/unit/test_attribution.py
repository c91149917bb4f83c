"""The split of the logits: numbers against sums by hand, and what the sentences may and may not say."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from quantscope.diagnose.activation_rounding import ActivationRounding, Channel
from quantscope.diagnose.attribution import KL_FLOOR, LogitSplit, sentences, split_logits, verdict, within
from quantscope.errors import ShapeError


def logits(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def kl(p: tuple[float, ...], q: tuple[float, ...]) -> float:
    a, b = (np.exp(x) / np.exp(x).sum() for x in (np.array(p), np.array(q)))
    return float((a * np.log(a / b)).sum())


ORIGINAL, EXACT, EXPECTED, ENGINE = (2.0, 1.0, 0.0), (1.8, 1.1, 0.0), (1.79, 1.12, 0.0), (0.5, 2.0, 0.3)
SPLIT = LogitSplit(
    n=40,
    quantization=0.030,
    expected=0.031,
    engine=0.41,
    own_expected=0.0004,
    own_engine=0.36,
    tokens=(5, 5, 5, 9),
    changed_by_quantization=2,
    changed_by_rounding=1,
    changed_by_engine=30,
)
CLEAN = replace(SPLIT, engine=0.0312, own_engine=0.0005, tokens=(5, 5, 5, 5), changed_by_engine=1)
CHANGED = replace(CLEAN, tokens=(5, 5, 7, 7))  # the expected arithmetic itself changes the token
ROUNDING = ActivationRounding(5, 7, 0.8, -0.3, ("ffn_norm-3",), 0.02, ("ffn_norm-3",), (Channel("ffn_norm-3", 100, 256, 18.0, 0.93),), 12)


def test_divergences_by_hand() -> None:
    s = split_logits(logits(EXACT, EXACT), logits(EXPECTED, EXACT), logits(ENGINE, EXACT), logits(ORIGINAL, ORIGINAL))
    quantized = kl(ORIGINAL, EXACT)  # of the second position, in all three
    assert s.quantization == pytest.approx(quantized)
    assert s.expected == pytest.approx((kl(ORIGINAL, EXPECTED) + quantized) / 2)
    assert s.engine == pytest.approx((kl(ORIGINAL, ENGINE) + quantized) / 2)
    assert s.own_expected == pytest.approx(kl(EXACT, EXPECTED) / 2)
    assert s.own_engine == pytest.approx(kl(EXACT, ENGINE) / 2)
    assert (s.n, s.tokens) == (2, (0, 0, 0, 0))
    assert (s.changed_by_quantization, s.changed_by_rounding, s.changed_by_engine) == (0, 0, 1)


def test_without_an_original_the_file_itself_is_the_base() -> None:
    s = split_logits(logits(EXACT), logits(EXPECTED), logits(ENGINE))
    assert (s.quantization, s.changed_by_quantization, s.tokens) == (None, None, (None, 0, 0, 1))
    assert (s.expected, s.engine) == (s.own_expected, s.own_engine)
    text = " ".join(sentences(s))
    assert "there is no original, so quantization is not measured" in text
    assert "Quantization alone" not in text
    assert "unexplained, implementation" in text


def test_float32_logits_are_summed_in_float64() -> None:
    base = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0)) * 5
    moved = base + 1e-5 * torch.randn(3, 5000, generator=torch.Generator().manual_seed(1))
    s = split_logits(base, base, moved)
    assert 0 < s.own_engine < 1e-9  # float32 sums of 5000 terms would be off by more
    assert s.own_expected == 0
    assert s.explained


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_unexplained(broken: float) -> None:
    s = split_logits(logits(EXACT), logits(EXPECTED), logits((broken, 1.0, 0.0)))
    assert s.own_engine == math.inf
    assert verdict(s) == "unexplained"
    assert "not finite, which is unexplained" in sentences(s)[0]


@pytest.mark.parametrize("shape", [(3,), (0, 3), (1, 2, 3)])
def test_wrong_shapes_are_refused(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape)
    with pytest.raises(ShapeError):
        split_logits(x, x, x)
    with pytest.raises(ShapeError):
        split_logits(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(1, 3))


# ---- Verdict ------------------------------------------------------------------------------------------------------------


def test_an_engine_as_near_to_the_original_as_quantization_is_still_judged_by_its_own_file() -> None:
    """Quantization may hide an engine's fault in the divergence from the original; it has no part in that from the exact file."""
    hidden = replace(SPLIT, quantization=0.5, expected=0.501, engine=0.49, own_expected=0.0004, own_engine=0.05)
    assert verdict(hidden) == "unexplained"
    assert "as near to the original, but not in the same way" in sentences(hidden)[0]


def test_the_rule_at_its_edges() -> None:
    assert within(4 * 0.001, 0.001)
    assert not within(4.01 * 0.001, 0.001)
    assert within(KL_FLOOR, 0.0)
    assert not within(2 * KL_FLOOR, 0.0)
    assert not within(math.nan, 1.0)


@pytest.mark.parametrize(
    ("split", "rounding", "expected"),
    [
        (SPLIT, None, "unexplained"),
        (SPLIT, ROUNDING, "unexplained"),
        (CLEAN, None, "within"),
        (replace(CLEAN, own_engine=0.00001), None, "below"),
        (CHANGED, None, "within"),
        (CHANGED, ROUNDING, "activation rounding"),
        (CHANGED, replace(ROUNDING, places=(), left=1.0), "within"),  # nothing restores the token
        (CHANGED, replace(ROUNDING, rounded_token=8), "within"),  # of another prompt
        (replace(CHANGED, tokens=(5, 5, 7, 5)), ROUNDING, "within"),  # the engine kept the token
        (replace(CHANGED, tokens=(5, 5, 7, 8)), ROUNDING, "within"),  # the engine has a third one
        (replace(CHANGED, own_engine=0.36), ROUNDING, "unexplained"),
    ],
)
def test_verdicts(split: LogitSplit, rounding: ActivationRounding | None, expected: str) -> None:
    assert verdict(split, rounding) == expected
    last = sentences(split, rounding)[-1]
    assert last.startswith("Activation rounding, not the weights") == (expected == "activation rounding")


# ---- Wording ------------------------------------------------------------------------------------------------------------


def test_the_pattern_of_the_sentence() -> None:
    assert sentences(SPLIT)[0] == (
        "Quantization alone raises KL from 0 to 0.0300 nats; this engine's expected arithmetic brings it to 0.0310; the engine measures "
        "0.410: the rise from 0.0310 is unexplained, implementation (0.360 nats from the exact execution of its own file, expected "
        "0.000400)."
    )
    assert sentences(SPLIT)[1] == (
        "Greedy token of the last position: original 5, quantized file exactly 5, expected arithmetic 5, engine 9; of 40 positions "
        "changed: 2 by quantization, 1 by the expected arithmetic and 30 by the engine."
    )
    assert len(sentences(SPLIT)) == 2


def test_activation_rounding_names_the_tap_the_channel_and_the_proof() -> None:
    assert sentences(CHANGED, ROUNDING)[-1] == (
        "Activation rounding, not the weights and no fault found in the code: the emulated arithmetic gives the engine's token 7, and "
        "exact activations at ffn_norm-3 restore token 5, and all but 2.0% of the error of the logits goes with it. Channel 100 of "
        "ffn_norm-3, 18.0 times the RMS, sets the scale of blocks of 256 that make 93% of the rounding error there."
    )


def test_what_was_not_shown_is_not_said() -> None:
    assert "was not tested" in sentences(CHANGED)[-1]
    assert "restore it at no tap" in sentences(CHANGED, replace(ROUNDING, places=(), left=1.0))[-1]
    tie = replace(ROUNDING, gap_exact=0.01)
    assert "the two tokens are only 0.0100 apart, where smaller changes decide as well" in sentences(CHANGED, tie)[-1]
    assert "but the engine gives 8" in sentences(replace(CHANGED, tokens=(5, 5, 7, 8)), ROUNDING)[-1]
    assert "but it is not all" in sentences(replace(CHANGED, own_engine=0.36), ROUNDING)[-1]
    for split in (SPLIT, CLEAN, CHANGED, replace(CLEAN, own_engine=0.00001)):
        for rounding in (None, ROUNDING):
            text = " ".join(sentences(split, rounding)).lower()
            assert "no bug" not in text
            assert "bug-free" not in text
            assert "correct" not in text
            assert "minus" not in text  # KL divergences are not subtracted
