"""Codes read out of blocks and put into them, against the decoders."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantscope.errors import UnsupportedTypeError
from quantscope.qtypes import QTYPES
from quantscope.quants import decode, encode
from quantscope.quants.codes import LAYOUTS, codes, grid, layout_of, supported, with_codes


def encoded(name: str, seed: int = 0, n: int = 1024) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((n // 256, 256)).astype(np.float32)
    return encode(x, QTYPES[name], 256)


@pytest.mark.parametrize("name", LAYOUTS)
def test_values_are_offset_plus_step_times_code(name: str) -> None:
    qtype, raw = QTYPES[name], encoded(name)
    step, offset = grid(raw, qtype)
    values = decode(raw, qtype).reshape(step.shape)
    np.testing.assert_allclose(offset + step * codes(raw, qtype), values, rtol=1e-5, atol=1e-6 * np.abs(values).max())
    assert len(np.unique(codes(raw, qtype))) > layout_of(qtype).top / 2


@pytest.mark.parametrize("name", LAYOUTS)
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_codes_that_are_put_in_come_out_again(name: str, seed: int) -> None:
    """And nothing else of the block changes: the old codes put back give the old bytes."""
    qtype, rng = QTYPES[name], np.random.default_rng(seed)
    raw = rng.integers(0, 256, 4 * qtype.type_size, dtype=np.uint8)  # any bytes: scales too
    new = rng.integers(0, layout_of(qtype).top + 1, (4, layout_of(qtype).block), dtype=np.uint8)
    changed = with_codes(raw, new, qtype)
    assert np.array_equal(codes(changed, qtype), new)
    assert np.array_equal(with_codes(changed, codes(raw, qtype), qtype), raw)


@pytest.mark.parametrize("name", LAYOUTS)
def test_one_code_changes_one_element(name: str) -> None:
    qtype, raw = QTYPES[name], encoded(name)
    before, at = codes(raw, qtype), 77 % layout_of(qtype).block
    new = before.copy()
    new[1, at] ^= 1
    a, b = (decode(r, qtype).reshape(before.shape) for r in (raw, with_codes(raw, new, qtype)))
    assert np.argwhere(a != b).tolist() == [[1, at]]


def test_types_without_codes_are_refused() -> None:
    assert {t.name for t in supported()} == set(LAYOUTS)
    with pytest.raises(UnsupportedTypeError, match="F16"):
        codes(np.zeros(2, np.uint8), QTYPES["F16"])
