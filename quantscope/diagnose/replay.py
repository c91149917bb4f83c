"""Local replay: every operation computed again from the inputs that the trace itself holds, with the weights of the file.

    error = Σ (exact − trace)² / Σ exact²                    exact: the operation on the trace's own inputs
    floor = 4 · Σ (exact − rounded)² / Σ exact² + 1e-9       rounded: the same by the arithmetic that the engine may have

So an operation is convicted or cleared by its own error, however wrong its inputs were already, and those after the first that is convicted
are still examined.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from quantscope.compare import EXACT_FLOOR, PREDICTED_TIMES, Worst
from quantscope.diagnose.operations import BY_POSITION, LOOKS_BACK, WHOLE_LAYER, NotReplayed, Operation, Place, ways
from quantscope.diagnose.recorded import Recorded
from quantscope.errors import TraceContentError
from quantscope.explain import made_by
from quantscope.language import say
from quantscope.metrics import nmse
from quantscope.model.arithmetic import EXACT, Arithmetic
from quantscope.model.forward import check_ids
from quantscope.model.ggml_arithmetic import ggml_arithmetic
from quantscope.model.ops import exact_matmul
from quantscope.model.taps import EMBD, place_of, stem_of
from quantscope.model.wiring import model_taps
from quantscope.trace import Origin, Trace
from quantscope.weights import WeightProvider
from quantscope.wording import count, listed

Verdict: TypeAlias = Literal["convicted", "cleared", "not recorded"]
GGML = ggml_arithmetic("F16")  # the rounding that most engines have
ILL_CONDITIONED = 1e-5  # NMSE up to which a conviction by the floor of float32 is examined in float64
NOT_REPLAYED = "this operation is not computed again"
OVERFLOWS = "computed again from these inputs, they are not finite"


@dataclass(frozen=True)
class ReplayRow:
    """One operation.  nmse, predicted: of the trace's and of the rounded output against the exact one; None where nothing was judged."""

    tap: str  # what the operation makes
    operation: str
    inputs: tuple[str, ...]  # the taps it was computed from
    verdict: Verdict
    nmse: float | None = None
    predicted: float | None = None
    floor: float | None = None
    worst: Worst | None = None  # ref: the recomputed value; index: (position, channel), of an attention map (head, position, key)
    n: int = 0  # values that were judged
    note: str = ""


@dataclass(frozen=True)
class Replay:
    """One row for every operation of the model, in the order of the graph."""

    origin: Origin
    rows: tuple[ReplayRow, ...]
    others: tuple[str, ...] = ()  # taps of the trace that this model does not have

    def those(self, verdict: Verdict) -> tuple[ReplayRow, ...]:
        """The rows with this verdict."""
        return tuple(row for row in self.rows if row.verdict == verdict)

    def row(self, tap: str) -> ReplayRow:
        """The operation that makes a tap; KeyError where the model has no such tap."""
        return {row.tap: row for row in self.rows}[tap]


@torch.no_grad()
def replay(trace: Trace, weights: WeightProvider, *, arithmetic: Arithmetic = EXACT, predicted: Arithmetic | None = GGML) -> Replay:
    """Every operation of the model, judged by itself, in float32.

    trace: whole tensors of some taps, q and k in canonical channel order.  weights: of the file that the engine ran.
    arithmetic: of the recomputation.  predicted: the rounding that the engine may have, whose error times 4 is the floor; None for an
    engine that computes in float32, whose floor is 1e-9, or what float32 itself is off by from float64 where that is more.  Values that
    are not finite when computed again, by either, are not judged: their inputs were bad, or the expected rounding overflows.
    Raises TraceContentError when no operation can be judged, PromptError when the trace's ids are no ids of this model.
    """
    if trace.origin.tokens is not None:
        check_ids(torch.tensor([trace.origin.tokens], dtype=torch.int64), weights.config)
    bench = Bench(trace, weights, arithmetic, predicted)
    with exact_matmul():
        rows = tuple(bench.examine(tap) for tap in model_taps(weights))
    if all(row.verdict == "not recorded" for row in rows):
        raise TraceContentError(
            f"{trace.title}: no operation can be replayed, expected the whole tensors of a tap and of the taps it is made of, such as "
            f"result_norm and result_output. {rows[-1].tap}: {rows[-1].note}. Record whole tensors: `quantscope trace` does without "
            f"--fingerprint and --taps."
        )
    return Replay(trace.origin, rows, tuple(tap for tap in trace.taps if tap not in {row.tap for row in rows}))


class Bench:
    """Where the operations of one trace are computed again."""

    def __init__(self, trace: Trace, weights: WeightProvider, arithmetic: Arithmetic = EXACT, predicted: Arithmetic | None = None) -> None:
        self._recorded, self._weights = Recorded(trace, weights.config), weights
        self._arithmetic, self._predicted = arithmetic, predicted

    def examine(self, tap: str) -> ReplayRow:
        """Convict or clear the operation that makes a tap."""
        possible = self._ways(tap)
        row = ReplayRow(tap, made_by(stem_of(tap), latent=self._weights.config.latent is not None), possible[0][1], "not recorded")
        if wrong := self._recorded.wrong_shape(tap):
            return replace(row, verdict="convicted", nmse=math.inf, floor=EXACT_FLOOR, note=wrong)
        lacking = [self._lacking(tap, inputs) if operation else NOT_REPLAYED for operation, inputs in possible]
        if all(lacking):
            return replace(row, note=lacking[0])
        operation, inputs = possible[lacking.index("")]
        assert operation is not None
        name = say(WHOLE_LAYER) if tap.startswith("l_out") and len(inputs) == 1 else row.operation
        return self._judged(replace(row, inputs=inputs, operation=name), operation)

    def _ways(self, tap: str) -> list[tuple[Operation | NotReplayed, tuple[str, ...]]]:
        layer = place_of(tap)[1]
        return ways(tap, self._weights.config, () if layer is None else self._weights.layer_names(layer))

    def _lacking(self, tap: str, inputs: tuple[str, ...]) -> str:
        """Why the operation cannot be computed again; empty where it can."""
        there = self._recorded.positions
        bad = [f"{name} has the {wrong}" for name in inputs if (wrong := self._recorded.wrong_shape(name))]
        missing = [name for name in (tap, *inputs) if not there(name)]
        if bad or missing:
            return bad[0] if bad else f"{listed(missing)} {'is' if len(missing) == 1 else 'are'} not recorded"
        rows, keys = self._positions(tap, inputs), _looked_back_at(tap, inputs)
        if not rows:
            return f"{listed([tap, *inputs])} have no position in common"
        if tap == EMBD and self._recorded.ids(rows) is None:
            return "the token ids are not recorded"
        if stem_of(tap) in BY_POSITION and rows[0] < 0:
            return "which position was recorded is not known"
        if keys and rows[-1] - rows[0] != len(rows) - 1:
            return f"the positions of {tap} and its inputs do not follow one another"
        short = [name for name in keys if not there(name) >= set(range(rows[-1] + 1))]
        return f"attention sees all positions from 0 to {rows[-1]}, and {' or '.join(short)} lacks some of them" if short else ""

    def _positions(self, tap: str, inputs: tuple[str, ...]) -> list[int]:
        """The positions that can be judged: those of the output and of all inputs but the keys and values."""
        keys = _looked_back_at(tap, inputs)
        return sorted(set.intersection(*(self._recorded.positions(name) for name in (tap, *inputs) if name not in keys)))

    def _judged(self, row: ReplayRow, operation: Operation) -> ReplayRow:
        positions = self._positions(row.tap, row.inputs)
        computed = partial(self._computed, row, operation, positions, self._weights)
        made = self._recorded.rows(row.tap, positions)
        if self._predicted is not None:
            return judged(row, computed(self._arithmetic), computed(self._predicted), made, positions)
        found = judged(row, exact := computed(self._arithmetic), None, made, positions)
        if found.verdict == "cleared" or found.nmse is None or found.nmse > ILL_CONDITIONED:
            return found
        precise = computed(self._arithmetic, dtype=torch.float64)
        return judged(
            row, precise, exact.double(), made.double(), positions
        )  # what float32 itself is off by, as with scores in the hundreds

    def again(self, row: ReplayRow, weights: WeightProvider, m: Arithmetic) -> tuple[Tensor, Tensor]:
        """What an engine that reads these weights and computes by m makes of the inputs of a judged row, and what the trace has."""
        positions = self._positions(row.tap, row.inputs)
        operation = next(op for op, inputs in self._ways(row.tap) if inputs == row.inputs)
        assert operation is not None
        return self._computed(row, operation, positions, weights, m), self._recorded.rows(row.tap, positions)

    def handed_on(self, row: ReplayRow) -> tuple[Tensor, Tensor]:
        """The stream before a layer that is judged whole, and after it."""
        positions = self._positions(row.tap, row.inputs)
        return self._recorded.rows(row.inputs[0], positions), self._recorded.rows(row.tap, positions)

    def _computed(
        self,
        row: ReplayRow,
        operation: Operation,
        positions: list[int],
        weights: WeightProvider,
        m: Arithmetic,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        keys = _looked_back_at(row.tap, row.inputs)
        read = [self._recorded.rows(name, range(positions[-1] + 1) if name in keys else positions).to(dtype) for name in row.inputs]
        layer = place_of(row.tap)[1]
        w = m.top(weights, dtype) if layer is None else m.layer(weights, layer, dtype)
        return operation(Place(m, w, weights, positions, self._recorded.ids(positions), layer or 0), *read)


def _looked_back_at(tap: str, inputs: tuple[str, ...]) -> list[str]:
    """The inputs of which the operation reads all earlier positions too."""
    return [name for name in inputs if stem_of(name) in LOOKS_BACK.get(stem_of(tap), ())]


def judged(row: ReplayRow, exact: Tensor, rounded: Tensor | None, made: Tensor, positions: Sequence[int]) -> ReplayRow:
    """The row with its verdict.  exact, rounded, made: what was computed twice and what the trace has, [1,P,channels] or [1,H,P,S]."""
    judgeable = exact.isfinite() if rounded is None else exact.isfinite() & rounded.isfinite()
    n, n_all = int(judgeable.sum()), exact.numel()
    if n == 0:
        return replace(row, verdict="not recorded", note=f"no value is judged: {OVERFLOWS}")
    ref, test = exact[judgeable], made[judgeable]
    n_bad = int((~test.isfinite()).sum())
    error = math.inf if n_bad else float(nmse(ref, test))
    predicted = 0.0 if rounded is None else float(nmse(ref, rounded[judgeable]))
    floor = PREDICTED_TIMES * predicted + EXACT_FLOOR
    notes = [f"{count(n_bad, 'value')} not finite, though the inputs are"] if n_bad else []
    notes += [f"{count(n_all - n, 'value')} of {n_all} not judged: {OVERFLOWS}"] if n < n_all else []
    return replace(
        row,
        verdict="cleared" if error <= floor else "convicted",
        nmse=error,
        predicted=predicted,
        floor=floor,
        worst=_worst(exact[0], made[0], judgeable[0], positions),
        n=n,
        note="; ".join(notes),
    )


def _worst(exact: Tensor, made: Tensor, judgeable: Tensor, positions: Sequence[int]) -> Worst:
    difference = (exact.double() - made.double()).abs().nan_to_num(math.inf).masked_fill(~judgeable, -1)
    at = [int(i) for i in np.unravel_index(int(difference.argmax()), difference.shape)]
    value = Worst(tuple(at), exact[tuple(at)].item(), made[tuple(at)].item())
    at[-2] = positions[at[-2]]
    return replace(value, index=tuple(at))
