"""A piece of evidence: what was measured, what honest arithmetic would give, what follows, and the command that measures it again.

The verdict is built from these, cheapest first: file, ids, weights, probes, taps, replay, logits.  What was not measured is a record too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from quantscope.trace import Trace

Conclusion: TypeAlias = Literal["agrees", "differs", "not measured"]
Verdict: TypeAlias = Literal["not comparable", "tokenizer", "engine", "activation rounding", "quantization", "file", "within"]


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


@dataclass(frozen=True)
class Evidence:
    """What is known before the causes are looked for: the trace to judge, the exact one beside it, and the commands that made them."""

    model: str
    test: Trace
    original: str | None = None
    n_prompt: int | None = None
    ids: tuple[int, ...] | None = None  # where the trace does not say them
    records: tuple[Record, ...] = ()
    against: str = ""  # as it was given
    probe: str = ""  # whose trace this is, where it is not the prompt's
    stop: Verdict | None = None  # why the traces cannot be compared
