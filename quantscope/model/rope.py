"""Rotary position embedding: frequencies, the tables of cos and sin, the rotation.

Frequencies and angles are computed in float64 and rounded once, to the dtype of the tables.  llama.cpp and Transformers
compute them in float32, so at position p their angle is off by about p · 10⁻⁷ rad.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from quantscope.arch.config import RopeConfig, RopeLayout


class RopeTables(NamedTuple):
    """cos and sin (times the magnitude) of every position and pair, [T,R] each, R = rope.dim/2."""

    cos: Tensor
    sin: Tensor
    layout: RopeLayout


def frequencies(rope: RopeConfig, factors: Tensor | None = None) -> Tensor:
    """Angle of each pair per position [rad], float64 [R]; the formula is at ``RopeConfig``.  factors: rope_freqs.weight, [R]."""
    i = torch.arange(0, rope.dim, 2, dtype=torch.float64)
    freqs = rope.theta ** (-i / rope.dim)  # [R]
    if factors is not None:
        freqs = freqs / factors.double().to(freqs.device)
    if rope.scaling == "linear":
        return freqs / rope.factor
    if rope.scaling == "yarn":
        keep = yarn_ramp(rope)
        return freqs * (keep + (1 - keep) / rope.factor)
    return freqs


def yarn_ramp(rope: RopeConfig) -> Tensor:
    """How much of its own frequency each pair keeps: 1 before pair ``low``, 0 after ``high``, linear between; float64 [R].

        low = ⌊pair(beta_fast)⌋, high = ⌈pair(beta_slow)⌉,  pair(n) = dim · ln(n_ctx_orig / 2πn) / (2 ln theta)
        without ``truncate``: low = pair(beta_fast), high = pair(beta_slow)

    pair(n) is the (fractional) index of the pair that turns n times over the pretraining's context.  Source: the YaRN paper,
    arXiv:2309.00071, section 3.2, with the rounding of its authors' code, which llama.cpp and Transformers follow.
    """

    def pair(n_turns: float) -> float:
        return rope.dim * math.log(rope.n_ctx_orig / (n_turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = pair(rope.beta_fast), pair(rope.beta_slow)
    low = max(math.floor(first) if rope.truncate else first, 0)
    high = min(math.ceil(last) if rope.truncate else last, rope.dim - 1)
    width = max(high - low, 0.001)  # one pair wide at most when both ends meet
    ramp = (torch.arange(rope.dim // 2, dtype=torch.float64) - low) / width
    return 1 - ramp.clamp(0, 1)


def rope_tables(rope: RopeConfig, positions: Tensor, factors: Tensor | None = None, dtype: torch.dtype = torch.float32) -> RopeTables:
    """Tables for integer positions [T], on their device."""
    angles = positions.double()[:, None] * frequencies(rope, factors).to(positions.device)  # [T,R] in float64
    return RopeTables((angles.cos() * rope.magnitude).to(dtype), (angles.sin() * rope.magnitude).to(dtype), rope.layout)


def rotate(x: Tensor, tables: RopeTables) -> Tensor:
    """(a, b) → (a·cos − b·sin, a·sin + b·cos) for each pair (a, b) of a head's first 2R channels: (a + ib)·(cos + i·sin).

    x: [B,T,H,D] → [B,T,H,D]; the layout says which channels are a pair, the channels from 2R on stay as they are.
    """
    turn = torch.complex(tables.cos, tables.sin)[:, None]  # [T,1,R]
    R = turn.shape[-1]
    turning, still = x[..., : 2 * R], x[..., 2 * R :]
    if tables.layout == "interleaved":
        pairs = torch.view_as_complex(turning.reshape(*turning.shape[:-1], R, 2).contiguous())  # [B,T,H,R]
        turned = torch.view_as_real(pairs * turn).flatten(-2)
    else:
        z = torch.complex(*turning.chunk(2, dim=-1)) * turn  # [B,T,H,R]
        turned = torch.cat([z.real, z.imag], dim=-1)
    return torch.cat([turned, still], dim=-1) if still.shape[-1] else turned
