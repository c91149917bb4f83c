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
from quantscope.remedy.correct import METHODS, Corrected, correct
from quantscope.remedy.equalize import Equalized
from quantscope.remedy.two_models import Rounded
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
    plain, corrected = Rounded(Equalized(weights), types), Rounded(Equalized(weights), types)
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
    def harmful(goal: Tensor, gram: Tensor, qtype: QuantType) -> np.ndarray:
        return encode((1.1 * goal).float().numpy(), qtype, goal.shape[1])

    monkeypatch.setattr(module, "_improved", harmful)
    name = "blk.2.ffn_up.weight"
    result = correct(weights, {name: types[name]}, texts[0][:4], texts[1])
    (row,) = result.rows
    assert not row.kept
    assert row.error > 1
    plain = encode(weights.get(name).numpy(), types[name], weights.shape(name)[1], importance=result.importance[name].numpy())
    assert np.array_equal(result.replacements[name], plain)


@pytest.fixture(scope="module")
def everything(weights: Weights, types: dict[str, QuantType], texts: tuple[Tensor, Tensor, Tensor]) -> Corrected:
    return correct(weights, types, texts[0], texts[1], methods=METHODS)


def test_all_corrections_together_are_nearer_on_a_third_text(
    weights: Weights, types: dict[str, QuantType], texts: tuple[Tensor, Tensor, Tensor], everything: Corrected
) -> None:
    plain, corrected = Rounded(Equalized(weights), types), Rounded(Equalized(weights), types)
    plain.bytes = {name: encode(weights.get(name).numpy(), types[name], weights.shape(name)[1]) for name in types}
    corrected.bytes, corrected.floats = dict(everything.replacements), {**everything.floats, **everything.extra}
    assert kl(weights, corrected, texts[2]) < 0.8 * kl(weights, plain, texts[2])
    assert {row.correction for row in everything.rows} == set(METHODS) - {"scales"}  # rounding has them in it
    for row in everything.rows:
        helped = row.error < 1 and row.error_elsewhere < 1 and row.kl[1] < row.kl[0] and row.kl_elsewhere[1] < row.kl_elsewhere[0]
        assert row.kept == helped, row


class Outliers(Weights):
    """The model with some channels of a norm 40 times as large and the columns that read them as small: the same function."""

    def get(self, name: str) -> Tensor:
        factor = {"ffn_norm": 40.0, "ffn_gate": 1 / 40, "ffn_up": 1 / 40}.get(name.split(".")[-2]) if name.startswith("blk.1.") else None
        values = super().get(name)
        if factor is None:
            return values
        values = values.clone()
        values[..., 3::16] *= factor
        return values


def test_equalizing_undoes_outlier_channels(types: dict[str, QuantType], texts: tuple[Tensor, Tensor, Tensor]) -> None:
    weights = Outliers(open_source(STORIES))
    names = [f"blk.1.ffn_{m}.weight" for m in ("gate", "up")]
    result = correct(weights, {name: types[name] for name in names}, texts[0][:8], texts[1], methods=("equalize",))
    row = next(row for row in result.rows if row.name == "blk.1.ffn_norm.weight")
    assert row.kept
    assert row.error_elsewhere < 0.5  # half of the error was the outliers'
    norm = result.floats["blk.1.ffn_norm.weight"] / Weights(open_source(STORIES)).get("blk.1.ffn_norm.weight")
    outliers, others = norm[3::16], torch.cat([norm[k::16] for k in range(16) if k != 3])
    assert float(outliers.median() / others.median()) < 4  # of 40


def test_only_what_was_kept_is_changed(weights: Weights, everything: Corrected) -> None:
    kept = {c: {row.name for row in everything.rows if row.kept and row.correction == c} for c in METHODS}
    assert kept["bias"] == set(everything.extra)
    assert kept["norms"] <= set(everything.floats)
    makers = {name for name in kept["equalize"] if "norm" in name}
    assert {name for name in everything.floats if "norm" in name} == kept["norms"] | makers
    for name, values in everything.floats.items():
        assert not torch.equal(values, weights.get(name)), name


def test_scales_alone_leave_the_codes(weights: Weights, types: dict[str, QuantType], texts: tuple[Tensor, Tensor, Tensor]) -> None:
    name = "blk.2.ffn_up.weight"
    result = correct(weights, {name: types[name]}, texts[0][:8], texts[1], methods=("scales",))
    (row,) = result.rows
    assert (row.correction, row.error < 1) == ("scales", True)
    plain = encode(weights.get(name).numpy(), types[name], weights.shape(name)[1], importance=result.importance[name].numpy())
    different = (plain != result.replacements[name]).reshape(-1, 18)  # Q4_0: d:2 qs:16
    assert row.kept == different[:, :2].any()
    assert not different[:, 2:].any()


def test_no_bias_where_llama_cpp_loads_none(
    weights: Weights, types: dict[str, QuantType], texts: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BIASES", {})
    result = correct(weights, {"blk.0.attn_v.weight": types["blk.0.attn_v.weight"]}, texts[0][:4], texts[1], methods=("bias",))
    assert result.notes == ("no bias was corrected: llama.cpp loads none with the architecture llama.",)
    assert not result.extra
    assert not result.rows


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
