"""A piece of evidence: what was measured, what honest arithmetic would give, what follows, and the command that measures it again.

The verdict is built from these, cheapest first: file, ids, weights, probes, taps, replay, logits.  What was not measured is a record too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Conclusion: TypeAlias = Literal["agrees", "differs", "not measured"]


@dataclass(frozen=True)
class Record:
    """value, floor: of the same quantity, both None where it is no number."""

    id: str  # "file", "ids", "weights", "one-token" ...
    measured: str  # what, in words
    conclusion: Conclusion
    text: str  # what was found, a sentence
    command: str  # that measures it again, or would measure it
    value: float | None = None
    floor: float | None = None
