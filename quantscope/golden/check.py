"""A trace against the probe of a pack that ran the same token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from quantscope.compare import Comparison, Row, compare
from quantscope.errors import TraceContentError, TraceMismatchError, UsageError
from quantscope.golden.folder import Probe
from quantscope.trace import Evidence, Trace
from quantscope.wording import listed


def choose(probes: Sequence[Probe], trace: Trace, name: str | None = None) -> Probe:
    """The probe of this name, or else the first with the trace's token ids.

    Raises UsageError for a name that is no probe's and for a trace without ids, TraceMismatchError where no probe has its ids.
    """
    names = [p.name for p in probes]
    if name is not None:
        found = next((p for p in probes if p.name == name), None)
        if found is None:
            raise UsageError(f"--probe {name}: the pack has {listed(names)}. Give one of them, or leave the option out.")
        return found
    if trace.origin.tokens is None:
        raise UsageError(
            f"{trace.title} does not say which token ids it ran, so the probe cannot be found. Name it with `--probe`, one of "
            f"{listed(names)}, if you are sure of the ids."
        )
    same = next((p for p in probes if p.expected.origin.tokens == trace.origin.tokens), None)
    if same is None:
        known = "; ".join(f"{p.name}: {','.join(map(str, p.expected.origin.tokens or ()))}" for p in probes)
        raise TraceMismatchError(
            f"{trace.title} ran {len(trace.origin.tokens)} token ids [{','.join(map(str, trace.origin.tokens[:8]))}"
            f"{',...' if len(trace.origin.tokens) > 8 else ''}], expected those of a probe of the pack ({known}). The text was tokenized "
            f"by the engine, or a template or BOS was added: feed the ids of probes.txt."
        )
    return same


def check(probe: Probe, trace: Trace) -> Comparison:
    """Every tap that both have, with the pack's tolerance as its floor; of several pieces of evidence the one that is furthest off counts.

    Raises TraceMismatchError for other ids or another file, TraceContentError where the two have nothing in common.
    """
    whole = compare(probe.expected, trace, floor=0.0)
    rows = tuple(_worst(probe, trace, row.tap) for row in whole.rows)
    return replace(whole, rows=rows, floor_source="the tolerance of the golden pack at each tap")


def _worst(probe: Probe, trace: Trace, tap: str) -> Row:
    """The row of the piece of evidence that is furthest above its floor."""
    rows = [row for piece in trace.taps[tap] if (row := _row(probe, trace, tap, piece)) is not None]
    return max(rows, key=lambda row: (row.verdict == "differs", row.verdict == "within", row.nmse / row.floor))


def _row(probe: Probe, trace: Trace, tap: str, piece: Evidence) -> Row | None:
    ref = Trace(probe.expected.origin, {tap: probe.expected.taps[tap]})
    try:
        return compare(ref, Trace(trace.origin, {tap: (piece,)}), floor=probe.tolerance[tap]).rows[0]
    except TraceContentError:  # this piece is of positions or of a kind that the pack has nothing for; another piece is not
        return None
