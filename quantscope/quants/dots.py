"""Products of rounded activations with blocks, as ggml computes them: integers within a unit, float32 between units.

    y[t,o] = Σ_u d_w[o,u] · d_a[t,u] · Σ_{k in u} w[o,k] · a[t,k]          w, a int16, the inner sum int32

The inner sum is exact, so that only the order of the outer sum can differ from ggml's: by NMSE 1e-13.  Here it is the order of ggml's AVX2
code for prompts of eight tokens or more; docs/decisions/0008-ggml-arithmetic.md lists for which types not even that is left.
Source: ggml-cpu/repack.cpp, arch/x86/repack.cpp, llamafile/sgemm.cpp, tiled/tiled-kernel.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from quantscope.qtypes import QuantType
from quantscope.quants.activations import Activations, round_activations
from quantscope.quants.integers import LAYOUTS, Bytes, Integers, Layout, integers
from quantscope.quants.kernel import inline, kernel
from quantscope.quants.simd import LANES, f32, i32, load, negative, to_f32
from quantscope.quants.simd_bytes import multiply_add, pair_products
from quantscope.quants.tiles import ROW_STEP, Floats, Four, by_panels, outputs, panels, plus, store_four

Multiply: TypeAlias = Callable[[Activations, Integers, int, Floats, int], None]  # into columns first … first + n_out of an array
BAND = 1 << 22  # weights that are unpacked at a time: 16 MB as float32


def product(x: Floats, rows: Bytes, kind: QuantType, *, interleaves: bool = True) -> Floats:
    """x · Wᵀ: x float32 [T,K], rows uint8 [O, bytes of K weights] of a type of LAYOUTS → float32 [T,O].

    interleaves: whether ggml may interleave the rows; it does not do so where it multiplies a stack of matrices with a stack of inputs.
    """
    layout = LAYOUTS[kind.name]
    a = round_activations(x, layout.activation)
    out = outputs(len(x), len(rows))
    multiply = _order(layout, len(x), interleaves and layout.interleaved and len(rows) % 8 == 0)
    step = max(1, BAND // (LANES * x.shape[1])) * LANES
    for first in range(0, len(rows), step):
        band = rows[first : first + step]
        multiply(a, integers(band.reshape(-1, kind.type_size), kind), len(band), out, first)
    return out[: len(x), : len(rows)]


def _order(layout: Layout, n_rows: int, interleaved: bool) -> Multiply:
    """ggml interleaves the rows of some types, eight at a time, and multiplies fewer than eight activations row by row."""
    if layout.activation != "Q8_K":
        return _units if interleaved else _units_in_eight
    if interleaved:
        return _interleaved_super_blocks
    return _super_blocks if n_rows >= 8 else partial(_super_blocks_in_eight, min_chains=layout.min_chains)


def _units(a: Activations, w: Integers, n_out: int, out: Floats, first: int) -> None:
    """Scales for 16 or 32 weights and for 32 activations; one chain."""
    scales, a_scales = _per_unit(w.scales.reshape(n_out, -1), a.scales)
    words, steps, codes = panels(_pairs(w.codes, n_out)), panels(scales), a.codes.view(np.int32)
    by_panels(len(words), lambda p, q: _one_chain(words[p:q], steps[p:q], codes, a_scales, out, first + LANES * p))


def _units_in_eight(a: Activations, w: Integers, n_out: int, out: Floats, first: int) -> None:
    """As above in eight chains, each with an eighth of every unit; float minima have a chain of their own."""
    scales, a_scales = _per_unit(w.scales.reshape(n_out, -1), a.scales)
    words, steps, codes = panels(_pairs(w.codes, n_out)), panels(scales), a.codes.view(np.int32)
    by_panels(len(words), lambda p, q: _eight_chains(words[p:q], steps[p:q], codes, a_scales, out, first + LANES * p))
    if w.min_scales is not None:
        minima, sums = w.min_scales.reshape(n_out, -1), np.zeros((len(out), n_out), np.float32)
        for unit in range(minima.shape[1]):
            sums += a.sums[:, unit, None] * minima[:, unit]  # exact products: both factors are float16 values
        out[:, first : first + n_out] += sums


def _super_blocks(a: Activations, w: Integers, n_out: int, out: Floats, first: int) -> None:
    """Scales for 256 weights and activations, integer minima for 16 weights or none; one chain."""
    words, steps, codes = panels(_pairs(w.codes, n_out)), panels(w.scales.reshape(n_out, -1)), a.codes.view(np.int32)
    minima, min_steps, sums = words[:, :0], steps, codes[:, :0]
    if w.minima is not None and w.min_scales is not None:
        minima, min_steps, sums = panels(_pairs(w.minima, n_out)), panels(w.min_scales.reshape(n_out, -1)), a.sums.view(np.int32)

    def multiply(p: int, q: int) -> None:
        weights = words[p:q], steps[p:q], minima[p:q], min_steps[p:q]
        _one_chain_with_minima(*weights, codes, sums, a.scales, out, first + LANES * p)

    by_panels(len(words), multiply)


def _interleaved_super_blocks(a: Activations, w: Integers, n_out: int, out: Floats, first: int) -> None:
    """As above; of four rows together, every 64 elements are a unit; of rows left over, all 256.  The minima have a chain of their own."""
    assert w.minima is not None and w.min_scales is not None  # noqa: PT018
    less = Integers(w.minima, w.min_scales)
    left, whole = np.empty_like(out), a.n_rows // ROW_STEP * ROW_STEP
    for rows, per_block in ((slice(0, whole), 4), (slice(whole, None), 1)):
        part = Activations(0, a.codes[rows], np.repeat(a.scales[rows], per_block, axis=1), a.sums[rows])
        _units(part, w, n_out, out[rows], first)
        _units(replace(part, codes=part.sums), less, n_out, left[rows], first)
    columns = slice(first, first + n_out)
    out[:, columns] -= left[:, columns]


def _super_blocks_in_eight(a: Activations, w: Integers, n_out: int, out: Floats, first: int, *, min_chains: int) -> None:
    """Scales for 256 in eight chains, with four of every 32 elements each.  Minima: one chain, or one for 64 elements.

    Where codes are shifted, ggml multiplies what they were before, and takes the shifts off in chain i for the elements 32·i … 32·i + 31.
    """
    codes, shifts, sums = w.codes, np.empty((len(w.codes), 8, 0), np.int16), np.empty((*a.scales.shape, 8, 0), np.int16)
    if w.shifts is not None:
        codes = codes + np.repeat(w.shifts, 16, axis=1)
        shifts, sums = -w.shifts.reshape(-1, 8, 2), a.sums.reshape(*a.scales.shape, 8, 2)
    words = np.concatenate([_by_chains(codes.reshape(-1, 8, 8, 4)), shifts], axis=-1)  # [n,8,32 or 34]
    rows = np.concatenate([_by_chains(a.codes.reshape(*a.scales.shape, 8, 8, 4)), sums], axis=-1)
    _units_in_eight(replace(a, codes=rows.reshape(len(rows), -1)), Integers(words, w.scales), n_out, out, first)
    if w.minima is not None and w.min_scales is not None:
        less, minima, sums = np.empty_like(out), w.minima, a.sums
        if min_chains == 4:  # the other four of eight have nothing to add
            minima, sums = (np.pad(x.reshape(-1, 16), ((0, 0), (0, 16))) for x in (minima, sums))
        multiply = _units if min_chains == 1 else _units_in_eight
        multiply(replace(a, codes=sums.reshape(len(a.codes), -1)), Integers(minima, w.min_scales), n_out, less, first)
        out[:, first : first + n_out] -= less[:, first : first + n_out]


def _by_chains(codes: NDArray[np.int16]) -> NDArray[np.int16]:
    """[…,8 parts,8 chains,4] → […,8 chains,32]."""
    return codes.swapaxes(-3, -2).reshape(*codes.shape[:-3], 8, 32)


def _pairs(codes: NDArray[np.int16], n_out: int) -> NDArray[np.int32]:
    """Two codes in each word: int16 [n,block] → int32 [O,K/2]."""
    return codes.reshape(n_out, -1).view(np.int32)


def _per_unit(scales: Floats, a_scales: Floats) -> tuple[Floats, Floats]:
    """Both repeated so that there is one for each of the finer units."""
    n = max(scales.shape[1], a_scales.shape[1])
    return np.repeat(scales, n // scales.shape[1], axis=1), np.repeat(a_scales, n // a_scales.shape[1], axis=1)


@kernel
def _one_chain(words: Any, scales: Any, a: Any, a_scales: Any, out: Any, first: int) -> None:
    """Into out[:, first …].

    words: int32 [P,K/2,16], two codes of one output in each; scales: float32 [P,n,16]; a: int32 [R,K/2]; a_scales: float32 [R,n].
    """
    unit = words.shape[1] // scales.shape[1]
    for p in range(words.shape[0]):
        for t in range(0, a.shape[0], 4):
            store_four(out, t, first + LANES * p, _chain(words[p], scales[p], a, a_scales, t, 0, unit))


@kernel
def _eight_chains(words: Any, scales: Any, a: Any, a_scales: Any, out: Any, first: int) -> None:
    """As above, the chains added as in ``float_dots``."""
    part = words.shape[1] // scales.shape[1] // 8
    for p in range(words.shape[0]):
        w, d = words[p], scales[p]
        for t in range(0, a.shape[0], 4):
            c0, c4 = _chain(w, d, a, a_scales, t, 0, part), _chain(w, d, a, a_scales, t, 4 * part, part)
            c2, c6 = _chain(w, d, a, a_scales, t, 2 * part, part), _chain(w, d, a, a_scales, t, 6 * part, part)
            even = plus(plus(c0, c4), plus(c2, c6))
            c1, c5 = _chain(w, d, a, a_scales, t, part, part), _chain(w, d, a, a_scales, t, 5 * part, part)
            c3, c7 = _chain(w, d, a, a_scales, t, 3 * part, part), _chain(w, d, a, a_scales, t, 7 * part, part)
            store_four(out, t, first + LANES * p, plus(even, plus(plus(c1, c5), plus(c3, c7))))


@inline
def _chain(panel: Any, steps: Any, a: Any, a_scales: Any, t: int, start: int, n: int) -> Four:
    """Σ_u (d_w · d_a) · Σ w · a over words start … start + n of every unit, for rows t … t + 3."""
    y0 = y1 = y2 = y3 = f32(0.0)
    unit = panel.shape[0] // steps.shape[0]
    for u in range(steps.shape[0]):
        s = _sums(panel, a, t, u * unit + start, n)
        d = load(steps, u)
        y0 = multiply_add(to_f32(s[0]), d * f32(a_scales[t, u]), y0)
        y1 = multiply_add(to_f32(s[1]), d * f32(a_scales[t + 1, u]), y1)
        y2 = multiply_add(to_f32(s[2]), d * f32(a_scales[t + 2, u]), y2)
        y3 = multiply_add(to_f32(s[3]), d * f32(a_scales[t + 3, u]), y3)
    return y0, y1, y2, y3


@kernel
def _one_chain_with_minima(
    words: Any, scales: Any, minima: Any, min_scales: Any, a: Any, a_sums: Any, a_scales: Any, out: Any, first: int
) -> None:
    """y = Σ_b (d · Σ w · a − dmin · Σ minimum · sum) · d_a.  minima: int32 [P,m,16], min_scales: float32 [P,n,16], a_sums: int32 [R,m]."""
    n_blocks = scales.shape[1]
    block, mins = words.shape[1] // n_blocks, minima.shape[1] // n_blocks
    for p in range(words.shape[0]):
        panel, steps, min_panel, min_steps = words[p], scales[p], minima[p], min_scales[p]
        for t in range(0, a.shape[0], 4):
            y0 = y1 = y2 = y3 = f32(0.0)
            for b in range(n_blocks):
                s, m = _sums(panel, a, t, b * block, block), _sums(min_panel, a_sums, t, b * mins, mins)
                d, less = load(steps, b), negative(load(min_steps, b))
                y0 = multiply_add(multiply_add(less, to_f32(m[0]), d * to_f32(s[0])), f32(a_scales[t, b]), y0)
                y1 = multiply_add(multiply_add(less, to_f32(m[1]), d * to_f32(s[1])), f32(a_scales[t + 1, b]), y1)
                y2 = multiply_add(multiply_add(less, to_f32(m[2]), d * to_f32(s[2])), f32(a_scales[t + 2, b]), y2)
                y3 = multiply_add(multiply_add(less, to_f32(m[3]), d * to_f32(s[3])), f32(a_scales[t + 3, b]), y3)
            store_four(out, t, first + LANES * p, (y0, y1, y2, y3))


@inline
def _sums(panel: Any, a: Any, t: int, start: int, n: int) -> Four:
    """Σ w · a over n words of sixteen outputs, for rows t … t + 3."""
    s0 = s1 = s2 = s3 = i32(0)
    for k in range(start, start + n):
        w = load(panel, k)
        s0 = s0 + pair_products(w, i32(a[t, k]))
        s1 = s1 + pair_products(w, i32(a[t + 1, k]))
        s2 = s2 + pair_products(w, i32(a[t + 2, k]))
        s3 = s3 + pair_products(w, i32(a[t + 3, k]))
    return s0, s1, s2, s3
