"""Where the bits of a block's codes are, as a table; bytes ↔ codes on torch tensors of any device.

    codes = read_codes(blocks, PLANES["Q5_K"])     uint8 [n_blocks, type_size]  →  uint8 [n_blocks, block_size]
    write_codes(codes, PLANES["Q5_K"], blocks)     the inverse, into the bytes of the codes only

A plane is a run of bytes with some bits of every code.  All ggml blocks store them alike: in groups of k bytes, whose 8/width fields,
from the low bits up, are 8/width runs of k consecutive elements:

    width 4    bit 7654 3210              width 2    bit 76    54    32    10            width 1    bit 7     …  0
    byte l         k+l  l                            3k+l  2k+l  k+l   l                            7k+l  …  l
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor


class Plane(NamedTuple):
    """Bits shift … shift + width − 1 of the codes, in bytes start … stop − 1 of the block, which are ``groups`` groups."""

    start: int
    stop: int
    groups: int
    width: int
    shift: int


# fmt: off
PLANES = {
    "Q4_0": (Plane(2, 18, 1, 4, 0),),
    "Q4_1": (Plane(4, 20, 1, 4, 0),),
    "Q5_0": (Plane(6, 22, 1, 4, 0),    Plane(2, 6, 4, 1, 4)),
    "Q5_1": (Plane(8, 24, 1, 4, 0),    Plane(4, 8, 4, 1, 4)),
    "Q2_K": (Plane(16, 80, 2, 2, 0),),
    "Q3_K": (Plane(32, 96, 2, 2, 0),   Plane(0, 32, 1, 1, 2)),
    "Q4_K": (Plane(16, 144, 4, 4, 0),),
    "Q5_K": (Plane(48, 176, 4, 4, 0),  Plane(16, 48, 1, 1, 4)),
    "Q6_K": (Plane(0, 128, 2, 4, 0),   Plane(128, 192, 2, 2, 4)),
}
# fmt: on


def spread(raw: Tensor, width: int) -> Tensor:
    """The 8/width fields of each byte, low bits first: uint8 [..., k] → [..., 8/width, k]."""
    return torch.stack([(raw >> shift) & ((1 << width) - 1) for shift in range(0, 8, width)], dim=-2)


def joined(fields: Tensor, width: int) -> Tensor:
    """The inverse of ``spread``: uint8 [..., 8/width, k] → [..., k]."""
    return reduce(torch.bitwise_or, (field << (i * width) for i, field in enumerate(fields.unbind(-2))))


def read_codes(blocks: Tensor, planes: Sequence[Plane]) -> Tensor:
    parts = []
    for p in planes:
        groups = blocks[:, p.start : p.stop].reshape(len(blocks), p.groups, -1)
        parts.append(spread(groups, p.width).flatten(1) << p.shift)
    return reduce(torch.bitwise_or, parts)


def write_codes(codes: Tensor, planes: Sequence[Plane], blocks: Tensor) -> None:
    for p in planes:
        fields = ((codes >> p.shift) & ((1 << p.width) - 1)).reshape(len(codes), p.groups, 8 // p.width, -1)
        blocks[:, p.start : p.stop] = joined(fields, p.width).flatten(1)


def read_halves(blocks: Tensor, at: int, count: int = 1) -> Tensor:
    """``count`` float16 from byte ``at`` of each block on, as float32 [n_blocks, count]."""
    return blocks[:, at : at + 2 * count].clone().view(torch.float16).float()  # a copy: the view needs an even address


def write_halves(halves: Tensor, blocks: Tensor, at: int) -> None:
    """float16 [n_blocks, count] into the bytes from ``at`` on."""
    blocks[:, at : at + 2 * halves.shape[1]] = halves.contiguous().view(torch.uint8)


def read_scales_q3(raw: Tensor) -> Tensor:
    """Sixteen scales of 6 bits: uint8 [n_blocks, 12] → [n_blocks, 16].

    byte 0 … 7    bit 7654 scale l+8, low 4    bit 3210 scale l, low 4
    byte 8 … 11   bit 76 l+12   54 l+8   32 l+4   10 l    (l = 0 … 3, high 2 bits)
    """
    return spread(raw[:, :8], 4).flatten(1) | (spread(raw[:, 8:], 2).flatten(1) << 4)


def write_scales_q3(scales: Tensor) -> Tensor:
    """The inverse."""
    low, high = (scales & 15).reshape(-1, 2, 8), (scales >> 4).reshape(-1, 4, 4)
    return torch.cat([joined(low, 4), joined(high, 2)], dim=1)


def read_scales_q4(raw: Tensor) -> Tensor:
    """Eight scales and eight minima of 6 bits: uint8 [n_blocks, 12] → [n_blocks, 2, 8], scales first.

    byte 0 … 3    bit 76 scale l+4, high 2    bit 543210 scale l      (l = 0 … 3)
    byte 4 … 7    bit 76 min l+4, high 2      bit 543210 min l
    byte 8 … 11   bit 7654 min l+4, low 4     bit 3210 scale l+4, low 4
    """
    own, low = raw[:, :8].reshape(-1, 2, 4), spread(raw[:, 8:], 4)  # [n_blocks, 2, 4] each
    return torch.cat([own & 63, low | ((own >> 6) << 4)], dim=-1)


def write_scales_q4(scales: Tensor) -> Tensor:
    """The inverse; what is above 63 becomes 63."""
    own, later = scales.clamp(max=63).chunk(2, -1)  # 0 … 3 and 4 … 7, [n_blocks, 2, 4] each
    return torch.cat([(own | ((later >> 4) << 6)).flatten(1), joined(later & 15, 4)], dim=1)
