"""Corrections of a real trained model: same types and bytes, nearer predictions on a third text, and nothing kept that did not help."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from quantscope.errors import PromptError
from quantscope.metrics import kl_nats
from quantscope.model.forward import forward
from quantscope.model.taps import Recorder
from quantscope.qtypes import QTYPES, QuantType
from quantscope.quants import encode
from quantscope.remedy import correct as module
from quantscope.remedy.calibration import calibration
from quantscope.remedy.correct import Corrected, Rounded, correct
from quantscope.sources.resolve import open_source
from quantscope.weights import Weights
from tests.models import STORIES

N_CTX = 64
TEXT = Path(__file__).parents[2] / "quantscope" / "data" / "demo.txt"


@pytest.fixture(scope="module")
def weights() -> Weights:
    return Weights(open_source(STORIES), keep=True)


@pytest.fixture(scope="module")
def texts(weights: Weights) -> tuple[Tensor, Tensor, Tensor]:
    """Calibration, elsewhere, and a third one."""
    ids, rest = calibration(weights.source, weights.config, TEXT, N_CTX, 40)
    return ids, rest[:4], rest[4:8]


@pytest.fixture(scope="module")
def types(weights: Weights) -> dict[str, QuantType]:
    """ffn_down, whose rows no block of 32 fills, stays as it is."""
    return {name: QTYPES["Q4_0"] for name in weights.stored_names() if len(weights.shape(name)) == 2 and weights.shape(name)[1] % 32 == 0}


@pytest.fixture(scope="module")
def done(weights: Weights, types: dict[str, QuantType], texts: tuple[Tensor, Tensor, Tensor]) -> Corrected:
    return correct(weights, types, texts[0], texts[1])


def kl(weights: Weights, rounded: Rounded, ids: Tensor) -> float:
    return float(kl_nats(forward(ids, weights), forward(ids, rounded)).mean())


def test_predictions_are_nearer_on_a_third_text(
    weights: Weights, types: dict[str, QuantType], texts: tuple[Tensor, Tensor, Tensor], done: Corrected
) -> None:
    plain, corrected = Rounded(weights, types), Rounded(weights, types)
    plain.bytes = {name: encode(weights.get(name).numpy(), types[name], weights.shape(name)[1]) for name in types}
    corrected.bytes = dict(done.replacements)
    assert {name: len(raw) for name, raw in corrected.bytes.items()} == {name: len(raw) for name, raw in plain.bytes.items()}
    assert kl(weights, corrected, texts[2]) < 0.8 * kl(weights, plain, texts[2])
    assert sum(row.kept for row in done.rows) > len(done.rows) / 2


def test_what_is_kept_helped_on_both_texts_and_what_is_not_is_plain(weights: Weights, done: Corrected, types: dict[str, QuantType]) -> None:
    for row in done.rows:
        helped = row.error < 1 and row.error_elsewhere < 1 and row.kl[1] < row.kl[0] and row.kl_elsewhere[1] < row.kl_elsewhere[0]
        assert row.kept == helped, row
        importance = done.importance[row.name].numpy()
        raw = encode(weights.get(row.name).numpy(), types[row.name], weights.shape(row.name)[1], importance=importance)
        assert row.kept != np.array_equal(raw, done.replacements[row.name]), row


def test_a_correction_that_does_harm_is_reported_and_not_applied(
    weights: Weights, types: dict[str, QuantType], texts: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def harmful(w: Tensor, s: object, qtype: QuantType) -> np.ndarray:
        return encode((1.1 * w).float().numpy(), qtype, w.shape[1])

    monkeypatch.setattr(module, "_corrected", harmful)
    name = "blk.2.ffn_up.weight"
    result = correct(weights, {name: types[name]}, texts[0][:4], texts[1])
    (row,) = result.rows
    assert not row.kept
    assert row.error > 1
    plain = encode(weights.get(name).numpy(), types[name], weights.shape(name)[1], importance=result.importance[name].numpy())
    assert np.array_equal(result.replacements[name], plain)


def test_the_importance_is_the_mean_square_of_the_originals_inputs(
    weights: Weights, texts: tuple[Tensor, Tensor, Tensor], done: Corrected
) -> None:
    seen = Recorder()
    forward(texts[0], weights, seen)
    for tap, name in (("attn_norm-0", "blk.0.attn_k.weight"), ("kqv_out-3", "blk.3.attn_output.weight")):
        expected = seen.taps[tap].double().square().mean((0, 1)).float()
        torch.testing.assert_close(done.importance[name], expected, rtol=1e-4, atol=0)


def test_a_text_that_is_too_short_says_how_much_is_needed(weights: Weights, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text(TEXT.read_text("utf-8")[:900], "utf-8")
    with pytest.raises(PromptError, match=r"expected at least 344: 2 for each of the 172 inputs"):
        calibration(weights.source, weights.config, short, N_CTX)
