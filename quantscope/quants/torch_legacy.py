"""F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 on torch tensors; formats and formulas are those of ``legacy.py``.

A codec has ``decode(blocks)``, uint8 [n, type_size] → float32 [n, block_size], and ``encode(x, blocks)``, which writes the n blocks of
finite x, float32 [n, block_size].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantscope.quants.torch_bits import PLANES, Plane, read_codes, read_halves, write_codes, write_halves
from quantscope.quants.torch_exact import first_of, quotient, round_half_away, signed_peak

TINY = 2.0**-128  # 1/d overflows up to here


@dataclass(frozen=True)
class Numbers:
    """F32, F16 and BF16: x itself."""

    dtype: torch.dtype

    def decode(self, blocks: Tensor) -> Tensor:
        return blocks.clone().view(self.dtype).float()  # a copy: the view needs an aligned address

    def encode(self, x: Tensor, blocks: Tensor) -> None:
        blocks[:] = x.to(self.dtype).view(torch.uint8)


@dataclass(frozen=True)
class Symmetric:
    """x = d · (q − half).

    Q4_0: 32 elements, 18 bytes: d:2 qs:16
    Q5_0: 32 elements, 22 bytes: d:2 qh:4 qs:16
    """

    planes: tuple[Plane, ...]
    half: int

    def decode(self, blocks: Tensor) -> Tensor:
        return (read_codes(blocks, self.planes).float() - self.half) * read_halves(blocks, 0)

    def encode(self, x: Tensor, blocks: Tensor) -> None:
        """d = peak / −half, q = ⌊x/d + half + 0.5⌋ < 2·half, peak = the signed element of greatest magnitude."""
        d = quotient(signed_peak(x, 1), -self.half)[:, None]
        write_halves(d.half(), blocks, 0)
        write_codes(_steps(x, d, torch.zeros_like(d), self.half + 0.5, 2 * self.half - 1), self.planes, blocks)


@dataclass(frozen=True)
class Affine:
    """x = d · q + m.

    Q4_1: 32 elements, 20 bytes: d:2 m:2 qs:16
    Q5_1: 32 elements, 24 bytes: d:2 m:2 qh:4 qs:16
    """

    planes: tuple[Plane, ...]
    top: int

    def decode(self, blocks: Tensor) -> Tensor:
        return read_codes(blocks, self.planes).float() * read_halves(blocks, 0) + read_halves(blocks, 2)

    def encode(self, x: Tensor, blocks: Tensor) -> None:
        """d = (max − min) / top, m = min, q = ⌊(x − m)/d + 0.5⌋ ≤ top; a min of zero has the sign of the first zero."""
        m = first_of(x, x == x.amin(1, keepdim=True), 1)[:, None]
        d = quotient(x.amax(1, keepdim=True) + 0.0 - m, self.top)  # + 0: where all are zero, −0 − 0 would give −0
        write_halves(torch.cat([d, m], 1).half(), blocks, 0)
        write_codes(_steps(x, d, m, 0.5, self.top), self.planes, blocks)


def _steps(x: Tensor, d: Tensor, minimum: Tensor, bias: float, top: int) -> Tensor:
    """min(⌊(x − minimum) / d + bias⌋, top), uint8 like x; a zero d counts as 1/d = 0.  d, minimum: [n, 1].

    All 0 where 1/d or the range overflows, as in ``legacy.py``.
    """
    usable = (d.abs() > TINY) & (d.abs() < torch.inf)
    inverse = torch.where(usable, quotient(1, d), 0.0)
    steps = ((x - minimum) * inverse + bias).clamp(max=top).to(torch.uint8)  # no step is negative, so towards zero is down
    return steps.masked_fill_(~usable & (d != 0), 0)


class Q80:
    """x = d · q, q signed.

    Q8_0: 32 elements, 34 bytes: d:2 qs:32
    """

    def decode(self, blocks: Tensor) -> Tensor:
        return blocks[:, 2:].view(torch.int8).float() * read_halves(blocks, 0)

    def encode(self, x: Tensor, blocks: Tensor) -> None:
        """d = max|x| / 127, q = x/d rounded, halves away from zero; 0 where 1/d overflows."""
        d = quotient(x.abs().amax(1, keepdim=True), 127)
        inverse = torch.where(d > TINY, quotient(1, d), 0.0)
        write_halves(d.half(), blocks, 0)
        blocks[:, 2:] = round_half_away(x * inverse).to(torch.int8).view(torch.uint8)


LEGACY: dict[str, Numbers | Symmetric | Affine | Q80] = {
    "F32": Numbers(torch.float32),
    "F16": Numbers(torch.float16),
    "BF16": Numbers(torch.bfloat16),
    "Q4_0": Symmetric(PLANES["Q4_0"], half=8),
    "Q4_1": Affine(PLANES["Q4_1"], top=15),
    "Q5_0": Symmetric(PLANES["Q5_0"], half=16),
    "Q5_1": Affine(PLANES["Q5_1"], top=31),
    "Q8_0": Q80(),
}
