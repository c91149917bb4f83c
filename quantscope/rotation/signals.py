"""A setting of RoPE, and how well it maps the recorded q (or k) before the rotation to the one after it.

With x and y the pairs of a head before and after as complex numbers,

    ‖y − m·x·e^(iφ)‖² = Σ|y|² + m²·Σ|x|² − 2m·Re Σ x̄·y·e^(−iφ)

needs the heads' sum of x̄·y only, [T,R]: thousands of settings cost a second.  The best ones are then rotated by ``model.rope`` itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from quantscope.arch.config import RopeConfig, RopeLayout
from quantscope.language import say
from quantscope.metrics import nmse
from quantscope.model.rope import frequencies, rope_tables, rotate
from quantscope.phrases import listed

NEAR_TOKENS, FIT_TOKENS = 32, 128  # that theta and scale are fitted on: first the early positions, where no angle is ambiguous


@dataclass(frozen=True)
class Setting:
    """Pair i of the token at position p turns by (scale·p + start)·θᵢ, θᵢ from rope and factors, and is multiplied by its magnitude.

    differs: what is not as expected, axis → words.  fitted: the axes among them whose value is not a known one but was measured.
    """

    rope: RopeConfig
    factors: Tensor | None = None  # [R] divisors of the frequencies
    scale: float = 1.0
    start: float = 0.0
    differs: Mapping[str, str] = field(default_factory=dict)
    fitted: frozenset[str] = frozenset()

    @property
    def frequencies(self) -> Tensor:
        return frequencies(self.rope, self.factors)

    def places(self, positions: Tensor) -> Tensor:
        """The positions that the engine rotates by, float64 [T]."""
        return self.scale * positions + self.start


@dataclass(frozen=True)
class RotationFit:
    """A setting and the NMSE between what it makes of the recorded ``before`` and the recorded ``after``."""

    setting: Setting
    nmse: float

    @property
    def text(self) -> str:
        """``theta 500,000 instead of 10,000 and positions 1 too high``."""
        return listed(self.setting.differs.values()) if self.setting.differs else say("the expected setting")


@dataclass(frozen=True)
class Pairs:
    """What a layout and a dimension leave of the signals: cross Σ x̄·y over the heads, complex128 [T,R]; energies Σ|x|² and the rest."""

    cross: Tensor
    energy: float  # of the turning channels before
    rest: float  # of the turning channels after, and the squared error of those that stay
    total: float  # of all channels after

    def agreement(self, angles: Tensor) -> Tensor:
        """Re Σ x̄·y·e^(−iφ): angles [...,T,R] → [...]."""
        return (self.cross.real * angles.cos() + self.cross.imag * angles.sin()).sum((-2, -1))

    def error(self, angles: Tensor, magnitude: float) -> float:
        """NMSE of one setting, [T,R], normalized by ``after``."""
        error = self.rest + magnitude**2 * self.energy - 2 * magnitude * float(self.agreement(angles))
        return max(error, 0.0) / self.total if self.total else math.inf

    def of_tokens(self, at: Tensor) -> Pairs:
        return replace(self, cross=self.cross[at])


class Signals:
    """before and after [T,H,D] in float64, the positions, and the pairs of every layout and dimension that was asked for."""

    def __init__(self, before: Tensor, after: Tensor, positions: Sequence[int]) -> None:
        self.before, self.after = before.double(), after.double()
        self.positions = torch.tensor(positions, dtype=torch.float64)
        self._pairs: dict[tuple[RopeLayout, int], Pairs] = {}

    @property
    def head_dim(self) -> int:
        return self.before.shape[-1]

    @cached_property
    def near(self) -> Tensor:
        """The tokens of the smallest positions, int64 [≤ NEAR_TOKENS]."""
        return self.positions.abs().argsort(stable=True)[:NEAR_TOKENS]

    @cached_property
    def spread(self) -> Tensor:
        """Tokens from the first to the last, int64 [≤ FIT_TOKENS]."""
        return torch.linspace(0, len(self.positions) - 1, min(len(self.positions), FIT_TOKENS)).round().long()

    @property
    def floor(self) -> float:
        """NMSE that computing angles in float32 may make: off by 10⁻⁷ of the position."""
        return float((1e-7 * (1 + self.positions.abs().max())) ** 2)

    def pairs(self, rope: RopeConfig) -> Pairs:
        key = rope.layout, rope.dim
        if key not in self._pairs:
            x, y = _complex(self.before, rope), _complex(self.after, rope)
            still = (self.after[..., rope.dim :] - self.before[..., rope.dim :]).square().sum()
            energies = [float(z.abs().square().sum()) for z in (x, y)]
            self._pairs[key] = Pairs((x.conj() * y).sum(1), energies[0], energies[1] + float(still), float(self.after.square().sum()))
        return self._pairs[key]

    def error(self, s: Setting) -> float:
        angles = s.places(self.positions)[:, None] * s.frequencies  # [T,R]
        return self.pairs(s.rope).error(angles, s.rope.magnitude)

    def verified(self, s: Setting) -> RotationFit:
        """The setting rotated by ``model.rope``, float64, with its NMSE."""
        tables = rope_tables(s.rope, s.places(self.positions), s.factors, torch.float64)
        turned = rotate(self.before[None], tables)[0]
        return RotationFit(s, float(nmse(self.after.flatten(), turned.flatten())))


def _complex(x: Tensor, rope: RopeConfig) -> Tensor:
    """The pairs of each head as complex numbers: [T,H,D] → [T,H,R]."""
    turning = x[..., : rope.dim]
    if rope.layout == "interleaved":
        return torch.complex(turning[..., 0::2], turning[..., 1::2])
    return torch.complex(*turning.chunk(2, -1))
