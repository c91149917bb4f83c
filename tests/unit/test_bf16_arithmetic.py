"""The bfloat16 arithmetic by its definitions: numbers rounded by their bits, operations by formulas in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from quantscope.arch.config import RopeConfig
from quantscope.compare import EXACT_FLOOR, PREDICTED_TIMES, ROUNDING_FLOOR, compare
from quantscope.diagnose.convictions import expected_rounding
from quantscope.diagnose.replay import GGML
from quantscope.engines.reference import trace
from quantscope.errors import UsageError
from quantscope.model.bf16_arithmetic import Bf16Arithmetic
from quantscope.model.forward import KVCache, forward
from quantscope.model.ggml_arithmetic import GgmlArithmetic
from quantscope.model.rope import RopeTables
from quantscope.model.taps import Recorder
from quantscope.sources.resolve import open_source
from quantscope.trace import Full, Origin
from quantscope.weights import Weights
from tests.models import make_gguf

M = Bf16Arithmetic()
IDS = (1, 17, 250, 31, 99, 42, 8)
Array = np.ndarray


def bf16(x: Array) -> Array:
    """Rounded to bfloat16, s eeeeeeee mmmmmmm: the upper half of a float32, ties to even; float64 in and out."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    upper = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16
    return upper.view(np.float32).astype(np.float64)


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Array:
    """Numbers that bfloat16 has, as activations between two operations are."""
    return bf16(np.random.default_rng(seed).normal(0, scale, shape))


def tensor(x: Array) -> Tensor:
    return torch.from_numpy(np.asarray(x, np.float32))


def same(made: Tensor, expected: Array) -> None:
    """Numbers of bfloat16, and the expected ones but for a few that were next to a tie."""
    assert made.dtype == torch.float32
    assert made.shape == expected.shape
    y = made.numpy().astype(np.float64)
    np.testing.assert_array_equal(y, bf16(y))
    assert (y != expected).mean() < 0.01
    np.testing.assert_allclose(y, expected, rtol=2**-7, atol=1e-6)


def weighted(w: Array) -> dict[str, Tensor]:
    return {"m.weight": tensor(w).bfloat16()}


# --- operations ---


def test_the_residual_sum_is_rounded() -> None:
    h, x = random(2, 5, 64), random(2, 5, 64, seed=1, scale=0.03)
    same(M.residual(tensor(h), tensor(x), "attn"), bf16(h + x))
    assert (bf16(h + x) != h + x).mean() > 0.5  # there was something to round


def test_swiglu_is_rounded_twice() -> None:
    gate, up = random(2, 5, 500, scale=3), random(2, 5, 500, seed=1)
    same(M.swiglu(tensor(gate), tensor(up)), bf16(bf16(gate / (1 + np.exp(-gate))) * up))


def test_rms_norm_multiplies_its_weight_after_rounding() -> None:
    x, w = random(2, 5, 640, scale=0.01), random(640, seed=1)
    expected = bf16(w * bf16(x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)))
    same(M.rms_norm(tensor(x), weighted(w), "m", 1e-5), expected)
    once = bf16(w * (x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)))
    assert (once != expected).mean() > 0.1


def test_a_product_is_summed_in_float32_with_its_bias_and_then_rounded() -> None:
    x, w, bias = random(1, 7, 64), random(96, 64, seed=1, scale=0.1), random(96, seed=2)
    same(M.linear(tensor(x), weighted(w), "m"), bf16(x @ w.T))
    with_bias = weighted(w) | {"m.bias": tensor(bias).bfloat16()}
    same(M.linear(tensor(x), with_bias, "m"), bf16(x @ w.T + bias))


@pytest.mark.parametrize("last", [False, True])
def test_the_scale_of_a_matrix_is_applied_where_llama_cpp_does(last: bool) -> None:
    x, w, bias, scale = random(1, 7, 64), random(96, 64, seed=1, scale=0.1), random(96, seed=2), np.array([1.5])
    all_of_it = weighted(w) | {"m.bias": tensor(bias).bfloat16(), "m.scale": tensor(scale).bfloat16()}
    y = bf16(x @ w.T)
    expected = bf16(bf16(y + bias) * 1.5) if last else bf16(bf16(y * 1.5) + bias)
    same(M.linear(tensor(x), all_of_it, "m", scale_last=last), expected)


@pytest.mark.parametrize("layout", ["interleaved", "half"])
@pytest.mark.parametrize("still", [0, 4])
def test_rope_rounds_both_products_and_their_sum(layout: str, still: int) -> None:
    x, cos, sin = random(1, 6, 3, 16 + still), bf16(np.cos(np.arange(48.0))).reshape(6, 8), bf16(np.sin(np.arange(48.0))).reshape(6, 8)
    tables = RopeTables(tensor(cos).bfloat16(), tensor(sin).bfloat16(), layout)  # type: ignore[arg-type]
    first = np.arange(8) * 2 if layout == "interleaved" else np.arange(8)
    second = first + (1 if layout == "interleaved" else 8)
    a, b, c, s = x[..., first], x[..., second], cos[:, None], sin[:, None]
    expected = x.copy()
    expected[..., first] = bf16(bf16(a * c) - bf16(b * s))
    expected[..., second] = bf16(bf16(b * c) + bf16(a * s))
    same(M.rotate(tensor(x), tables, "q"), expected)


def test_the_tables_of_rope_are_those_of_float32_angles() -> None:
    config = RopeConfig(dim=16, theta=10000.0, layout="half")
    positions, factors = torch.arange(50, 90), torch.linspace(1, 3, 8)
    tables = M.rope_tables(config, positions, factors, torch.float32)
    assert (tables.cos.dtype, tables.sin.dtype, tables.layout) == (torch.bfloat16, torch.bfloat16, "half")
    freqs = (10000.0 ** (-np.arange(0, 16, 2) / 16) / factors.double().numpy()).astype(np.float32)
    angles = (positions.numpy().astype(np.float32)[:, None] * freqs).astype(np.float64)
    same(tables.cos.float(), bf16(np.cos(angles)))
    same(tables.sin.float(), bf16(np.sin(angles)))


def test_attention_rounds_scores_scaled_scores_probabilities_and_the_sum() -> None:
    """Four query heads on two key heads; the three queries are the last of five positions."""
    q, k, v, scale = random(1, 3, 4, 16), random(1, 5, 2, 16, seed=1), random(1, 5, 2, 16, seed=2), 16**-0.5
    probs, mixed = np.zeros((1, 4, 3, 5)), np.zeros((1, 3, 4, 16))
    for h in range(4):
        for t in range(3):
            seen = slice(0, 3 + t)
            scores = bf16(bf16(k[0, seen, h // 2] @ q[0, t, h]) * scale)
            e = np.exp(scores - scores.max())
            probs[0, h, t, seen] = bf16(e / e.sum())
            mixed[0, t, h] = bf16(probs[0, h, t] @ v[0, :, h // 2])
    made = M.attention_map(tensor(q), tensor(k), scale)
    same(made, probs)
    assert (made[0, :, 0, 3:] == 0).all()
    same(M.weighted_values(tensor(probs), tensor(v)), mixed)
    assert torch.equal(M.attention(tensor(q), tensor(k), tensor(v), scale), M.weighted_values(made, tensor(v)))


# --- the forward ---


def weights(tmp_path: Path, **model: object) -> Weights:
    return Weights(open_source(make_gguf(tmp_path / "m.gguf", seed=3, **model)), keep=True)  # type: ignore[arg-type]


def taps(w: Weights) -> dict[str, Tensor]:
    recorder = Recorder()
    forward(torch.tensor([IDS]), w, recorder, arithmetic=M)
    return recorder.taps


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_every_tap_holds_numbers_of_bfloat16(arch: str, tmp_path: Path) -> None:
    w = weights(tmp_path, arch=arch)
    found = taps(w)
    assert all(torch.equal(x, x.bfloat16().float()) for x in found.values())
    rows = w.rows("token_embd.weight", torch.tensor([IDS]))
    assert torch.equal(found["embd"], rows.bfloat16().float())
    assert not torch.equal(found["embd"], rows)


@pytest.mark.parametrize(("dtype", "is_same"), [(torch.bfloat16, True), (torch.float16, False)])
def test_weights_are_rounded(dtype: torch.dtype, is_same: bool, tmp_path: Path) -> None:
    """A file that holds them rounded to bfloat16 gives the same taps; one that holds them rounded to float16 does not."""
    w = weights(tmp_path)
    rounded = {name: w.get(name).to(dtype).float().numpy() for name in w.names()}
    (tmp_path / "rounded").mkdir()
    other = taps(weights(tmp_path / "rounded", edit=rounded))
    assert all(torch.equal(x, other[name]) for name, x in taps(w).items()) == is_same


def test_decoding_step_by_step_gives_the_same_but_for_the_order_of_sums(tmp_path: Path) -> None:
    w, cache = weights(tmp_path), KVCache()
    whole = forward(torch.tensor([IDS]), w, arithmetic=M)
    steps = torch.cat([forward(torch.tensor([[i]]), w, cache=cache, arithmetic=M) for i in IDS], dim=1)
    assert float((whole - steps).square().sum() / whole.square().sum()) < 1e-4


# --- as a trace, as a floor, as what a trace is expected to have been rounded by ---


def test_the_reference_in_bf16_is_a_floor(tmp_path: Path) -> None:
    path = str(make_gguf(tmp_path / "m.gguf", seed=3))
    exact, rounded = trace(path, IDS, predict=True), trace(path, IDS, arithmetic="bf16")
    assert (rounded.origin.arithmetic, rounded.origin.dtype, rounded.origin.predicted) == ("bfloat16", "bfloat16", None)
    theirs = taps(Weights(open_source(Path(path))))
    assert all(torch.equal(rounded.find(name, Full).values, x[0]) for name, x in theirs.items())  # type: ignore[union-attr]
    c = compare(exact, rounded, predicted=rounded)
    assert c.first_divergence is None
    assert c.floor_source == "4 times what bfloat16 changes at the same tap"
    assert all(row.floor == pytest.approx(PREDICTED_TIMES * row.nmse + EXACT_FLOOR) for row in c.rows)
    # what ggml's arithmetic is known to change says nothing here: ggml does not round the embedding
    alone = compare(exact, rounded)
    assert {row.floor for row in alone.rows} == {ROUNDING_FLOOR}
    assert "--predicted with `quantscope trace MODEL --arithmetic bf16`" in alone.floor_source
    ggml = compare(exact, trace(path, IDS, arithmetic="ggml"))
    assert ggml.floor_source.startswith("4 times what ggml's arithmetic")


def test_another_dtype_beside_it_is_refused(tmp_path: Path) -> None:
    path = str(make_gguf(tmp_path / "m.gguf"))
    for arithmetic in ("bf16", "ggml"):
        with pytest.raises(UsageError, match=f"--dtype float64: --arithmetic {arithmetic} says itself"):
            trace(path, IDS, arithmetic=arithmetic, dtype="float64")


def test_which_rounding_a_trace_is_expected_to_have() -> None:
    origin = Origin("engine", arithmetic="bfloat16", dtype="bfloat16")
    assert isinstance(expected_rounding(origin), Bf16Arithmetic)
    assert expected_rounding(replace(origin, arithmetic="exact float32", dtype="float32")) is None
    assert expected_rounding(Origin("engine")) is GGML
    f32_cache = expected_rounding(Origin("llama.cpp", arithmetic="ggml, F32 cache"))
    assert isinstance(f32_cache, GgmlArithmetic)
    assert f32_cache.kv == "F32"
