"""IQ4_NL as ggml writes it into a key/value cache: one scale a block, without the search for a better one that llama-quantize makes.

    level of x = the nearest to −127 · x / m        m: the element of the largest magnitude, its sign kept
    scale d    = Σ x³·level / Σ x²·level²           rounded to float16: squares, weighted by x²

Source: ``quantize_row_iq4_nl_ref`` in ggml-quants.c.  Only values are made, as a cache here holds values.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantscope.quants.i_quants import LEVELS

Floats = NDArray[np.float32]
BLOCK = 32
SMALLEST = np.float32(1e-15)  # a block below it becomes zeros


def stored_iq4_nl(x: Floats) -> Floats:
    """What is left of x float32 [n·32]: the same shape, equal bit for bit to what ggml stores and reads."""
    blocks = x.reshape(-1, BLOCK)
    magnitudes = np.abs(blocks)
    largest = np.take_along_axis(blocks, magnitudes.argmax(axis=1, keepdims=True), axis=1)  # [n,1]
    kept = magnitudes.max(axis=1, keepdims=True) >= SMALLEST
    inverse = np.float32(1) / (np.where(kept, largest, np.float32(1)) / LEVELS[0])
    levels = LEVELS[nearest(inverse * blocks)]
    products, squares = np.zeros(len(blocks), np.float32), np.zeros(len(blocks), np.float32)
    for j in range(BLOCK):  # float32 sums in this order
        weighted = blocks[:, j] * blocks[:, j] * levels[:, j]
        products += weighted * blocks[:, j]
        squares += weighted * levels[:, j]
    scale = np.divide(products, squares, out=np.zeros_like(products), where=squares > 0)
    scales = np.where(kept, scale.astype(np.float16).astype(np.float32)[:, None], np.float32(0))
    values: Floats = (scales * levels).reshape(x.shape)
    return values


def nearest(x: Floats) -> NDArray[np.int64]:
    """The number of the level nearest to x, the upper one of two that are as near."""
    above = np.searchsorted(LEVELS, x, side="right").clip(1, len(LEVELS) - 1)
    return np.where(x - LEVELS[above - 1] < LEVELS[above] - x, above - 1, above)
