"""Channel scales that cancel: what makes a channel is divided by s, what reads it multiplied, so that the model is the same function.

    B's maker = diag(1/s)·A's        B's readers = A's·diag(s)

SmoothQuant, AWQ and `quantscope quantize --correct equalize` leave such tensors.  s is found by least squares from the columns of the
readers, s_j = Σᵢ b_ij·a_ij / Σᵢ a_ij², and believed where the maker has its inverse.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quantscope.arch.config import ModelConfig
from quantscope.model.taps import MAKERS
from quantscope.model.wiring import readers
from quantscope.weight_causes import Stored
from quantscope.weights import ALL_IDS, Weights

CANCELS = 0.1  # median of |r·s − 1|: rounding moves s by less, and a norm weight may be re-tuned by some percent beside
LEAST = 1.01  # largest s over smallest: less is no scaling

Pair = tuple[Stored, Stored]


@dataclass
class Scales:
    """Factors of A's tensors that give B's: of the rows (or a vector's values) and of the columns."""

    rows: dict[str, Tensor] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        return name in self.rows or name in self.columns

    def applied(self, name: str, values: Tensor, rows: slice | Tensor = ALL_IDS) -> Tensor:
        """Rows of A's tensor with its factors; a vector is one row."""
        if name in self.columns:
            values = values * self.columns[name]
        if name in self.rows:
            values = values * (self.rows[name][rows, None] if len(values) > 1 or name in self.columns else self.rows[name])
        return values


def found_scales(weights: Weights, pair: Callable[[str], Pair | None], differing: Container[str]) -> Scales:
    """All scales that cancel between two files.

    weights: file A.  pair: a tensor in both, or None.  differing: those that the types do not explain; a coarse type can explain a small
    scale of some of the tensors.
    """
    scales, config = Scales(), weights.config
    for i in range(config.n_layer):
        reading = readers(config, i, weights.layer_names(i))
        for tap, maker in MAKERS.items():
            name, matrices = f"blk.{i}.{maker}.weight", [f"blk.{i}.{m}.weight" for m in reading.get(f"{tap}-{i}", ())]
            if any(tensor in differing for tensor in (name, *matrices)):
                _find(scales, config, tap, name, [m for m in matrices if pair(m) is not None], pair)
    return scales


def _find(scales: Scales, config: ModelConfig, tap: str, maker: str, matrices: list[str], pair: Callable[[str], Pair | None]) -> None:
    """Note the scales of one tap where they cancel."""
    plain = [r for r in matrices if r.split(".")[-2] not in MAKERS.values()]  # the rows of the others may be scaled, too
    made = pair(maker)
    if made is None or not plain:
        return
    s = _columns([p for r in plain if (p := pair(r)) is not None])
    own = s.reshape(config.n_head_kv, config.n_group, config.head_dim).mean(1).reshape(-1) if tap == "kqv_out" else s
    r = _rows(scales, made)
    if float((r * own - 1).abs().median()) < CANCELS and float(own.max() / own.min().clamp(min=1e-12)) > LEAST:
        scales.rows[maker] = r.float()
        scales.columns |= dict.fromkeys(matrices, s.float())


def _columns(pairs: list[Pair]) -> Tensor:
    """s of the columns of some matrices together, float64."""
    top, bottom = zip(*(_sums(a.band(), b.band(), 0) for a, b in pairs), strict=True)
    return _ratio(torch.stack(top).sum(0), torch.stack(bottom).sum(0))


def _rows(scales: Scales, made: Pair) -> Tensor:
    """The factors of the maker's rows, its columns' own factors undone; of a norm's weight those of its values."""
    a, b = made
    x = scales.applied(a.name, a.band())
    return _ratio(*_sums(x, b.band(), 1 if len(a.shape) > 1 else 0))


def _sums(x: Tensor, y: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    x = x.double()
    return (x * y).sum(dim), x.square().sum(dim)


def _ratio(top: Tensor, bottom: Tensor) -> Tensor:
    return torch.where(bottom > 0, top / bottom.clamp(min=1e-300), 1.0)
