"""A quantized key/value cache: types, rounding, rotation, and its variants in a study."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from quantscope.errors import UsageError
from quantscope.findings.cache import cost
from quantscope.model.cache import CACHE_TYPES, CachedArithmetic, Held, hadamard, key_rotation, parse_cache, rounded, turn
from quantscope.model.forward import KVCache, forward
from quantscope.qtypes import QTYPES
from quantscope.quants import decode, encode
from quantscope.results import LogitStats, Study, StudyOptions, Variant
from quantscope.sources.resolve import open_source
from quantscope.stages import prepare
from quantscope.study import identity, run_study
from quantscope.weights import Weights
from tests.models import make_gguf


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_gguf(tmp_path / "m.gguf", head_dim=32, n_ctx=64)


def test_types_by_the_names_of_llama_cpp() -> None:
    assert [parse_cache(name).name for name in CACHE_TYPES] == list(CACHE_TYPES)
    assert parse_cache("Q8_0/q4_0") == replace(parse_cache("q8_0"), values=QTYPES["Q4_0"])
    assert (parse_cache("q8_0/q4_0").name, parse_cache("q8_0/q8_0").name) == ("q8_0/q4_0", "q8_0")
    assert parse_cache("q8_0/q4_0").bytes_per_token(3, Held(2, 64, 64)) == 3 * 2 * (2 * 34 + 2 * 18)
    for wrong in ("q4_k", "", "q8_0/q8_0/q8_0", "int8"):
        with pytest.raises(UsageError, match=r"--kv .*expected one of f32.*q8_0/q4_0"):
            parse_cache(wrong)


def test_blocks_run_along_the_head() -> None:
    x = torch.randn(2, 5, 3, 32, generator=torch.Generator().manual_seed(0))  # [B,T,K,D]
    q4 = QTYPES["Q4_0"]
    expected = [decode(encode(row, q4, 32), q4) for row in x.reshape(-1, 32).numpy()]
    assert torch.equal(rounded(x, q4, 64), torch.from_numpy(np.stack(expected)).reshape(x.shape))
    assert torch.equal(rounded(x, QTYPES["F32"], 64), x)
    assert torch.equal(rounded(x, QTYPES["F16"], 64), x.half().float())
    assert rounded(x.double(), q4, 64).dtype == torch.float64


@pytest.mark.parametrize("head_dim", [64, 128, 192])
def test_heads_of_a_multiple_of_64_are_turned(head_dim: int) -> None:
    n = key_rotation(head_dim)
    assert n == {64: 64, 128: 128, 192: 64}[head_dim]
    torch.testing.assert_close(hadamard(n) @ hadamard(n), torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-14)
    x = torch.randn(7, head_dim, generator=torch.Generator().manual_seed(1))
    x[:, 5] *= 50  # an outlier channel
    torch.testing.assert_close(turn(turn(x, n), n), x, rtol=0, atol=1e-4)
    q4 = QTYPES["Q4_0"]
    plain = torch.from_numpy(decode(encode(x.numpy(), q4, head_dim), q4)).reshape(x.shape)
    others = [i for i in range(head_dim) if i != 5]
    assert (rounded(x, q4, n) - x)[:, others].square().mean() < 0.5 * (plain - x)[:, others].square().mean()


def test_decoding_step_by_step_reads_the_same_cache(model: Path) -> None:
    weights, arithmetic = Weights(open_source(model), keep=True), CachedArithmetic(parse_cache("q4_0"))
    ids, cache = torch.arange(3, 15)[None], KVCache()
    whole = forward(ids, weights, arithmetic=arithmetic)
    steps = torch.cat([forward(ids[:, t : t + 1], weights, cache=cache, arithmetic=arithmetic) for t in range(12)], dim=1)
    torch.testing.assert_close(steps, whole, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(whole, forward(ids, weights), rtol=1e-3)


def test_variants_of_a_study(model: Path) -> None:
    options = StudyOptions((str(model),), types=("Q8_0",), tokens=(1, 5, 9, 7))
    plain, cached = run_study(options), run_study(replace(options, kv=("q8_0", "q4_0/f16")))
    names = ["m", "m kv=q8_0", "m kv=q4_0/f16", "Q8_0", "Q8_0 kv=q8_0", "Q8_0 kv=q4_0/f16"]
    assert [v.name for v in cached.variants] == names
    assert [v.kv for v in cached.variants] == [None, "q8_0", "q4_0/f16"] * 2
    assert [v.kv_bytes for v in cached.variants[:2]] == [None, 2 * 2 * (34 + 34)]
    assert (cached.original, plain.variants[0]) == ("m", cached.variants[0])  # the same bits beside a cache as without one
    assert plain.variants[1].logits == cached.variant("Q8_0").logits
    kl = {v.name: v.logits.kl_nats for v in cached.quantized if v.logits}
    assert all(x is not None and x > 0 for x in kl.values())
    assert len(set(kl.values())) == 5
    assert "kv-cache" in {f.id for f in cached.findings}
    assert "kv-cache" not in {f.id for f in plain.findings}


def test_it_belongs_to_the_identity_of_a_study(model: Path) -> None:
    options = StudyOptions((str(model),), types=("Q8_0",), tokens=(1, 5, 9, 7), kv=("q8_0",))
    assert identity(prepare(options), options)["options"]["--kv"] == ["q8_0"]


def test_heads_that_blocks_do_not_fill(tmp_path: Path) -> None:
    path = make_gguf(tmp_path / "m.gguf", head_dim=16)
    with pytest.raises(UsageError, match=r"--kv q8_0: Q8_0 has blocks of 32.*16 channels.*--kv f16"):
        run_study(StudyOptions((str(path),), tokens=(1, 2), kv=("q8_0",)))
    assert run_study(StudyOptions((str(path),), tokens=(1, 2), kv=("f16",))).variants[1].kv == "f16"


@pytest.mark.parametrize(
    ("weights", "cache", "said"),
    [
        (0.005, 0.012, "the cache does most of the damage: 0.0120 alone, 2.4× the 0.00500 of the weights alone"),
        (0.005, 0.0001, "the weights do most of the damage: 0.00500 alone, against 0.000100 of the cache alone"),
        (0.005, 0.006, "weights and cache cost about the same: 0.00500 and 0.00600 alone"),
    ],
)
def test_which_of_weights_and_cache_hurts_more(weights: float, cache: float, said: str) -> None:
    def variant(name: str, types: str, kl: float | None, kv: str | None = None) -> Variant:
        return Variant(name, {"w": types}, 1, 1.0, logits=LogitStats(9, kl_nats=kl), kv=kv, kv_bytes=720 if kv else None)

    parts = variant("m", "F16", None), variant("m kv=q4_0", "F16", cache, "q4_0"), variant("Q4_0", "Q4_0", weights)
    found = cost(Study(1, "m", (*parts, variant("Q4_0 kv=q4_0", "Q4_0", 0.02, "q4_0"))))
    assert found is not None
    assert "of type q4_0, 720 bytes a token, costs" in found.text
    assert said in found.text
    assert found.evidence["Q4_0 kv=q4_0"] == {"kl_nats": 0.02, "weights": weights, "cache": cache}
