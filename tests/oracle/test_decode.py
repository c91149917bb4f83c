"""Decoding gives the same bits as ggml's to_float and as the gguf package, whatever the bytes are."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from quantscope.qtypes import QTYPES, QuantType
from quantscope.quants import CODECS, can_encode, decode, encode, set_threads, thread_count
from tests.oracle import ggml

TYPES = [QTYPES[name] for name in CODECS]
IN_GGML = [t for t in TYPES if t.name != "Q8_1"]  # ggml multiplies with Q8_1 but never decodes it
IN_GGUF = [t for t in TYPES if t.name not in ("Q8_1", "Q8_K", "Q1_0", "Q2_0")]

# where a block keeps its float16 numbers: to plant special values there
# fmt: off
HALVES = {
    "F16": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
    "IQ1_S": (0,), "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,), "IQ4_NL": (0,), "IQ4_XS": (0,),
    "TQ1_0": (52,), "TQ2_0": (64,), "Q1_0": (0,), "Q2_0": (0,),
}
# fmt: on
SPECIAL_HALVES = (0x0000, 0x8000, 0x0001, 0x83FF, 0x0400, 0x3C00, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7C01, 0x7E00, 0xFFFF)


def random_bytes(qtype: QuantType, n_blocks: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, n_blocks * qtype.type_size, dtype=np.uint8)


def weights(n: int, seed: int = 0) -> np.ndarray:
    """Like trained weights: heavy tails, one scale per 1024."""
    rng = np.random.default_rng(seed)
    scale = np.repeat(rng.lognormal(-4, 1, -(-n // 1024)), 1024)[:n]
    return (rng.standard_t(4, n) * scale).astype(np.float32)


@pytest.mark.parametrize("qtype", QTYPES.values(), ids=str)
def test_ggml_has_the_same_block_and_size(qtype: QuantType) -> None:
    found = ggml.traits(qtype)
    assert found.type_name.decode().upper() == qtype.name
    assert (found.blck_size, found.type_size, found.is_quantized) == (qtype.block_size, qtype.type_size, qtype.is_quantized)


@pytest.mark.parametrize("qtype", IN_GGML, ids=str)
def test_any_bytes(qtype: QuantType) -> None:
    raw = random_bytes(qtype, 2_000_000 // qtype.block_size)
    ours = decode(raw, qtype)
    assert np.isfinite(ours).mean() > 0.5
    ggml.assert_same_floats(ours, ggml.to_float(raw, qtype), qtype)


@pytest.mark.parametrize("name", HALVES)
def test_special_scales(name: str) -> None:
    qtype = QTYPES[name]
    raw = random_bytes(qtype, 64 * len(SPECIAL_HALVES)).reshape(64, len(SPECIAL_HALVES), qtype.type_size)
    for first, at in enumerate(HALVES[name]):  # two scales in a block get different special values
        raw[..., at : at + 2] = np.roll(np.array(SPECIAL_HALVES, "<u2"), first).view(np.uint8).reshape(-1, 2)
    raw = raw.reshape(-1)
    ours = decode(raw, qtype)
    assert np.isnan(ours).any()
    ggml.assert_same_floats(ours, ggml.to_float(raw, qtype), qtype)


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_every_16_bit_pattern(name: str) -> None:
    raw = np.arange(65536, dtype="<u2").view(np.uint8)
    ours, theirs = decode(raw, QTYPES[name]), ggml.to_float(raw, QTYPES[name])
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))  # NaN payloads too: they survive a round trip


@pytest.mark.parametrize("qtype", [t for t in IN_GGML if ggml.can_quantize(t)], ids=str)
def test_quantized_weights(qtype: QuantType) -> None:
    raw = ggml.quantize(weights(256 * 4096), qtype, 4096)
    ours = decode(raw, qtype)
    assert np.isfinite(ours).all()
    assert np.count_nonzero(ours) > 10_000  # the ternary types keep only what is near the greatest
    ggml.assert_same_floats(ours, ggml.to_float(raw, qtype), qtype)


@pytest.mark.parametrize("qtype", IN_GGUF, ids=str)
def test_gguf_package(qtype: QuantType) -> None:
    raw = random_bytes(qtype, 200_000 // qtype.block_size, seed=1)
    with np.errstate(all="ignore"):
        theirs = dequantize(raw.reshape(-1, qtype.type_size), gguf.GGMLQuantizationType[qtype.name]).reshape(-1)
    ggml.assert_same_floats(decode(raw, qtype), theirs, qtype)


def test_q8_1_is_q8_0_with_a_sum() -> None:
    q8_1, q8_0 = QTYPES["Q8_1"], QTYPES["Q8_0"]
    raw = ggml.quantize_ref(weights(32 * 1000), q8_1)
    without_sum = np.ascontiguousarray(np.delete(raw.reshape(-1, 36), [2, 3], axis=1)).reshape(-1)
    ggml.assert_same_floats(decode(raw, q8_1), ggml.to_float(without_sum, q8_0))


def test_q8_k_of_weights() -> None:
    q8_k = QTYPES["Q8_K"]
    raw = ggml.quantize_ref(weights(256 * 1000), q8_k)
    assert np.count_nonzero(raw) > 256 * 500
    ggml.assert_same_floats(decode(raw, q8_k), ggml.to_float(raw, q8_k))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(IN_GGML), st.integers(1, 5), st.data())
def test_arbitrary_bytes(qtype: QuantType, n_blocks: int, data: st.DataObject) -> None:
    n = n_blocks * qtype.type_size
    raw = np.frombuffer(data.draw(st.binary(min_size=n, max_size=n)), np.uint8)
    ggml.assert_same_floats(decode(raw, qtype), ggml.to_float(raw, qtype), qtype)


@pytest.mark.parametrize("name", ["Q4_0", "Q6_K", "IQ3_S", "F16"])
def test_number_of_threads_does_not_matter(name: str) -> None:
    qtype = QTYPES[name]
    raw = random_bytes(qtype, 1_000_003 // qtype.block_size)  # shares of unequal length
    theirs = ggml.to_float(raw, qtype)
    before = thread_count()
    try:
        for threads in (1, 2, 5):
            set_threads(threads)
            ggml.assert_same_floats(decode(raw, qtype), theirs, f"{threads} threads")
    finally:
        set_threads(before)


def test_memory_map_at_an_odd_offset(tmp_path: Path) -> None:
    for qtype in IN_GGML:
        raw = random_bytes(qtype, 100)
        (tmp_path / "tensor").write_bytes(b"x" * 3 + raw.tobytes())
        mapped = np.memmap(tmp_path / "tensor", np.uint8, "r", offset=3)
        ggml.assert_same_floats(decode(mapped, qtype), ggml.to_float(raw, qtype), qtype)


@pytest.mark.parametrize("qtype", [t for t in TYPES if can_encode(t)], ids=str)
def test_what_we_encode_ggml_decodes(qtype: QuantType) -> None:
    raw = encode(weights(64 * 512).reshape(64, 512), qtype, 512)
    ggml.assert_same_floats(decode(raw, qtype), ggml.to_float(raw, qtype), qtype)
