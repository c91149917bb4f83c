"""The whole tensors of a trace, row by row: which positions of a tap are there, and their values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from quantscope.arch.config import ModelConfig
from quantscope.model.taps import split_tap, stem_of
from quantscope.model.wiring import tap_width
from quantscope.trace import Full, Trace, covered


class Recorded:
    """A tap may be recorded in several pieces, one for each step of a decoding: they are joined by position."""

    def __init__(self, trace: Trace, config: ModelConfig) -> None:
        self._trace, self._config = trace, config
        self._rows = {tap: self._by_position(tap) for tap in trace.taps if split_tap(tap)}

    def _by_position(self, tap: str) -> dict[int, Tensor]:
        """Position → [channels], of an attention map [H,S]; nothing where a shape is not the model's."""
        rows: dict[int, Tensor] = {}
        for piece in self._trace.all_of(tap, Full) if not self.wrong_shape(tap) else ():
            n = piece.values.shape[-2]
            rows |= zip(covered(piece, self._trace.origin) or range(n), piece.values.unbind(-2), strict=True)
        return rows

    def wrong_shape(self, tap: str) -> str:
        """What is wrong with the shape of a tap; empty where nothing is."""
        c, stem = self._config, stem_of(tap)
        for piece in self._trace.all_of(tap, Full):
            shape, there = tuple(piece.values.shape), covered(piece, self._trace.origin)
            n = shape[-2] if len(shape) > 1 and there is None else len(there or ())
            expected = (c.n_head, n, shape[-1]) if stem == "kq_soft_max" else (n, tap_width(c, tap))
            if shape != expected:
                return f"shape {list(shape)}, expected {list(expected)}"
        return ""

    def positions(self, tap: str) -> set[int]:
        """The positions of a tap whose values are there; −1 is the last one, wherever it is."""
        return set(self._rows.get(tap, ()))

    def rows(self, tap: str, positions: Sequence[int]) -> Tensor:
        """[1,P,channels] float32 of these positions; an attention map is [1,H,P,S], S the keys up to the last of them."""
        rows = [self._rows[tap][p] for p in positions]
        if rows[0].ndim == 2:
            S = max(positions) + 1
            rows = [F.pad(row[:, :S], (0, max(S - row.shape[-1], 0))) for row in rows]  # later keys have no weight
        return torch.stack(rows, dim=-2)[None].float()

    def ids(self, positions: Sequence[int]) -> Tensor | None:
        """Token ids of these positions, int64 [1,P]; None where the trace does not say them."""
        tokens = self._trace.origin.tokens or ()
        known = all(0 <= p < len(tokens) for p in positions)
        return torch.tensor([[tokens[p] for p in positions]], dtype=torch.int64) if known else None
