"""The emulated arithmetic by its definitions: codes and scales, sums that are exact, operations against float64, the forward's parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from quantscope.images import Images, Requantized
from quantscope.model import ggml_arithmetic as emulation
from quantscope.model.arithmetic import EXACT
from quantscope.model.forward import KVCache, forward
from quantscope.model.ggml_arithmetic import ggml_arithmetic
from quantscope.model.rope import RopeTables, rotate
from quantscope.model.taps import Recorder
from quantscope.qtypes import QTYPES, QuantType
from quantscope.quants import decode, set_threads, thread_count
from quantscope.quants.activations import round_activations
from quantscope.quants.dots import product
from quantscope.quants.float_dots import float_product
from quantscope.quants.float_ops import cos_sin, softmax, swiglu
from quantscope.quants.integers import LAYOUTS, integers
from quantscope.sources.resolve import open_source
from quantscope.weights import Weights
from tests.models import make_gguf

finite = arrays.arrays(np.float32, (3, 256), elements=st.floats(-(2.0**40), 2.0**40, width=32))


def nmse(ref: np.ndarray, test: np.ndarray) -> float:
    ref, test = np.asarray(ref, np.float64), np.asarray(test, np.float64)
    assert ref.size > 0
    return float(((ref - test) ** 2).sum() / (ref**2).sum())


def random_blocks(qtype: QuantType, n: int, seed: int = 0) -> np.ndarray:
    """Any codes; scales are what they are in a trained model's file, so that nothing overflows."""
    blocks = np.random.default_rng(seed).integers(0, 256, (n, qtype.type_size), dtype=np.uint8)
    layout = LAYOUTS[qtype.name]
    sample = np.random.default_rng(seed + 1).uniform(0.01, 0.03, (n, 1)).astype("<f2").view(np.uint8)
    for at in HALVES.get(qtype.name, ()):
        blocks[:, at : at + 2] = sample
    if qtype.name == "MXFP4":
        blocks[:, 0] = np.random.default_rng(seed).integers(118, 126, n)
    if qtype.name == "IQ1_M":
        blocks[:, 55] = blocks[:, 55] & 15 | 0x20  # the float16's exponent
    assert layout.activation in ("Q8_0", "Q8_1", "Q8_K")
    return blocks


HALVES = {
    **dict.fromkeys(
        ("Q4_0", "Q5_0", "Q8_0", "Q1_0", "Q2_0", "IQ4_NL", "IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), (0,)
    ),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_integers_and_scales_are_the_weights(name: str) -> None:
    qtype = QTYPES[name]
    blocks = random_blocks(qtype, 200)
    before = blocks.copy()
    w = integers(blocks, qtype)
    assert np.array_equal(blocks, before)  # they may be a memory map
    values = np.repeat(w.scales.astype(np.float64), qtype.block_size // w.scales.shape[1], axis=1) * w.codes
    if w.minima is not None:
        values -= w.min_scales * np.repeat(w.minima, 16, axis=1)
    elif w.min_scales is not None:
        values += w.min_scales
    decoded = decode(blocks.reshape(-1), qtype).reshape(len(blocks), -1)
    np.testing.assert_allclose(decoded, values, rtol=1e-5, atol=1e-6)
    assert np.abs(w.codes).max() <= 1 << 12
    assert len(np.unique(w.codes)) > 1


@settings(max_examples=60, deadline=None)
@given(x=finite, kind=st.sampled_from(("Q8_0", "Q8_1", "Q8_K")))
def test_rounded_activations(x: np.ndarray, kind: str) -> None:
    a = round_activations(x, kind)
    unit = 256 if kind == "Q8_K" else 32
    blocks = x.reshape(3, -1, unit).astype(np.float64)
    codes = a.codes[:3].reshape(blocks.shape).astype(np.int64)
    peak = np.abs(blocks).max(-1)
    assert np.abs(codes).max() <= 127
    assert not a.codes[3:].any()
    assert (np.abs(codes).max(-1)[peak > 2.0**-120] == 127).all()  # below, 127 / peak overflows, and the scale is 0
    representable = (peak / 127 < 65504) if kind != "Q8_K" else peak >= 0
    step = np.where(peak > 0, peak / 127, 0)[..., None]
    assert (np.abs(np.abs(codes) * step - np.abs(blocks))[representable] <= (0.5001 * step + 1e-30)[representable].repeat(unit, -1)).all()
    if kind == "Q8_K":
        assert np.array_equal(a.sums[:3], codes.reshape(3, 16, 16).sum(-1))


def test_zero_and_nan_activations_end() -> None:
    for kind in ("Q8_0", "Q8_1", "Q8_K"):
        a = round_activations(np.zeros((2, 256), np.float32), kind)
        assert not a.codes.any()
        assert not a.scales.any()
        round_activations(np.full((2, 256), np.nan, np.float32), kind)  # any result, but it returns


@pytest.mark.parametrize("name", LAYOUTS)
def test_products_against_float64(name: str) -> None:
    """Rows and outputs that fill no tile, more than one band, two threads."""
    qtype, K = QTYPES[name], 512
    for n_rows, n_out in ((1, 3), (5, 8), (11, 37)):
        raw = random_blocks(qtype, n_out * K // qtype.block_size, n_rows).reshape(n_out, -1)
        x = np.random.default_rng(n_rows).standard_normal((n_rows, K)).astype(np.float32)
        a = round_activations(x, LAYOUTS[name].activation)
        rounded = a.codes[:n_rows].reshape(n_rows, a.scales.shape[1], -1).astype(np.float64) * a.scales[:n_rows, :, None]
        w = decode(raw.reshape(-1), qtype).reshape(n_out, K).astype(np.float64)
        ours = product(x, raw, qtype)
        bound = 1e-6 if LAYOUTS[name].activation == "Q8_1" else 1e-11  # the float16 sums of Q8_1
        assert nmse(rounded.reshape(n_rows, K) @ w.T, ours) <= bound


def test_extreme_codes_do_not_overflow() -> None:
    """256 products of the greatest code and the greatest activation are still below 2³¹."""
    raw = np.full((8, 110), 0xFF, np.uint8)  # IQ3_S: the greatest points and scales, all negative
    raw[:, :2] = np.array([1.0], "<f2").view(np.uint8)
    w = decode(raw.reshape(-1), QTYPES["IQ3_S"]).reshape(8, 256)
    x = np.full((1, 256), 127, np.float32)
    assert np.array_equal(product(x, raw, QTYPES["IQ3_S"]), (w.astype(np.float64) @ x.T.astype(np.float64)).T.astype(np.float32))


def test_bands_and_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = random_blocks(QTYPES["Q4_K"], 80).reshape(80, -1)
    x = np.random.default_rng(0).standard_normal((9, 256)).astype(np.float32)
    whole, before = product(x, raw, QTYPES["Q4_K"]), thread_count()
    monkeypatch.setattr("quantscope.quants.dots.BAND", 16 * 256)
    try:
        for n in (1, 3):
            set_threads(n)
            assert np.array_equal(product(x, raw, QTYPES["Q4_K"]), whole)
    finally:
        set_threads(before)


@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize(("n_rows", "n_out", "K"), [(1, 3, 5), (4, 16, 64), (7, 33, 100)])
def test_float_products(n_rows: int, n_out: int, K: int, by_rows: bool) -> None:
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((n_rows, K)).astype(np.float32), rng.standard_normal((n_out, K)).astype(np.float32)
    assert nmse(x.astype(np.float64) @ w.T.astype(np.float64), float_product(x, w, by_rows=by_rows)) <= 1e-13


def test_swiglu_and_softmax_against_float64() -> None:
    rng = np.random.default_rng(0)
    gate = np.concatenate([rng.standard_normal(60) * 8, [-200, 200, 0, -88.5]]).astype(np.float32).reshape(4, 16)
    up = rng.standard_normal((4, 16)).astype(np.float32)
    np.testing.assert_allclose(swiglu(gate, up), gate / (1 + np.exp(-gate.astype(np.float64))) * up, rtol=1e-6, atol=1e-30)
    assert np.array_equal(swiglu(gate[:, :7], up[:, :7]), swiglu(gate, up)[:, :7])  # no whole number of lanes
    scores = (rng.standard_normal((3, 5, 32)) * 20).astype(np.float32)
    expected = scores.astype(np.float64) * 0.25
    expected[:, np.arange(32) > 7 + np.arange(5)[:, None]] = -np.inf
    expected = np.exp(expected - expected.max(-1, keepdims=True))
    softmax(scores, 0.25, 7)
    np.testing.assert_allclose(scores, expected / expected.sum(-1, keepdims=True), rtol=5e-6, atol=1e-38)  # exponents to 30, in float32
    assert (scores[0, 0, 8:] == 0).all()


def test_cos_and_sin() -> None:
    angles = np.linspace(-50, 600, 4001, dtype=np.float32)
    cos, sin = cos_sin(angles)
    np.testing.assert_allclose(cos, np.cos(angles.astype(np.float64)), atol=1e-7)
    np.testing.assert_allclose(sin, np.sin(angles.astype(np.float64)), atol=1e-7)


@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_rotation_is_the_exact_one_up_to_rounding(layout: str) -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, 20, generator=rng)  # 16 of 20 channels turn
    angles = torch.randn(5, 8, generator=rng)
    tables = RopeTables(angles.cos(), angles.sin(), layout)  # type: ignore[arg-type]
    turned = ggml_arithmetic().rotate(x, tables, "q")
    torch.testing.assert_close(turned, rotate(x, tables), rtol=1e-5, atol=1e-6)
    assert torch.equal(turned[..., 16:], x[..., 16:])


def taps_of(weights: object, arithmetic: object, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    recorder = Recorder()
    forward(ids, weights, recorder, arithmetic=arithmetic)  # type: ignore[arg-type]
    return recorder.taps


IDS = torch.tensor([[1, 5, 9, 200, 31, 7, 8, 100, 2, 3, 4]])


def test_exact_is_the_default(tmp_path: Path) -> None:
    weights = Weights(open_source(make_gguf(tmp_path / "m.gguf")))
    assert torch.equal(forward(IDS, weights), forward(IDS, weights, arithmetic=EXACT))


def test_nothing_is_rounded_in_an_f32_file_with_an_f32_cache(tmp_path: Path) -> None:
    weights = Weights(open_source(make_gguf(tmp_path / "m.gguf")))
    ours, exact = taps_of(weights, ggml_arithmetic("F32"), IDS), taps_of(weights, EXACT, IDS)
    assert list(ours) == list(exact)
    assert max(nmse(exact[name].numpy(), x.numpy()) for name, x in ours.items()) <= 1e-11


@pytest.mark.parametrize(
    ("dtype", "least", "most"), [("F16", 1e-9, 1e-6), ("BF16", 1e-7, 1e-4), ("Q8_0", 1e-6, 1e-3), ("Q5_1", 1e-6, 1e-3)]
)
def test_the_size_of_what_rounding_does(dtype: str, least: float, most: float, tmp_path: Path) -> None:
    """2⁻¹¹, 2⁻⁸ and 1/254 of the greatest of 32: squared, over 12, a few times over."""
    weights = Weights(open_source(make_gguf(tmp_path / "m.gguf", dtype=dtype)))
    error = nmse(forward(IDS, weights).numpy(), forward(IDS, weights, arithmetic=ggml_arithmetic("F16")).numpy())
    assert least < error < most


def test_the_cache_rounds_what_it_should(tmp_path: Path) -> None:
    """With F32 weights an F16 cache changes the probabilities, not q and k."""
    weights = Weights(open_source(make_gguf(tmp_path / "m.gguf")))
    f16, f32 = taps_of(weights, ggml_arithmetic("F16"), IDS), taps_of(weights, ggml_arithmetic("F32"), IDS)
    assert torch.equal(f16["Kcur-0"], f32["Kcur-0"])
    assert 1e-9 < nmse(f32["kqv_out-0"].numpy(), f16["kqv_out-0"].numpy()) < 1e-6
    half = f32["Kcur-0"].half().float()
    assert nmse(f32["kq_soft_max-0"].numpy(), f16["kq_soft_max-0"].numpy()) > 0
    assert not torch.equal(half, f32["Kcur-0"])


@pytest.mark.parametrize("kv", ["F16", "F32"])
def test_step_by_step_equals_the_batch(kv: emulation.KVType, tmp_path: Path) -> None:
    weights, cache = Weights(open_source(make_gguf(tmp_path / "m.gguf"))), KVCache()
    batch = forward(IDS, weights, arithmetic=ggml_arithmetic(kv))
    steps = [forward(IDS[:, t : t + 1], weights, cache=cache, arithmetic=ggml_arithmetic(kv)) for t in range(IDS.shape[1])]
    assert nmse(batch.numpy(), torch.cat(steps, 1).numpy()) <= 1e-7


def test_sequences_of_a_batch_are_independent(tmp_path: Path) -> None:
    weights = Weights(open_source(make_gguf(tmp_path / "m.gguf", dtype="Q8_0")))
    both = taps_of(weights, ggml_arithmetic(), torch.cat([IDS, IDS.flip(1)]))
    for row, ids in enumerate((IDS, IDS.flip(1))):
        alone = taps_of(weights, ggml_arithmetic(), ids)
        assert all(torch.equal(both[name][row], x[0]) for name, x in alone.items())


def test_quantized_in_memory_is_the_file(tmp_path: Path) -> None:
    source = Weights(open_source(make_gguf(tmp_path / "f32.gguf", tied=True)))
    file = Weights(open_source(make_gguf(tmp_path / "q8.gguf", dtype="Q8_0", tied=True)))
    types = {name: QTYPES["Q8_0"] for name in source.names() if len(source.shape(name)) == 2}
    in_memory = Requantized(Images(source), types)
    assert torch.equal(forward(IDS, file, arithmetic=ggml_arithmetic()), forward(IDS, in_memory, arithmetic=ggml_arithmetic()))
    mixed = Requantized(Images(file), {})
    assert torch.equal(forward(IDS, file, arithmetic=ggml_arithmetic()), forward(IDS, mixed, arithmetic=ggml_arithmetic()))
