"""Q2_K, Q3_K, Q4_K, Q5_K and Q6_K on torch tensors; formats and formulas are those of ``k_quants.py`` and ``k_search.py``.

A codec has ``decode(blocks)``, uint8 [n, type_size] → float32 [n, 256], and ``encode(x, blocks)``, which writes the n super-blocks of
finite x, float32 [n, 256]: fit, code the scales, choose the codes once more for the rounded scales, pack.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from quantscope.quants.torch_bits import (
    PLANES,
    Plane,
    joined,
    read_codes,
    read_halves,
    read_scales_q3,
    read_scales_q4,
    spread,
    write_codes,
    write_halves,
    write_scales_q3,
    write_scales_q4,
)
from quantscope.quants.torch_exact import nan_as_zero
from quantscope.quants.torch_fit import (
    TINY,
    code_scales_affine,
    code_scales_symmetric,
    fit_affine,
    fit_by_coordinate,
    fit_symmetric,
    magnitudes,
    recode_affine,
    recode_symmetric,
    rms_and_magnitudes,
)

Bytes = Callable[[Tensor], Tensor]  # uint8 → uint8


def _by_element(x: Tensor, size: int) -> Tensor:
    """[n, 256] → [size, n · 256/size]: element i of every sub-block in row i."""
    return x.reshape(-1, size).T.contiguous()


def _steps(start: float, numbers: Iterable[int], top: int) -> list[float]:
    """(start + i/10) + top for each number i, rounded to float32 after every operation."""
    steps: list[float] = (torch.tensor(list(numbers), dtype=torch.float32) * 0.1 + start + top).tolist()
    return steps


Q2_STEPS = _steps(-0.5, range(16), 3)
Q4_STEPS = _steps(-1.0, range(21), 15)
Q5_STEPS = _steps(-0.5, range(16), 31)
Q6_STEPS = _steps(0, [*range(-9, 0), *range(1, 10)], 32)


@dataclass(frozen=True)
class Affine:
    """x = (d · scale) · q − (dmin · min); d and dmin are next to each other from byte ``d`` on.

    Q2_K: 84 bytes: scales:16 qs:64 d:2 dmin:2               sub-blocks of 16; a byte: min (4 bits), scale (4 bits)
    Q4_K: 144 bytes: d:2 dmin:2 scales:12 qs:128             sub-blocks of 32
    Q5_K: 176 bytes: d:2 dmin:2 scales:12 qh:32 qs:128       as Q4_K
    """

    planes: tuple[Plane, ...]
    scales: slice  # bytes
    d: int  # byte
    read_scales: Bytes  # [n, bytes] → [n, 2, sub-blocks]: scales, minima
    write_scales: Bytes
    size: int  # of a sub-block
    top: int  # largest code
    scale_top: int
    steps: list[float]
    weights: Callable[[Tensor], Tensor]
    use_magnitude: bool

    def decode(self, blocks: Tensor) -> Tensor:
        step, offset = self._units(blocks)
        codes = read_codes(blocks, self.planes).reshape(len(blocks), -1, self.size).float()
        return (codes * step[..., None] - offset[..., None]).flatten(1)

    def encode(self, x: Tensor, blocks: Tensor) -> None:
        values = _by_element(x, self.size)
        s, m, codes = fit_affine(values, self.weights(values), self.top, self.steps, self.use_magnitude)
        fitted = torch.stack([s.view(len(x), -1), -m.view(len(x), -1)], 1)  # [n, 2, sub-blocks]
        scale_codes, d = code_scales_affine(fitted, self.scale_top)
        blocks[:, self.scales] = self.write_scales(scale_codes)
        write_halves(d, blocks, self.d)
        step, offset = (unit.flatten() for unit in self._units(blocks))
        codes = recode_affine(values, step, offset, self.top, codes)
        write_codes(codes.T.reshape(x.shape).to(torch.uint8), self.planes, blocks)

    def _units(self, blocks: Tensor) -> tuple[Tensor, ...]:
        """d · scale and dmin · min of every sub-block, float32 [n, sub-blocks] each."""
        units = read_halves(blocks, self.d, 2)[..., None] * self.read_scales(blocks[:, self.scales]).float()
        return units.unbind(1)


@dataclass(frozen=True)
class Symmetric:
    """x = (d · scale) · (q − half), sixteen sub-blocks of 16.

    Q3_K: 110 bytes: hmask:32 qs:64 scales:12 d:2            scales of 6 bits, stored as scale + 32
    Q6_K: 210 bytes: ql:128 qh:64 scales:16 d:2              signed bytes
    """

    planes: tuple[Plane, ...]
    scales: slice  # bytes
    d: int  # byte
    read_scales: Bytes  # [n, bytes] → [n, 16]
    write_scales: Bytes
    half: int
    scale_half: int
    scale_offset: int  # stored is scale + offset
    fit: Callable[[Tensor], tuple[Tensor, Tensor]]

    def decode(self, blocks: Tensor) -> Tensor:
        codes = read_codes(blocks, self.planes).reshape(-1, 16, 16).float()
        return ((codes - self.half) * self._units(blocks)[..., None]).flatten(1)

    def encode(self, x: Tensor, blocks: Tensor) -> None:
        values = _by_element(x, 16)
        s, codes = self.fit(values)
        scale_codes, d = code_scales_symmetric(s.view(-1, 16), self.scale_half, self.scale_offset)
        blocks[:, self.scales] = self.write_scales(scale_codes)
        write_halves(d, blocks, self.d)
        codes = recode_symmetric(values, self._units(blocks).flatten(), self.half, codes)
        write_codes(codes.T.reshape(x.shape).to(torch.uint8), self.planes, blocks)

    def _units(self, blocks: Tensor) -> Tensor:
        """d · scale of every sub-block, float32 [n, 16]."""
        scales = self.read_scales(blocks[:, self.scales]).view(torch.int8) - self.scale_offset
        return read_halves(blocks, self.d) * scales.float()


def _fit_q6(x: Tensor) -> tuple[Tensor, Tensor]:
    """``fit_symmetric``; all 0 in super-blocks where every scale is below TINY."""
    s, codes = fit_symmetric(x, 32, Q6_STEPS)
    zero = (nan_as_zero(s).abs() < TINY).view(-1, 16).all(1).repeat_interleave(16)
    return s.masked_fill(zero, 0), codes.masked_fill(zero, 0)


def _as_it_is(scales: Tensor) -> Tensor:
    return scales


K_TYPES: dict[str, Affine | Symmetric] = {
    "Q2_K": Affine(
        PLANES["Q2_K"],
        scales=slice(0, 16),
        d=80,
        read_scales=partial(spread, width=4),
        write_scales=partial(joined, width=4),
        size=16,
        top=3,
        scale_top=15,
        steps=Q2_STEPS,
        weights=magnitudes,
        use_magnitude=True,
    ),
    "Q3_K": Symmetric(
        PLANES["Q3_K"],
        scales=slice(96, 108),
        d=108,
        read_scales=read_scales_q3,
        write_scales=write_scales_q3,
        half=4,
        scale_half=32,
        scale_offset=32,
        fit=partial(fit_by_coordinate, half=4),
    ),
    "Q4_K": Affine(
        PLANES["Q4_K"],
        scales=slice(4, 16),
        d=0,
        read_scales=read_scales_q4,
        write_scales=write_scales_q4,
        size=32,
        top=15,
        scale_top=63,
        steps=Q4_STEPS,
        weights=rms_and_magnitudes,
        use_magnitude=False,
    ),
    "Q5_K": Affine(
        PLANES["Q5_K"],
        scales=slice(4, 16),
        d=0,
        read_scales=read_scales_q4,
        write_scales=write_scales_q4,
        size=32,
        top=31,
        scale_top=63,
        steps=Q5_STEPS,
        weights=rms_and_magnitudes,
        use_magnitude=False,
    ),
    "Q6_K": Symmetric(
        PLANES["Q6_K"],
        scales=slice(192, 208),
        d=208,
        read_scales=_as_it_is,
        write_scales=_as_it_is,
        half=32,
        scale_half=128,
        scale_offset=0,
        fit=_fit_q6,
    ),
}
