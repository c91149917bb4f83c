"""The torch codecs against the numba ones, which tests/oracle compares with ggml; here on the CPU, in test_cuda.py on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch.utils._python_dispatch import TorchDispatchMode

from quantscope import quants
from quantscope.errors import BlockError, NonFiniteError, ShapeError, UnsupportedTypeError
from quantscope.qtypes import QTYPES
from quantscope.quants import k_search, torch_codecs, torch_exact, torch_fit, torch_k
from quantscope.quants.k_fit import fit_by_coordinate
from quantscope.quants.simd import LANES, store
from quantscope.quants.torch_bits import PLANES, read_codes, read_scales_q3, read_scales_q4, write_codes, write_scales_q3, write_scales_q4
from quantscope.quants.torch_codecs import TORCH_TYPES, decode, encode

F32 = np.float32
LARGEST = float(np.finfo(F32).max)
N = 48  # super-blocks of each case

Case = Callable[[np.random.Generator], np.ndarray]


def normal(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((N, 256))


def powers(rng: np.random.Generator, low: int, high: int, count: int) -> np.ndarray:
    """One power of two for each of ``count`` runs of a super-block, [N, 256]."""
    return np.repeat(np.exp2(rng.integers(low, high, (N, count))), 256 // count, axis=1)


def any_finite_bits(rng: np.random.Generator) -> np.ndarray:
    x = rng.integers(0, 2**32, (N, 256), dtype=np.uint32).view(F32)
    return np.where(np.isfinite(x), x, F32(1))


def bits_below(rng: np.random.Generator, limit: int) -> np.ndarray:
    """Floats whose magnitude, as bits, is below ``limit``, evenly over the bit patterns."""
    return rng.integers(0, limit, (N, 256), dtype=np.uint32).view(F32)


def either_sign(rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
    return np.where(rng.random(x.shape) < 0.5, -x, x)


def half_way(rng: np.random.Generator, limit: int, kept: int) -> np.ndarray:
    """Floats half way between two that have the ``kept`` upper bits only."""
    bits = rng.integers(0, limit >> (32 - kept), (N, 256), dtype=np.uint32) << (32 - kept)
    return (bits | (1 << (31 - kept))).astype(np.uint32).view(F32)


def neighbours_of_float16(rng: np.random.Generator) -> np.ndarray:
    x = rng.integers(0, 0x7C00, (N, 256), dtype=np.uint16).view(np.float16).astype(F32)
    return np.nextafter(x, either_sign(rng, np.full_like(x, np.inf)))


# fmt: off
CASES: dict[str, Case] = {
    "normal":                     normal,
    "heavy tails":                lambda rng: rng.standard_cauchy((N, 256)),
    "trained-like":               lambda rng: rng.standard_t(4, (N, 256)) * rng.lognormal(-4, 1, (N, 1)),
    "all negative":               lambda rng: -np.abs(normal(rng)),
    "all positive":               lambda rng: np.abs(normal(rng)),
    "far from zero":              lambda rng: normal(rng) * 1e-2 + np.repeat(normal(rng)[:, :16], 16, axis=1),
    "constant":                   lambda rng: np.repeat(normal(rng)[:, :1], 256, axis=1),
    "zeros":                      lambda rng: np.zeros((N, 256)),
    "zeros of both signs":        lambda rng: np.where(rng.random((N, 256)) < 0.5, -0.0, 0.0),
    "not negative, both zeros":   lambda rng: np.where(rng.random((N, 256)) < 0.3, -0.0, np.abs(rng.integers(-2, 3, (N, 256)))),
    "one outlier":                lambda rng: normal(rng) * np.where(np.arange(256) == rng.integers(0, 256, (N, 1)), 1e5, 1),
    "one element":                lambda rng: normal(rng) * (np.arange(256) == rng.integers(0, 256, (N, 1))),
    "ties":                       lambda rng: rng.integers(-8, 9, (N, 256)),
    "ties, halves":               lambda rng: rng.integers(-254, 255, (N, 256)) / 2,
    "subnormal":                  lambda rng: normal(rng) * powers(rng, -148, -122, 8),
    "scale underflows float16":   lambda rng: normal(rng) * powers(rng, -32, -14, 8),
    "scale overflows float16":    lambda rng: normal(rng) * powers(rng, 10, 30, 8),
    "around 1e-15":               lambda rng: normal(rng) * powers(rng, -56, -40, 16),
    "some scales below 1e-15": lambda rng: normal(rng) * powers(rng, -50, -43, 1) * powers(rng, -7, 1, 16),
    "squares overflow":           lambda rng: normal(rng) * powers(rng, 57, 125, 8),
    "largest, one and zero":      lambda rng: rng.choice([LARGEST, -LARGEST, 1, 0], (N, 256)),
    "every scale":                lambda rng: normal(rng) * powers(rng, -149, 125, 16),
    "every scale per element":    lambda rng: normal(rng) * powers(rng, -149, 125, 256),
    "any finite bits":            any_finite_bits,
    "scale without inverse":      lambda rng: either_sign(rng, bits_below(rng, 1 << 22)),
    "tiny":                       lambda rng: either_sign(rng, bits_below(rng, 1 << 25)),
    "neighbours of float16s":     neighbours_of_float16,
    "half way between float16s":  lambda rng: either_sign(rng, half_way(rng, 0x47800000, 19)),
    "half way between bfloat16s": lambda rng: either_sign(rng, half_way(rng, 0x7F800000, 16)),
}
# fmt: on


def every_case() -> np.ndarray:
    """All cases one below the other, float32 [N · cases, 256]."""
    parts = [case(np.random.default_rng(seed)) for seed, case in enumerate(CASES.values())]
    return np.clip(np.concatenate(parts), -LARGEST, LARGEST).astype(F32)


def assert_same_bytes(name: str, x: np.ndarray, device: str = "cpu") -> None:
    """x: [n, 256].  The torch encoder makes the bytes of the numba one."""
    qtype = QTYPES[name]
    ours = encode(torch.from_numpy(x).to(device), qtype)
    assert ours.device.type == device
    theirs = quants.encode(x, qtype, 256).reshape(len(x), -1)
    assert ours.shape == (theirs.size,)
    wrong = np.flatnonzero((ours.cpu().numpy().reshape(theirs.shape) != theirs).any(1))
    where = sorted({list(CASES)[i // N] for i in wrong if len(x) == N * len(CASES)})
    assert not len(wrong), f"{name}: {len(wrong)} of {len(x)} rows differ, the first is {wrong[0]} {where}"


def assert_same_bits(name: str, raw: np.ndarray, device: str = "cpu") -> None:
    """The torch decoder makes the bits of the numba one, and NaN where that does."""
    ours = decode(torch.from_numpy(raw).to(device), QTYPES[name])
    assert ours.device.type == device
    ours, theirs = ours.cpu().numpy(), quants.decode(raw, QTYPES[name])
    np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs))
    number = ~np.isnan(theirs)
    assert ours.shape == theirs.shape
    assert number.any()
    np.testing.assert_array_equal(ours.view(np.uint32)[number], theirs.view(np.uint32)[number])


def random_bytes(name: str, n_blocks: int = 500) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, n_blocks * QTYPES[name].type_size, dtype=np.uint8)


def test_types() -> None:
    assert set(TORCH_TYPES) == {name for name in QTYPES if quants.can_encode(QTYPES[name])}


@pytest.mark.parametrize("name", TORCH_TYPES)
def test_encodes_like_numba(name: str) -> None:
    assert_same_bytes(name, every_case())


@pytest.mark.parametrize("name", TORCH_TYPES)
def test_decodes_like_numba(name: str) -> None:
    assert_same_bits(name, quants.encode(every_case(), QTYPES[name], 256))


@pytest.mark.parametrize("name", TORCH_TYPES)
def test_decodes_any_bytes_like_numba(name: str) -> None:
    assert_same_bits(name, random_bytes(name))


@pytest.mark.parametrize("name", TORCH_TYPES)
def test_encodes_decoded_values_like_numba(name: str) -> None:
    """Values on the grid of the type: every division lands on an integer or between two."""
    raw = quants.encode(every_case()[:200], QTYPES[name], 256)
    assert_same_bytes(name, quants.decode(raw, QTYPES[name]).reshape(-1, 256))


exponents = st.lists(st.integers(-149, 126), min_size=16, max_size=16)
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
few = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 1e-15, -1e-15, 1e-40, 3e38, -3e38, 65504.0, 65520.0])


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(TORCH_TYPES), exponents, st.integers(1, 1 << 23), st.integers(0, 2**32 - 1))
def test_random_blocks_with_a_scale_per_sub_block(name: str, scales: list[int], mantissas: int, seed: int) -> None:
    integers = np.random.default_rng(seed).integers(-mantissas, mantissas + 1, (8, 16, 16)) / mantissas
    x = np.clip(np.ldexp(integers, np.array(scales)[:, None]), -LARGEST, LARGEST)
    assert_same_bytes(name, x.astype(F32).reshape(8, 256))


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(TORCH_TYPES), arrays(F32, (2, 256), elements=st.one_of(finite, few), fill=st.one_of(finite, few)))
def test_any_finite_floats(name: str, x: np.ndarray) -> None:
    assert_same_bytes(name, x)


# --- the search -----------------------------------------------------------------------------------------------------------------------


def test_steps_are_numbas() -> None:
    for name in ("Q2", "Q4", "Q5", "Q6"):
        assert getattr(torch_k, f"{name}_STEPS") == getattr(k_search, f"_{name}_STEPS").tolist()


@numba.njit
def _fit_by_coordinate(x, codes, s):
    for b in range(len(x)):
        store(s, b, fit_by_coordinate(x[b], codes[b], 4))


def test_fit_by_coordinate_to_the_last_bit() -> None:
    """The bytes of Q3_K hardly show what the fifth sweep does, and never the last bits of a scale."""
    rng = np.random.default_rng(5)
    any_scale = rng.standard_normal((200, 16, LANES)) * np.exp2(rng.integers(-140, 125, (200, 1, LANES)))
    x = np.concatenate([rng.integers(-20, 21, (1500, 16, LANES)), any_scale]).astype(F32)
    codes, s = np.empty_like(x), np.empty((len(x), LANES), F32)
    _fit_by_coordinate(x, codes, s)
    ours, our_codes = torch_fit.fit_by_coordinate(torch.from_numpy(x).transpose(0, 1).reshape(16, -1), 4)
    np.testing.assert_array_equal(ours.numpy().view(np.uint32), s.reshape(-1).view(np.uint32))
    np.testing.assert_array_equal(our_codes.numpy(), codes.transpose(1, 0, 2).reshape(16, -1))


# --- bits -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLANES)
def test_codes_come_back_and_touch_nothing_else(name: str) -> None:
    qtype, planes = QTYPES[name], PLANES[name]
    top = 2 ** sum(p.width for p in planes)
    codes = torch.from_numpy(np.random.default_rng(3).integers(0, top, (9, qtype.block_size), dtype=np.uint8))
    blocks = torch.full((9, qtype.type_size), 0xA5, dtype=torch.uint8)
    write_codes(codes, planes, blocks)
    assert torch.equal(read_codes(blocks, planes), codes)
    others = [i for i in range(qtype.type_size) if not any(p.start <= i < p.stop for p in planes)]
    assert len(others) == qtype.type_size - qtype.block_size * sum(p.width for p in planes) // 8
    assert (blocks[:, others] == 0xA5).all()


def test_scales_come_back() -> None:
    scales = torch.from_numpy(np.random.default_rng(4).integers(0, 256, (9, 16), dtype=np.uint8))
    assert torch.equal(read_scales_q3(write_scales_q3(scales & 63)), scales & 63)
    pairs = scales.reshape(9, 2, 8)
    assert torch.equal(read_scales_q4(write_scales_q4(pairs)), pairs.clamp(max=63))


# --- shapes, strides, slabs, errors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TORCH_TYPES)
def test_slabs_do_not_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(7, 256)
    whole = encode(x, QTYPES[name])
    monkeypatch.setattr(torch_codecs, "SLAB", 512)  # two super-blocks, so that the last slab is not full
    assert torch.equal(encode(x, QTYPES[name]), whole)
    monkeypatch.setattr(torch_codecs, "SLAB", 1 << 24)
    decoded = decode(whole, QTYPES[name])
    monkeypatch.setattr(torch_codecs, "SLAB", 512)
    assert torch.equal(decode(whole, QTYPES[name]), decoded)


@pytest.mark.parametrize("name", TORCH_TYPES)
def test_any_strides_and_addresses(name: str) -> None:
    qtype, x = QTYPES[name], torch.randn(256, 6)
    raw = encode(x.T, qtype)
    assert torch.equal(raw, encode(x.T.contiguous(), qtype))
    assert torch.equal(raw, encode(x.T.reshape(2, 3, 256), qtype))
    odd = torch.cat([raw[:1], raw])[1:]
    assert odd.data_ptr() % 2
    assert torch.equal(decode(odd, qtype), decode(raw, qtype))
    assert torch.equal(decode(raw[: qtype.type_size], qtype), decode(raw, qtype)[: qtype.block_size])


@pytest.mark.parametrize("name", TORCH_TYPES)
def test_nothing_becomes_nothing(name: str) -> None:
    assert encode(torch.empty(0, 256), QTYPES[name]).shape == (0,)
    assert encode(torch.empty(3, 0), QTYPES[name]).shape == (0,)
    assert decode(torch.empty(0, dtype=torch.uint8), QTYPES[name]).shape == (0,)


def test_encoding_leaves_the_values_as_they_are() -> None:
    x = torch.randn(2, 256)
    before = x.clone()
    for name in TORCH_TYPES:
        encode(x, QTYPES[name])
    assert torch.equal(x, before)


def test_decoding_float32_copies() -> None:
    raw = encode(torch.ones(4), QTYPES["F32"])
    decode(raw, QTYPES["F32"]).zero_()
    assert decode(raw, QTYPES["F32"]).tolist() == [1.0] * 4


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_numbers_are_named(bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_codecs, "SLAB", 256)
    x = torch.randn(2, 3, 256)
    x[1, 2, 77] = x[1, 2, 78] = bad
    with pytest.raises(NonFiniteError, match=rf"\[1\]\[2\]\[77\] of \[2, 3, 256\] is {bad}.*Q4_K, found 2 of 1536"):
        encode(x, QTYPES["Q4_K"])


def test_errors() -> None:
    with pytest.raises(UnsupportedTypeError, match=r"cannot encode IQ4_XS with torch: expected one of F32, .*Q6_K"):
        encode(torch.ones(256), QTYPES["IQ4_XS"])
    with pytest.raises(UnsupportedTypeError, match="cannot decode Q8_K"):
        decode(torch.zeros(292, dtype=torch.uint8), QTYPES["Q8_K"])
    for raw in (torch.zeros(143, dtype=torch.uint8), torch.zeros(1, 144, dtype=torch.uint8), torch.zeros(144, dtype=torch.int8)):
        with pytest.raises(BlockError, match="multiple of 144 bytes"):
            decode(raw, QTYPES["Q4_K"])
    with pytest.raises(BlockError, match="row of 128"):
        encode(torch.ones(4, 128), QTYPES["Q4_K"])
    for x in (torch.ones(256).double(), torch.tensor(1.0)):
        with pytest.raises(ShapeError, match=r"expected torch.float32\[..., n_per_row\]"):
            encode(x, QTYPES["Q4_K"])


# --- what makes the bits the same on every device -------------------------------------------------------------------------------------


class OtherDevice(TorchDispatchMode):
    """The CPU, with the liberties a GPU takes: where results are not fixed by IEEE 754, other ones than the CPU's.

    tensor / number is a product with the reciprocal, √x is off by one last bit, a new NaN has all bits set,
    the smallest and largest of ±0 is the other zero, a float that no integer of the type holds becomes 1; sums of floats are refused.
    """

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = function._schema.name.removeprefix("aten::"), kwargs or {}
        assert (
            name not in ("sum", "cumsum", "mean", "mm", "bmm", "addmm", "dot", "norm", "linalg_vector_norm")
            or not args[0].is_floating_point()
        )
        assert name not in ("addcmul", "addcdiv", "lerp", "reciprocal", "rsqrt", "pow"), f"{name} rounds twice, or once where two do"
        assert kwargs.get("alpha", 1) == 1
        if name == "div" and not isinstance(args[1], torch.Tensor):
            return args[0] * float(F32(1) / F32(args[1]))
        out = function(*args, **kwargs)
        if not isinstance(out, torch.Tensor) or out.is_complex():
            return out
        if name == "sqrt" and out.dtype == torch.float32:
            return out.nextafter(torch.tensor(torch.inf))
        if name in ("amin", "amax"):
            plus, minus = ((args[0] == 0) & (args[0].signbit() == sign) for sign in (False, True))
            both = plus.to(torch.uint8).amax(*args[1:]) * minus.to(torch.uint8).amax(*args[1:])
            return torch.where((out == 0) & (both == 1), -out, out)
        if name == "_to_copy" and args[0].is_floating_point() and out.dtype in (torch.uint8, torch.int8):
            limits = torch.iinfo(out.dtype)
            return torch.where((args[0] > limits.min - 1) & (args[0] < limits.max + 1), out, 1)
        if out.dtype == torch.float32 and name in ("add", "sub", "mul", "div"):
            return torch.where(out.isnan(), torch.tensor(2**31 - 1, dtype=torch.int32).view(torch.float32), out)
        return out


@pytest.mark.parametrize("name", TORCH_TYPES)
def test_bits_do_not_depend_on_what_devices_may_do(name: str) -> None:
    x = every_case()[::4]
    with OtherDevice():
        assert_same_bytes(name, x)
        assert_same_bits(name, random_bytes(name))


@pytest.mark.parametrize("name", TORCH_TYPES)
def test_nothing_goes_through_the_host(name: str) -> None:
    """The meta device has shapes only: whoever asks for a value, or mixes in a tensor of the CPU, fails."""
    qtype = QTYPES[name]
    raw = torch.empty(3, qtype.type_size, dtype=torch.uint8, device="meta")
    assert decode(raw.flatten(), qtype).is_meta
    torch_codecs.CODECS[name].encode(torch.empty(3, qtype.block_size, device="meta"), raw)


def test_other_device_is_another() -> None:
    """What the test above relies on."""
    x, smallest = torch.tensor([5.0, 0.0, torch.inf]), torch.tensor([[-0.0, 0.0]]).amin(1)
    with OtherDevice():
        assert (x / 49)[0] != torch_exact.quotient(x, 49)[0]
        assert (x - x).view(torch.int32)[2] == 2**31 - 1
        assert (torch.tensor([[-0.0, 0.0]]).amin(1).signbit() != smallest.signbit()).all()
        with pytest.raises(AssertionError):
            x.sum()


def test_quotient_rounds_once() -> None:
    x = np.random.default_rng(2).standard_normal(10_000).astype(F32)
    t = torch.from_numpy(x)
    np.testing.assert_array_equal(torch_exact.quotient(t, 127).numpy(), x / F32(127))
    np.testing.assert_array_equal(torch_exact.quotient(0.3, t).numpy(), F32(0.3) / x)
    np.testing.assert_array_equal(torch_exact.quotient(t, t.flip(0)).numpy(), x / x[::-1])


def test_square_root_rounds_once() -> None:
    x = np.concatenate([np.arange(0x3F800000, 0x40800000, 7), np.arange(0, 1 << 23, 101)]).astype(np.uint32).view(F32)
    np.testing.assert_array_equal(torch_exact.square_root(torch.from_numpy(x)).numpy(), np.sqrt(x))


def test_sum_in_order() -> None:
    terms = torch.tensor([[2.0**24, 1.0], [1.0, 1.0], [1.0, 2.0**24]])  # 2²⁴ + 1 is 2²⁴ again
    assert torch_exact.sum_in_order(terms).tolist() == [2.0**24, 2.0**24 + 2]
    assert str(float(torch_exact.sum_in_order(torch.tensor([-0.0])))) == "0.0"  # as from a C variable that starts at 0


def test_nearest() -> None:
    v = torch.tensor([-4194303, -2.5, -1.5, -0.5, -0.0, 0.49999997, 0.5, 1.5, 2.5, 3.5000002, 15.5, 16.5, 31.499998, 4194303])
    assert torch_exact.nearest(v).tolist() == v.round().int().tolist()
    assert torch_exact.nearest(torch.tensor([torch.inf, -torch.inf])).tolist() == [-(2**22), -(2**22)]  # never the largest code


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1, 0x7F800001])
def test_nearest_of_any_nan_is_0(bits: int) -> None:
    assert torch_exact.nearest(torch.tensor([bits], dtype=torch.int32).view(torch.float32)).tolist() == [0]


def test_round_half_away() -> None:
    v = torch.tensor([0.49999997, 0.5, -0.5, 1.5, -2.5, 2.4999998, -126.5, 127.00001, 0.0])
    assert torch_exact.round_half_away(v).tolist() == [0.0, 1.0, -1.0, 2.0, -3.0, 2.0, -127.0, 127.0, 0.0]


def test_signed_peak_is_the_first_of_greatest_magnitude() -> None:
    x = torch.tensor([[1.0, -3.0, 3.0, -3.0], [0.0, 2.0, 2.0, -2.0], [-0.0, -0.0, 0.0, -0.0]])
    assert [str(v) for v in torch_exact.signed_peak(x, 1).tolist()] == ["-3.0", "2.0", "0.0"]
    assert [str(v) for v in torch_exact.signed_peak(x.T, 0).tolist()] == ["-3.0", "2.0", "0.0"]
