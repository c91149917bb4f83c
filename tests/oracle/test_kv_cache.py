"""A quantized key/value cache against llama.cpp's own (--cache-type-k, --cache-type-v, flash attention where it needs it).

llama.cpp also rounds each query to Q8_0 before its products with quantized keys, and its float sums run in another order.  That is the
engine's, not the cache's: it is the floor of these comparisons, next to nothing where the keys are F32.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from quantscope.engines.llama_session import LlamaSession
from quantscope.errors import EngineError, UsageError
from quantscope.model import cache
from quantscope.model.cache import CachedArithmetic, check_cache, held_by, parse_cache
from quantscope.model.forward import forward
from quantscope.qtypes import QTYPES
from quantscope.quants import decode
from quantscope.quants.iq4_nl import stored_iq4_nl
from quantscope.sources.resolve import open_source
from quantscope.tokenizers import from_source
from quantscope.weights import Weights
from tests.arch_models import make_arch
from tests.models import make_gguf
from tests.oracle import ggml
from tests.oracle.kv_cache import Rows, kl, nmse, ours, theirs
from tests.oracle.quantized_files import demo_file

TEXT = Path(__file__).resolve().parents[2] / "quantscope" / "data" / "demo.txt"
T, CHUNKS = 128, 3
SIZES = {"n_ff": 512, "n_layer": 3, "n_ctx": T, "n_vocab": 512, "n_head": 4, "n_head_kv": 2}


@pytest.fixture(scope="module", params=["demo, heads of 32", "heads of 64", "heads of 192"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without rotation; keys and values in one matrix; three turns of 64 channels."""
    if request.param.startswith("demo"):
        return demo_file("F32")
    return make_gguf(tmp_path_factory.mktemp("kv") / "m.gguf", head_dim=int(request.param.split()[-1]), n_embd=256, **SIZES)


def rows_of(weights: Weights) -> Rows:
    """English for the trained model, chance for the others."""
    if weights.config.n_vocab == 4096:
        ids = from_source(weights.source).encode(TEXT.read_text("utf-8"))[: CHUNKS * T]
        return [ids[i : i + T] for i in range(0, len(ids), T)]
    random: Rows = np.random.default_rng(0).integers(3, weights.config.n_vocab, (CHUNKS, T)).tolist()
    return random


# (types, smallest and largest KL of llama.cpp over ours, largest part of the cache's error that the two do not share)
CASES = [
    ("f32/q8_0", 0.9, 1.1, 0.25),
    ("f32/q5_1", 0.9, 1.1, 0.25),
    ("f32/q4_0", 0.9, 1.1, 0.15),
    ("q5_0", 0.9, 1.15, 0.3),
    ("q4_1", 0.9, 1.15, 0.3),
    ("q4_0", 0.9, 1.15, 0.3),
    ("iq4_nl", 0.9, 1.15, 0.3),
    ("q8_0/q4_0", 0.9, 1.15, 0.3),
    ("q4_0/f16", 0.9, 1.15, 0.3),
    ("q8_0", 0.9, 2.2, 1.2),  # queries in Q8_0 cost about as much as keys in Q8_0
    ("f16", 0.9, 2.2, 1.5),  # so do queries in F16
]


@pytest.mark.parametrize(("kv", "low", "high", "apart"), CASES)
def test_a_cache_costs_what_it_costs_in_llama_cpp(kv: str, low: float, high: float, apart: float, model: Path) -> None:
    weights = Weights(open_source(model), keep=True)
    rows = rows_of(weights)
    exact, cached = ours(weights, rows), ours(weights, rows, kv)
    plain, real = theirs(model, rows, "f32"), theirs(model, rows, kv)
    assert nmse(exact, plain) < 1e-11
    assert low < kl(plain, real) / kl(exact, cached) < high
    assert nmse(cached, real) < apart * nmse(exact, cached)


@pytest.mark.parametrize("kv", ["f32/q4_0", "q4_0"])
def test_the_rotation_is_seen(kv: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, what is left of the agreement is chance."""
    weights = Weights(open_source(model), keep=True)
    if weights.config.head_dim % cache.ROTATED:
        pytest.skip("llama.cpp does not turn heads of this size")
    monkeypatch.setattr(cache, "turn", lambda x, n: x)
    rows = rows_of(weights)
    unturned = ours(weights, rows, kv)
    assert nmse(unturned, theirs(model, rows, kv)) > 0.8 * nmse(ours(weights, rows), unturned)


@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_iq4_nl_is_stored_as_ggml_stores_it(spread: float) -> None:
    """To the last bit; a cache has not the search that llama-quantize makes."""
    rng, kind, n = np.random.default_rng(3), QTYPES["IQ4_NL"], 32 * 4000
    x = (rng.standard_normal(n) * np.exp(spread * rng.standard_normal(n))).astype(np.float32)
    x[:32], x[32:64], x[64:96] = 0, 1e-20, rng.integers(-2, 3, 32)
    raw = np.zeros(n // 32 * kind.type_size, np.uint8)
    ggml.ROW_FUNCTION(ggml.traits(kind).from_float_ref)(x.ctypes.data, raw.ctypes.data, n)
    assert np.array_equal(stored_iq4_nl(x), decode(raw, kind))
    assert not np.array_equal(stored_iq4_nl(x), decode(ggml.quantize(x, kind, n), kind))


# (case, cache, smallest and largest KL of llama.cpp over ours, largest part of the cache's error that the two do not share)
LATENT = [
    ("deepseek2-wide", "q8_0", 0.9, 1.6, 0.8),
    ("deepseek2-wide", "q5_1", 0.9, 1.1, 0.15),
    ("deepseek2-wide", "q4_0", 0.9, 1.1, 0.1),
    ("deepseek2-wide", "iq4_nl", 0.9, 1.1, 0.15),
    ("deepseek2-wide-one-matrix", "q4_0", 0.9, 1.1, 0.1),
    ("deepseek2-wide-one-matrix", "q8_0/q4_0", 0.9, 1.15, 0.3),
]


@pytest.mark.parametrize(("case", "kv", "low", "high", "apart"), LATENT)
def test_latent_vectors_cost_what_they_cost_in_llama_cpp(case: str, kv: str, low: float, high: float, apart: float, tmp_path: Path) -> None:
    """One vector a token, not turned; keys and values of every head where the file has one matrix for them."""
    path = make_arch(tmp_path / "m.gguf", case)
    weights = Weights(open_source(path), keep=True)
    rows: Rows = np.random.default_rng(0).integers(3, 288, (2, 96)).tolist()
    exact, cached = ours(weights, rows), ours(weights, rows, kv)
    plain, real = theirs(path, rows, "f32"), theirs(path, rows, kv)
    assert nmse(exact, plain) < 1e-11
    assert low < kl(plain, real) / kl(exact, cached) < high
    assert nmse(cached, real) < apart * nmse(exact, cached)
    if held_by(weights).shared:  # turned as the keys of heads are, it would share nothing with llama.cpp's
        turning = CachedArithmetic(parse_cache(kv), turns=True)
        turned = torch.cat([forward(torch.tensor([row]), weights, arithmetic=turning)[0] for row in rows]).double()
        assert nmse(turned, real) > 1.5 * nmse(exact, turned)


@pytest.mark.parametrize(("case", "kv", "says"), [("deepseek2-wide", "q8_0/q4_0", "different K"), ("deepseek2", "q8_0", "block size 32")])
def test_what_is_refused_for_latent_vectors_is_what_llama_cpp_refuses(case: str, kv: str, says: str, tmp_path: Path) -> None:
    path = make_arch(tmp_path / "m.gguf", case)
    with pytest.raises(EngineError, match=says):
        theirs(path, [[1, 5, 9]], kv)
    with pytest.raises(UsageError, match=r"llama\.cpp refuses"):
        check_cache(parse_cache(kv), held_by(Weights(open_source(path))))


def test_llama_cpp_refuses_blocks_that_do_not_fill_a_head(tmp_path: Path) -> None:
    path = make_gguf(tmp_path / "m.gguf", head_dim=16, n_embd=64, **SIZES)
    with pytest.raises(EngineError, match="does not make a context"), LlamaSession(path, n_ctx=T, kv="Q8_0"):
        pass
