"""Where a mixture of experts sends its tokens: which experts are reached, and whose tokens a variant sends elsewhere.

    reached   int64 [M,L,X]  positions that go through each of X experts, of M members in L layers with experts
    rerouted  int64 [M,L]    positions whose set of experts is not the original's; 0 for the original

The order of the chosen experts does not count: their outputs are added up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantscope.model.taps import CHOSEN, place_of, stem_of
from quantscope.model.wiring import model_taps
from quantscope.results import RoutingRow
from quantscope.weights import WeightProvider


def routing_taps(weights: WeightProvider) -> tuple[str, ...]:
    """One for each layer with experts."""
    return tuple(tap for tap in model_taps(weights) if stem_of(tap) == CHOSEN)


class RoutingMeter:
    """The routing of every member, layer by layer.  n_rows: of members, and of what comes before them in a record."""

    def __init__(self, weights: WeightProvider, n_rows: int) -> None:
        self.index = {name: k for k, name in enumerate(routing_taps(weights))}
        n_expert = weights.config.experts.n_expert if weights.config.experts else 0
        self.reached = np.zeros((n_rows, len(self.index), n_expert), np.int64)
        self.rerouted = np.zeros((n_rows, len(self.index)), np.int64)
        self.last: tuple[Tensor | None, Tensor] | None = None  # the original's choice and the member's, in the layer at hand

    def add(self, row: int, name: str, ref: Tensor | None, chosen: Tensor) -> None:
        """chosen: [b,T,n_used] of a member, beside the original's."""
        at, self.last = (row, self.index[name]), (ref, chosen)
        self.reached[at] += torch.bincount(chosen.flatten(), minlength=self.reached.shape[-1]).cpu().numpy()
        if ref is not None:
            same = chosen.sort(-1).values == ref.to(chosen.device).sort(-1).values
            self.rerouted[at] += int((~same.all(-1)).sum())

    def beside(self, ref: Tensor | None, x: Tensor) -> Tensor | None:
        """The original's values at a tap of the chosen experts in the order of the member's; see ``same_experts``."""
        if ref is None or self.last is None or self.last[0] is None:
            return ref
        return same_experts(ref, self.last[0], x, self.last[1])

    def record(self) -> dict[str, NDArray[Any]]:
        """Nothing for a model without experts."""
        return {"reached": self.reached, "rerouted": self.rerouted} if self.index else {}


def same_experts(ref: Tensor, ref_chosen: Tensor, x: Tensor, chosen: Tensor) -> Tensor:
    """What each expert gave in the original, where the member chose it, too; x itself elsewhere, so that it counts as no error.

    ref, x: [b,T,n_used·n] of the chosen experts one after the other; ref_chosen, chosen: [b,T,n_used] their numbers → [b,T,n_used·n].
    """
    same = chosen[..., :, None] == ref_chosen.to(chosen.device)[..., None, :]  # [b,T,n_used,n_used]
    slots = (*chosen.shape, -1)
    by_expert = ref.to(x.device).reshape(slots)  # [b,T,n_used,n]
    slot = same.to(torch.uint8).argmax(-1)[..., None].expand_as(by_expert)
    return torch.where(same.any(-1)[..., None], by_expert.gather(-2, slot), x.reshape(slots)).flatten(-2)


def routing_rows(
    weights: WeightProvider, record: Mapping[str, NDArray[Any]], row: int, n_positions: int, *, compared: bool
) -> tuple[RoutingRow, ...]:
    """The routing of one member over the whole input of ``n_positions`` tokens."""
    if "reached" not in record:
        return ()
    rows = []
    for k, tap in enumerate(routing_taps(weights)):
        reached, layer = record["reached"][row, k], place_of(tap)[1]
        assert layer is not None
        rerouted = int(record["rerouted"][row, k]) / n_positions if compared else None
        rows.append(RoutingRow(layer, len(reached), int((reached == 0).sum()), rerouted))
    return tuple(rows)
