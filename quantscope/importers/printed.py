"""A tensor as llama.cpp prints it, line by line → values with their flat indices.

Along a dimension that is longer than six, the first and the last three entries are printed with ``...`` between; some builds print
all, or the first few only.  The marks and the shape together tell where each value stands.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from quantscope.importers.base import NUMBER, common_digits, number

MORE = None  # in the place of "..."
T = TypeVar("T")
Row: TypeAlias = list["str | None"]
Block: TypeAlias = list["Row | None"]

_LINE = re.compile(
    rf"(?P<open>\[\s*$)|\[(?P<cells>\s*(?:{NUMBER}|\.\.\.)(?:\s*,\s*(?:{NUMBER}|\.\.\.))*\s*)\],?\s*$|(?P<close>\],?\s*$)"
    rf"|(?P<more>\.\.\.\s*,?\s*$)|sum\s*=\s*(?P<sum>-?\d+\.\d{{6}}|-?nan|-?inf)\s*$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Printed:
    """values float32 [n], index int64 [n] flat in the whole tensor; digits: decimals that were printed; sum: as printed."""

    values: Tensor
    index: Tensor
    n_values: int  # of the whole tensor
    digits: int | None
    sum: float | None

    @property
    def shortened(self) -> bool:
        return len(self.index) < self.n_values

    @property
    def sum_is_of_printed(self) -> bool:
        """Whether the sum is that of the printed values, as far as their digits tell."""
        assert self.sum is not None
        values = self.values.double()
        unit = 0.5 * 10.0 ** -(self.digits or 4)
        return abs(values.sum().item() - self.sum) <= unit * len(values) + 1e-6 * values.abs().sum().item()


class PrintedReader:
    """Takes the lines of one tensor.  ``done``: nothing more can belong to it."""

    def __init__(self) -> None:
        self.begun = self.done = self._closed = False
        self._depth = 0
        self._blocks: list[Block | None] = []
        self._sum: str | None = None

    def line(self, text: str) -> bool:
        """Whether the line is a part of the tensor."""
        found = _LINE.match(text)
        if found is None:
            return False
        if self._closed:
            return self._after(found)
        if found["open"]:
            self._depth += 1
            self.begun = True
            if self._depth == 2:
                self._blocks.append([])
        elif found["close"]:
            self._depth -= 1
            self._closed = self._depth <= 0
        elif found["cells"] and self._depth == 2:
            cells = [c.strip() for c in found["cells"].split(",")]
            self._current().append([MORE if c == "..." else c for c in cells])
        elif found["more"] and self._depth == 2:
            self._current().append(MORE)
        elif found["more"] and self._depth == 1:
            self._blocks.append(MORE)
        else:
            return False
        return True

    def _after(self, found: re.Match[str]) -> bool:
        self.done = True
        self._sum = found["sum"]
        return bool(self._sum)

    def _current(self) -> Block:
        block = self._blocks[-1]
        assert block is not None
        return block

    def printed(self, ne: Sequence[int]) -> Printed | None:
        """The values, once complete; None for a tensor that was cut or damaged, and for one of four dimensions."""
        ne0, ne1, ne2, *rest = (*ne, 1, 1, 1)[: max(4, len(ne))]
        if not self._closed or math.prod(rest) != 1:
            return None
        blocks = _placed(self._blocks, ne2)
        rows = [(b * ne1 + r, row) for b, block in blocks for r, row in _placed(block, ne1)]
        cells = [(r * ne0 + c, cell) for r, row in rows for c, cell in _placed(row, ne0)]
        if not cells or not (blocks and all(_placed(block, ne1) for _, block in blocks) and all(_placed(row, ne0) for _, row in rows)):
            return None
        texts = [cell for _, cell in cells]
        values = torch.tensor([number(t) for t in texts], dtype=torch.float64).float()
        index = torch.tensor([i for i, _ in cells])
        return Printed(values, index, math.prod(ne), common_digits(texts), None if self._sum is None else number(self._sum))


def _placed(entries: Sequence[T | None], n: int) -> list[tuple[int, T]]:
    """(place, entry) along a dimension of length n; nothing where the number of entries does not fit it."""
    known = [e for e in entries if e is not MORE]
    left_out = len(entries) - len(known)
    if left_out > 1 or len(known) + left_out > n or (left_out == 0 and len(known) != n):
        return []
    before = next((i for i, e in enumerate(entries) if e is MORE), n)
    return [(i if i < before else n - len(known) + i, e) for i, e in enumerate(known)]
