"""What the kernels of products share: sixteen outputs side by side, four rows at a time.

A *chain* is a float32 sum that is added up in order, for sixteen outputs of four rows: four vectors.  ggml's AVX2 code sums either in one
chain, or in eight that it adds in the end as a 256-bit register is folded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from quantscope.quants.kernel import inline
from quantscope.quants.simd import LANES, Lanes
from quantscope.quants.simd_bytes import store_f32
from quantscope.quants.threads import in_shares, thread_count

Floats: TypeAlias = NDArray[np.float32]
Four: TypeAlias = tuple[Lanes, Lanes, Lanes, Lanes]
ROW_STEP = 4


def panels(values: NDArray[Any]) -> NDArray[Any]:
    """[n_out,n] → [P,n,16]: sixteen outputs side by side, the last panel filled up with zeros."""
    whole, missing = torch.from_numpy(values), -len(values) % LANES
    if missing:
        whole = torch.nn.functional.pad(whole, (0, 0, 0, missing))
    side_by_side: NDArray[Any] = whole.reshape(-1, LANES, whole.shape[1]).transpose(1, 2).contiguous().numpy()
    return side_by_side


def outputs(n_rows: int, n_out: int) -> Floats:
    """Room for n_rows · n_out results, both filled up to whole tiles."""
    return np.empty((-(-n_rows // ROW_STEP) * ROW_STEP, -(-n_out // LANES) * LANES), np.float32)


def by_panels(n_panels: int, multiply: Callable[[int, int], None]) -> None:
    """multiply(p, q) for panels p:q, a share for each thread."""
    in_shares(multiply, n_panels, min(n_panels, thread_count()))


def by_rows(n_rows: int, work: Callable[[int, int], None]) -> None:
    """work(a, b) for rows a:b, a share for each thread."""
    in_shares(work, n_rows, max(1, min(n_rows, thread_count())))


@inline
def plus(a: Four, b: Four) -> Four:
    return a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]


@inline
def store_four(out: Any, t: int, column: int, y: Four) -> None:
    """Sixteen outputs of rows t … t + 3."""
    width = out.shape[1]
    store_f32(out, t * width + column, y[0])
    store_f32(out, (t + 1) * width + column, y[1])
    store_f32(out, (t + 2) * width + column, y[2])
    store_f32(out, (t + 3) * width + column, y[3])
