"""The forward and its operations, without an oracle: formulas, invariances, taps, bad prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from quantscope.errors import PromptError
from quantscope.metrics import nmse
from quantscope.model.forward import KVCache, forward
from quantscope.model.generate import generate
from quantscope.model.ops import attention_map, causal_attention, exact_matmul, linear, rms_norm, swiglu
from quantscope.model.taps import Recorder, no_tap, tap_names, wants
from quantscope.sources.resolve import open_source
from quantscope.weights import Weights
from tests.models import LINEARS, STORIES, STORIES_PROMPT, make_gguf


def weights(tmp_path: Path, **model: Any) -> Weights:
    return Weights(open_source(make_gguf(tmp_path / "m.gguf", **model)), keep=True)


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 288, shape))


# --- operations ---


def test_rms_norm_is_its_formula() -> None:
    x, w = torch.randn(3, 5, 64, dtype=torch.float64), torch.randn(64, dtype=torch.float64)
    torch.testing.assert_close(rms_norm(x, w, 1e-5), x / ((x**2).mean(-1, keepdim=True) + 1e-5).sqrt() * w)
    assert rms_norm(x.float(), w.float(), 1e-5).dtype == torch.float32


def test_rms_norm_does_not_overflow() -> None:
    """Squares of 1e30 are beyond float32, the result is not."""
    assert rms_norm(torch.full((1, 4), 1e30), torch.ones(4), 1e-5).tolist() == [[1.0] * 4]


def test_linear_order_of_scale_and_bias() -> None:
    x, w, s, b = torch.tensor([[2.0]]), torch.tensor([[3.0]]), torch.tensor([10.0]), torch.tensor([1.0])
    assert linear(x, {"a.weight": w}, "a").item() == 6
    assert linear(x, {"a.weight": w, "a.scale": s}, "a").item() == 60
    assert linear(x, {"a.weight": w, "a.scale": s, "a.bias": b}, "a").item() == 61
    assert linear(x, {"a.weight": w, "a.scale": s, "a.bias": b}, "a", scale_last=True).item() == 70


def test_swiglu() -> None:
    assert swiglu(torch.tensor([0.0, 1.0]), torch.tensor([5.0, 2.0])).tolist() == pytest.approx([0, 2 / (1 + np.exp(-1))])


@pytest.mark.parametrize(("n_query", "n_key", "n_head", "n_head_kv"), [(5, 5, 4, 2), (1, 7, 4, 4), (3, 8, 6, 1)])
def test_attention_is_torchs(n_query: int, n_key: int, n_head: int, n_head_kv: int) -> None:
    q = torch.randn(2, n_query, n_head, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, n_key, n_head_kv, 8, dtype=torch.float64)
    out, probs = causal_attention(q, k, v, 0.3), attention_map(q, k, 0.3)
    mask = torch.ones(n_query, n_key, dtype=torch.bool).tril(n_key - n_query)
    heads = (z.transpose(1, 2) for z in (q, k, v))
    expected = F.scaled_dot_product_attention(*heads, attn_mask=mask, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(out, expected.transpose(1, 2))
    assert probs.shape == (2, n_head, n_query, n_key)
    assert (probs[:, :, ~mask] == 0).all()
    torch.testing.assert_close(probs.sum(-1), torch.ones(2, n_head, n_query, dtype=torch.float64))
    values = v.repeat_interleave(n_head // n_head_kv, 2).transpose(1, 2)  # [B,H,S,D]
    torch.testing.assert_close((probs @ values).transpose(1, 2), out)  # the map is the one the attention uses


def test_exact_matmul_restores_the_programs_setting() -> None:
    torch.set_float32_matmul_precision("medium")
    try:
        with exact_matmul():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


# --- invariances ---


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_float32_agrees_with_float64(arch: str, tmp_path: Path) -> None:
    w, low, high = weights(tmp_path, arch=arch), Recorder(), Recorder()
    ids = random_ids(1, 40)
    forward(ids, w, low)
    forward(ids, w, high, dtype=torch.float64)
    errors = [float(nmse(high.taps[n].flatten(), low.taps[n].flatten())) for n in high.taps]
    assert all(x.dtype == torch.float64 for x in high.taps.values())
    assert 0 < max(errors) < 1e-12


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_cached_steps_equal_the_whole(arch: str, tmp_path: Path) -> None:
    w, cache, ids = weights(tmp_path, arch=arch), KVCache(), random_ids(2, 12)
    parts = [forward(part, w, dtype=torch.float64, cache=cache) for part in ids.split([5, 1, 1, 5], dim=1)]
    assert cache.n_past == 12
    torch.testing.assert_close(torch.cat(parts, dim=1), forward(ids, w, dtype=torch.float64))


def test_rows_of_a_batch_are_independent(tmp_path: Path) -> None:
    w, ids = weights(tmp_path), random_ids(3, 9)
    alone = torch.cat([forward(row[None], w, dtype=torch.float64) for row in ids])
    torch.testing.assert_close(forward(ids, w, dtype=torch.float64), alone)


def test_nothing_sees_the_future(tmp_path: Path) -> None:
    w, ids = weights(tmp_path), random_ids(1, 9)
    changed = ids.clone()
    changed[0, 6] += 1
    before, after = forward(ids, w), forward(changed, w)
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.equal(before[:, 6:], after[:, 6:])


def test_position_matters(tmp_path: Path) -> None:
    w = weights(tmp_path)
    logits = forward(torch.tensor([[7, 9, 7, 9, 7, 9]]), w)
    assert not torch.allclose(logits[0, 1], logits[0, 3])


def test_same_bits_every_time(tmp_path: Path) -> None:
    w, ids = weights(tmp_path), random_ids(1, 33)
    assert torch.equal(forward(ids, w), forward(ids, w))


# --- taps ---


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_taps_come_in_graph_order_with_their_shapes(arch: str, tmp_path: Path) -> None:
    w, r = weights(tmp_path, arch=arch, biases=LINEARS if arch == "llama" else ()), Recorder()
    forward(random_ids(2, 5), w, r)
    normed = arch == "qwen3"
    assert tuple(r.taps) == tuple(n for n in tap_names(2) if normed or "normed" not in n)
    c = w.config
    channels = {
        "Qcur": 64,
        "Kcur": 32,
        "Vcur": 32,
        "kqv_out": 64,
        "ffn_gate": 96,
        "ffn_up": 96,
        "ffn_swiglu": 96,
        "result_output": c.n_vocab,
    }
    for name, x in r.taps.items():
        stem = name.split("-")[0].removesuffix("_pre").removesuffix("_normed")
        assert x.shape == ((2, 4, 5, 5) if stem == "kq_soft_max" else (2, 5, channels.get(stem, 64))), name


def test_taps_add_up(tmp_path: Path) -> None:
    w, r = weights(tmp_path), Recorder()
    logits = forward(random_ids(1, 5), w, r)
    t = r.taps
    assert torch.equal(t["embd"] + t["attn_out-0"], t["ffn_inp-0"])
    assert torch.equal(t["ffn_inp-0"] + t["ffn_out-0"], t["l_out-0"])
    assert torch.equal(t["l_out-0"] + t["attn_out-1"], t["ffn_inp-1"])
    assert torch.equal(t["result_output"], logits)


def test_observing_changes_nothing_and_keeps_only_what_is_wanted(tmp_path: Path) -> None:
    w, ids, r = weights(tmp_path), random_ids(1, 5), Recorder({"l_out-1", "kq_soft_max-0"})
    assert torch.equal(forward(ids, w), forward(ids, w, r))
    assert set(r.taps) == {"l_out-1", "kq_soft_max-0"}
    assert not wants(no_tap, "embd")
    assert wants(lambda name, x: None, "embd")


# --- prompts ---


@pytest.mark.parametrize(
    ("ids", "match"),
    [
        ([[]], "the prompt is empty"),
        ([[1] * 129], "has 129 tokens, expected at most 128"),
        ([[1, 288]], "token id 288 is no token of this model, expected 0 to 287"),
        ([[1, -1]], "token id -1"),
    ],
)
def test_bad_prompts(ids: list[list[int]], match: str, tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=match):
        forward(torch.tensor(ids, dtype=torch.int64), weights(tmp_path))


def test_cache_counts_towards_the_context(tmp_path: Path) -> None:
    w, cache = weights(tmp_path), KVCache()
    forward(random_ids(1, 127), w, cache=cache)
    forward(random_ids(1, 1), w, cache=cache)
    with pytest.raises(PromptError, match="has 129 tokens"):
        forward(random_ids(1, 1), w, cache=cache)


# --- generation ---


def test_generation_is_the_arg_max_again_and_again() -> None:
    w = Weights(open_source(STORIES), keep=True)
    ids = list(STORIES_PROMPT)
    for _ in range(6):
        ids.append(int(forward(torch.tensor([ids]), w)[0, -1].argmax()))
    assert generate(STORIES_PROMPT, w, 6) == ids[5:]
    assert generate(STORIES_PROMPT, w, 6, stop={ids[7]}) == ids[5:8]
    assert generate(STORIES_PROMPT, w, 0) == []


def test_generation_stops_at_the_end_of_the_context(tmp_path: Path) -> None:
    w = weights(tmp_path, n_ctx=8)
    assert len(generate([1, 2, 3], w, 100)) == 6  # 5 more fill the context, one is predicted from it
    with pytest.raises(PromptError):
        generate([1] * 9, w, 1)
