"""Whether the numbers of a trace belong together: rows that mix two runs, and layers whose output is not the next one's input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from quantscope.importers.base import Run, input_tap
from quantscope.importers.table import layers_of
from quantscope.language import english, mark
from quantscope.metrics import mean, rms
from quantscope.trace import Full, Stats, Trace
from quantscope.wording import fixed, listed, sig

EXACT = 1e-6  # relative, between numbers of which neither was rounded for printing


@dataclass(frozen=True)
class Printed:
    """A number and the decimals it was printed with (None: in full)."""

    value: float
    digits: int | None = None

    def agrees(self, other: Printed) -> bool:
        """Whether both can be the same number: half a unit of the last decimal of each."""
        slack = sum(0.5 * 10.0**-p.digits for p in (self, other) if p.digits is not None)
        return abs(self.value - other.value) <= slack + EXACT * abs(other.value)

    def __str__(self) -> str:
        return sig(self.value, 6) if self.digits is None else fixed(self.value, self.digits)


@dataclass(frozen=True)
class Cell:
    """One number of a row, with the runs that have the same there."""

    what: str  # "input RMS"
    tap: str
    statistic: str
    printed: Printed
    runs: tuple[str, ...] = ()


@dataclass(frozen=True)
class RowOrigin:
    """One layer's row of a table and where each of its cells comes from."""

    variant: str
    layer: int
    cells: tuple[Cell, ...]

    @property
    def mixed(self) -> bool:
        """Whether no one run has all the cells that any run has."""
        known = [set(c.runs) for c in self.cells if c.runs]
        return bool(known) and not set.intersection(*known)

    @property
    def found(self) -> bool:
        return any(c.runs for c in self.cells)


ROW = (  # what a row shows: (words, tap of layer i, statistic)
    (mark("input RMS"), input_tap, "rms"),
    (mark("output RMS"), "l_out-{}".format, "rms"),
    (mark("output mean"), "l_out-{}".format, "mean"),
    (mark("SwiGLU RMS"), "ffn_swiglu-{}".format, "rms"),
    (mark("SwiGLU mean"), "ffn_swiglu-{}".format, "mean"),
)


def numbers_at(trace: Trace, tap: str, statistic: str) -> list[Printed]:
    """Every value that the trace has of a statistic over all its positions, the printed ones first."""
    found = [
        Printed(e.values[statistic], e.digits.get(statistic))
        for e in trace.all_of(tap, Stats)
        if statistic in e.values and e.positions is None
    ]
    full = trace.find(tap, Full)
    if full is not None and full.positions is None and statistic in ("rms", "mean"):
        found.append(Printed((rms if statistic == "rms" else mean)(full.values.flatten()).item()))
    return found


def row_layers(trace: Trace) -> list[int]:
    """The layers that have a row: those with an output RMS, and with an input RMS where any has one.

    A log that shows some layers only names the output of the layer before each by its input; that alone is no row.
    """
    layers = [i for i in layers_of(trace.taps) if numbers_at(trace, f"l_out-{i}", "rms")]
    return [i for i in layers if numbers_at(trace, input_tap(i), "rms")] or layers


def origins(variant: str, trace: Trace, runs: Sequence[Run]) -> list[RowOrigin]:
    """For every layer row of a trace, which of the runs has each of its numbers."""
    rows = []
    for layer in row_layers(trace):
        cells = []
        for what, tap_of, statistic in ROW:
            tap = tap_of(layer)
            own = numbers_at(trace, tap, statistic)
            if own:
                # At the tap between two layers the first number is the output of the one, the last the input of the next.
                shown = own[-1] if what == "input RMS" else own[0]
                having = tuple(r.name for r in runs if any(shown.agrees(x) for x in numbers_at(r.trace, tap, statistic)))
                cells.append(Cell(what, tap, statistic, shown, having))
        rows.append(RowOrigin(variant, layer, tuple(cells)))
    return rows


def mixed_warning(row: RowOrigin, runs: Sequence[Run]) -> str:
    """``Row 0 mixes two runs: input RMS 0.009276 from hello.log, where the output RMS is 0.015113; ...``."""
    groups: dict[str, list[Cell]] = {}
    for name in _fewest(row):
        groups[name] = [c for c in row.cells if name in c.runs and not any(c in g for g in groups.values())]
    by_name = {r.name: r.trace for r in runs}
    parts = []
    for name, own in groups.items():
        others = [c for c in row.cells if c not in own and c.runs and numbers_at(by_name[name], c.tap, c.statistic)]
        there = listed(f"{c.what} is {numbers_at(by_name[name], c.tap, c.statistic)[0]}" for c in others)
        parts.append(f"{listed(f'{c.what} {c.printed}' for c in own)} from {name}" + (f", where the {there}" if others else ""))
    facts = {"layer": row.layer, "parts": "; ".join(parts)}
    if len(groups) == 2:
        return english("Row {layer} mixes two runs: {parts}. Compare no numbers across it.", **facts)
    return english("Row {layer} mixes {n} runs: {parts}. Compare no numbers across it.", n=len(groups), **facts)


def _fewest(row: RowOrigin) -> tuple[str, ...]:
    """The smallest set of runs that together have every cell that any run has."""
    names = list(dict.fromkeys(name for c in row.cells for name in c.runs))
    known = [set(c.runs) for c in row.cells if c.runs]
    sets = (s for n in range(1, len(names) + 1) for s in combinations(names, n) if all(k & set(s) for k in known))
    return next(sets, ())


def residual_mismatches(trace: Trace) -> list[str]:
    """Sentences on the layers whose output and the next one's input are two different numbers in one trace."""
    said = []
    for layer in layers_of(trace.taps):
        for statistic in ("rms", "mean", "min", "max"):
            numbers = numbers_at(trace, f"l_out-{layer}", statistic)
            other = next((x for x in numbers[1:] if not x.agrees(numbers[0])), None)
            if other is not None:
                said.append(
                    english(
                        "The {statistic} of layer {layer}'s output is {output}, but {input} where it is layer {next}'s input: it is one "
                        "signal, so two runs or builds are mixed, or a tap is not where it says.",
                        statistic=statistic.upper() if statistic == "rms" else statistic,
                        layer=layer,
                        output=numbers[0],
                        input=other,
                        next=layer + 1,
                    )
                )
    return said
