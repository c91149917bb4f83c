"""The error of an engine split three ways: what the quantization does, what the engine adds, and what its arithmetic was expected to add.

    original, exact → quantization → file, exact → engine → engine on that file        predicted: file, exact → emulated arithmetic

The first two share the engine, the exact one; the last two share the file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from quantscope.compare import predictions, tap_error
from quantscope.errors import TraceContentError
from quantscope.model.taps import graph_order
from quantscope.trace import Trace, check_same_run


@dataclass(frozen=True)
class SplitRow:
    """NMSE at one tap: what the quantization does, what the engine adds to it, and what its arithmetic was expected to add."""

    tap: str
    quantization: float | None  # original, exact → quantized file, exact
    engine: float  # quantized file, exact → engine on that file
    predicted: float | None  # quantized file, exact → emulated arithmetic


LAYERS = re.compile(r"l_out-\d+|result_output")  # where the split is shown layer by layer


def three_way(
    exact: Trace, engine: Trace, *, original: Trace | None = None, predicted: Trace | None = None, every: bool = False
) -> tuple[SplitRow, ...]:
    """The split of the error at every layer output and at the logits (``every``: at every tap), from whole tensors.

    Raises TraceMismatchError for other tokens, TraceContentError when no layer output is there in both.
    """
    check_same_run(exact.origin, engine.origin)
    expected = predictions(exact, engine, predicted)
    rows = []
    for tap in sorted((t for t in exact.taps if every or LAYERS.fullmatch(t)), key=graph_order):
        own = tap_error(exact, engine, tap)
        if own is not None:
            before = None if original is None else tap_error(original, exact, tap)
            rows.append(SplitRow(tap, before, own, expected.get(tap)))
    if not rows:
        raise TraceContentError(
            f"no layer output to split the error at: expected l_out-i or result_output with values or fingerprints in {exact.title} and "
            f"{engine.title}. Trace both without --taps."
        )
    return tuple(rows)


def asked_split(exact: Trace, engine: Trace, original: Trace | None, predicted: Trace | None) -> tuple[SplitRow, ...]:
    """The split where it was asked for; ``predicted`` alone asks for floors, and goes without where there are only samples."""
    if original is None and predicted is None:
        return ()
    try:
        return three_way(exact, engine, original=original, predicted=predicted)
    except TraceContentError:
        if original is not None:
            raise
        return ()
