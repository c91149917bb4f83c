"""Float products in the two orders of ggml's AVX2 code: a sum runs in 8 or in 32 chains, which are added in the end.

    y[t,o] = Σ_k w[o,k] · x[t,k] = fold(c₀ … c₇),   cⱼ = Σ_{k ≡ j mod 8} w[o,k] · x[t,k]        (products of matrices)
    y[t,o] = Σ_k w[o,k] · x[t,k] = fold(c₀ … c₃₁),  cⱼ = Σ_{k ≡ j mod 32} w[o,k] · x[t,k]       (single rows)

with fused multiply-adds in the order of k.  Source: ``tinyBLAS::gemm_bloc`` and ``hsum`` in ggml-cpu/llamafile/sgemm.cpp,
``ggml_vec_dot_f32`` in vec.cpp, ``GGML_F32x8_REDUCE`` in simd-mappings.h.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quantscope.quants.kernel import inline, kernel
from quantscope.quants.simd import LANES, f32, load
from quantscope.quants.simd_bytes import multiply_add
from quantscope.quants.tiles import ROW_STEP, Floats, Four, by_panels, outputs, panels, plus, store_four


def float_product(x: Floats, w: Floats, *, by_rows: bool = False) -> Floats:
    """x · Wᵀ: x float32 [T,K], w float32 [O,K] → float32 [T,O].  by_rows: as ggml multiplies where it cannot multiply matrices."""
    out, multiply = outputs(len(x), len(w)), _in_32_chains if by_rows else _in_8_chains
    missing = -x.shape[1] % (32 if by_rows else 8)
    columns = panels(np.pad(w, ((0, 0), (0, missing))) if missing else w)
    rows = np.pad(x, ((0, len(out) - len(x)), (0, missing))) if missing or len(x) % ROW_STEP else np.ascontiguousarray(x)
    by_panels(len(columns), lambda p, q: multiply(columns[p:q], rows, out, LANES * p))
    return out[: len(x), : len(w)]


@kernel
def _in_8_chains(columns: Any, x: Any, out: Any, first: int) -> None:
    """Into out[:, first …].  columns: float32 [P,K,16], x: float32 [R,K]."""
    for p in range(columns.shape[0]):
        w = columns[p]
        for t in range(0, x.shape[0], 4):
            even = plus(plus(_chain(w, x, t, 0, 8), _chain(w, x, t, 4, 8)), plus(_chain(w, x, t, 2, 8), _chain(w, x, t, 6, 8)))
            odd = plus(plus(_chain(w, x, t, 1, 8), _chain(w, x, t, 5, 8)), plus(_chain(w, x, t, 3, 8), _chain(w, x, t, 7, 8)))
            store_four(out, t, first + LANES * p, plus(even, odd))


@kernel
def _in_32_chains(columns: Any, x: Any, out: Any, first: int) -> None:
    """As above."""
    for p in range(columns.shape[0]):
        w = columns[p]
        for t in range(0, x.shape[0], 4):
            low = plus(_eighth(w, x, t, 0), _eighth(w, x, t, 1))
            store_four(out, t, first + LANES * p, plus(low, plus(_eighth(w, x, t, 2), _eighth(w, x, t, 3))))


@inline
def _eighth(panel: Any, x: Any, t: int, j: int) -> Four:
    """The eight chains of the elements j mod 4."""
    return plus(_four_chains(panel, x, t, j), _four_chains(panel, x, t, j + 4))


@inline
def _four_chains(panel: Any, x: Any, t: int, j: int) -> Four:
    """The four chains of the elements j mod 8."""
    even = plus(_chain(panel, x, t, j, 32), _chain(panel, x, t, j + 16, 32))
    return plus(even, plus(_chain(panel, x, t, j + 8, 32), _chain(panel, x, t, j + 24, 32)))


@inline
def _chain(panel: Any, x: Any, t: int, start: int, step: int) -> Four:
    """The elements start, start + step … of rows t … t + 3."""
    y0 = y1 = y2 = y3 = f32(0.0)
    for k in range(start, x.shape[1], step):
        w = load(panel, k)
        y0 = multiply_add(w, f32(x[t, k]), y0)
        y1 = multiply_add(w, f32(x[t + 1, k]), y1)
        y2 = multiply_add(w, f32(x[t + 2, k]), y2)
        y3 = multiply_add(w, f32(x[t + 3, k]), y3)
    return y0, y1, y2, y3
