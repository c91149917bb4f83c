"""Every piece of evidence of a trace as numbers that a setup must reproduce, in units of what honest arithmetic may change there.

    R(x) = mean ((y − seen(x)) / scale)²        y: what the trace says;  seen: how a tap x of a setup would look in that evidence
    scale² = floor · mean x_ref² of values and fingerprints;  of samples and statistics, what the emulated arithmetic does to just these

R ≤ allowance: the evidence does not tell the setup from the engine.  Sums are linear, so an error seen through samples or random-sign sums
is explained by a fault as the error of the whole tensor is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantscope.compare import EXACT_FLOOR, PREDICTED_TIMES, stats_of
from quantscope.fingerprint import RELATIVE_SD, fingerprint
from quantscope.metrics import nmse
from quantscope.model.taps import graph_order, place_of
from quantscope.trace import Evidence, Fingerprint, Full, Sample, Stats, Trace, covered

SUM_ORDER = math.sqrt(EXACT_FLOOR)  # of a statistic, relative to the RMS: what the order of float32 sums may change
_STRENGTH: tuple[type[Evidence], ...] = (Full, Fingerprint, Sample, Stats)
SIGMAS = 5.0  # of a statistic: five numbers of some hundred taps in hundreds of comparisons
MOST_EXTREME = 16  # values that say how far rounding moves the largest
ONCE_IN = 1e-4  # chance of a sample of an honest engine to exceed its allowance


@dataclass(frozen=True)
class Reading:
    """One piece of evidence.  ref: what the reference would show; rows: positions it stands for, None: all."""

    tap: str
    piece: Evidence
    rows: tuple[int, ...] | None
    y: Tensor  # float64 [k]
    ref: Tensor  # float64 [k]
    scale: Tensor  # float64 [k]
    allowance: float
    floor: float  # NMSE

    @property
    def layer(self) -> int | None:
        return place_of(self.tap)[1]

    @property
    def excess(self) -> float:
        """R of the reference divided by its allowance: over 1, the engine differs here."""
        return self.distance(self.ref) / self.allowance

    def shows_all(self, n_tokens: int) -> bool:
        """Whether agreement here is that of the whole tap, of every position and channel."""
        return isinstance(self.piece, Full | Fingerprint) and (self.rows is None or len(self.rows) == n_tokens)

    @property
    def peak(self) -> float | None:
        """The largest magnitude, where the evidence says it."""
        if isinstance(self.piece, Fingerprint):
            return self.piece.peak
        if isinstance(self.piece, Stats):
            ends = [abs(self.piece.values[name]) for name in ("min", "max") if name in self.piece.values]
            return max(ends, default=None)
        return float(self.y.abs().max())

    def seen(self, x: Tensor) -> Tensor:
        """How a tap [1,T,channels] or [1,H,T,S] looks in this evidence."""
        return seen(x[0], self.piece, self.rows)

    def distance(self, seen: Tensor) -> float:
        """R of what a setup would show; +inf where one is not finite and the other is."""
        if seen.shape != self.y.shape:
            return math.inf
        finite = self.y.isfinite()
        if not torch.equal(finite, seen.isfinite()) or not finite.any():
            return math.inf if finite.any() or seen.isfinite().any() else 0.0
        z = ((self.y - seen) / self.scale)[finite].square()
        return float(z.max() if isinstance(self.piece, Stats) else z.mean())


def seen(x: Tensor, piece: Evidence, rows: Sequence[int] | None) -> Tensor:
    """What this kind of evidence keeps of a tap [T,channels] or [H,T,S]: float64 [k]; empty where the tap lacks these."""
    if rows is not None:
        if rows and max(rows) >= x.shape[-2]:
            return x.new_zeros(0, dtype=torch.float64)
        x = x[..., list(rows), :]
    if isinstance(piece, Full):
        return x.double().flatten() if x.shape == piece.values.shape else x.new_zeros(0, dtype=torch.float64)
    if isinstance(piece, Fingerprint):
        return fingerprint(x).sums.double() if x.numel() == piece.n else x.new_zeros(0, dtype=torch.float64)
    if isinstance(piece, Sample):
        flat = x.flatten()
        fits = tuple(x.shape) == piece.shape or (piece.shape[0] == 1 == len(x) and piece.shape[-1] < x.shape[-1])
        return flat[piece.index].double() if fits else flat.new_zeros(0, dtype=torch.float64)
    stats = stats_of(x)
    return torch.tensor([stats[name] for name in piece.values], dtype=torch.float64)


def said(piece: Evidence) -> Tensor:
    """The numbers of the evidence itself, float64 [k]."""
    if isinstance(piece, Full):
        return piece.values.double().flatten()
    if isinstance(piece, Fingerprint):
        return piece.sums.double()
    if isinstance(piece, Sample):
        return piece.values.double()
    return torch.tensor(list(piece.values.values()), dtype=torch.float64)


def readings(trace: Trace, ref: Mapping[str, Tensor], rounded: Mapping[str, Tensor] | None) -> list[Reading]:
    """The strongest kind of evidence of every tap that the reference has too, in the order of the graph.

    ref, rounded: taps of the reference and of the arithmetic that the engine may have, [1,T,channels] or [1,H,T,S]; None for an engine
    that computes in float32.
    """
    pooled = _pooled(ref, rounded)
    found = []
    for tap in sorted((t for t in trace.taps if t in ref), key=graph_order):
        kind = min(_STRENGTH.index(type(piece)) for piece in trace.taps[tap])
        for piece in trace.taps[tap]:
            if type(piece) is _STRENGTH[kind]:
                found.append(_reading(trace, tap, piece, ref[tap], None if rounded is None else rounded[tap], pooled))
    return found


def _reading(
    trace: Trace, tap: str, piece: Evidence, x: Tensor, rounded: Tensor | None, pooled: Mapping[tuple[str, str], float]
) -> Reading:
    there = covered(piece, trace.origin)
    rows = None if there is None else tuple(there)  # −1 stays the last one, of however many
    at = _rows_of(x, rows)
    floor = EXACT_FLOOR if rounded is None else PREDICTED_TIMES * float(nmse(x.flatten(), rounded.flatten())) + EXACT_FLOOR
    size = float(at.double().square().mean().sqrt()) or 1.0
    ref = seen(x[0], piece, rows)
    if isinstance(piece, Stats):
        changes = None if rounded is None else _changes(at, _rows_of(rounded, rows))
        sizes = [max(size, abs(value)) if name in ("min", "max") else size for name, value in zip(piece.values, ref.tolist(), strict=True)]
        of_each = zip(piece.values, sizes, strict=True)
        scale = torch.tensor([_scale_of(name, tap, piece, pooled, changes, at.numel(), s) for name, s in of_each], dtype=torch.float64)
    elif isinstance(piece, Sample):
        scale = _scale_of_sample(piece, rows, x[0], None if rounded is None else rounded[0], size)
    else:
        scale = torch.full_like(said(piece), math.sqrt(floor) * size)
    return Reading(tap, piece, rows, said(piece), ref, scale, _allowance(piece), floor)


def _scale_of_sample(piece: Sample, rows: Sequence[int] | None, x: Tensor, rounded: Tensor | None, size: float) -> Tensor:
    """Of each value by its own row and itself: the printed rows are not those of average size, as in an attention map."""
    printed = 0.0 if piece.digits is None else 10.0 ** (-2 * piece.digits) / 12
    least = torch.full_like(said(piece), PREDICTED_TIMES * printed + EXACT_FLOOR * size**2)
    if rounded is None:
        return least.sqrt()
    error = (x.double() - rounded.double()).square()  # [T,channels] or [H,T,S]
    errors = seen(error, piece, rows) + seen(error.mean(-1, keepdim=True).expand_as(error), piece, rows)
    return (least + PREDICTED_TIMES * errors).sqrt() if errors.shape == least.shape else least.sqrt()


def _allowance(piece: Evidence) -> float:
    if isinstance(piece, Fingerprint):
        return 1 + 3 * RELATIVE_SD
    if isinstance(piece, Sample):
        from scipy.stats import chi2

        n = piece.values.numel()
        return float(chi2.ppf(1 - ONCE_IN, n)) / n
    return 1.0


def _pooled(ref: Mapping[str, Tensor], rounded: Mapping[str, Tensor] | None) -> dict[tuple[str, str], float]:
    """(stem, statistic) → the largest change that the expected arithmetic makes to it in any layer, relative to the RMS.

    Over all layers, since one change alone may be small by chance.
    """
    largest: dict[tuple[str, str], float] = {}
    for tap in ref if rounded is not None else ():
        a, b = stats_of(ref[tap][0]), stats_of(rounded[tap][0])  # type: ignore[index]
        for name, value in a.items():
            key = tap.partition("-")[0], name
            largest[key] = max(largest.get(key, 0.0), abs(b[name] - value) / (a["rms"] or 1.0))
    return largest


def _rows_of(x: Tensor, rows: Sequence[int] | None) -> Tensor:
    """[1,T,channels] → the rows that are there, [P,channels]; likewise of an attention map."""
    return x[0] if rows is None or max(rows) >= x.shape[-2] else x[0][..., list(rows), :]


def _changes(x: Tensor, rounded: Tensor) -> dict[str, float]:
    """σ of what the expected arithmetic does to each statistic, from how it does that in each row and at the most extreme values.

    One run's own change may be small by chance; those of its rows, which round independently, say how large another run's can be:
    σ_mean = √(mean δ² / n_rows), δ a row's change of the mean; that of the RMS likewise from the energies; of an extreme: RMS of the error
    over the MOST_EXTREME values.
    """
    a, error = x.double().flatten(0, -2), (rounded.double() - x.double()).flatten(0, -2)  # [rows,channels]
    size = float(a.square().mean().sqrt()) or 1.0
    energy = (a + error).square().mean(-1) - a.square().mean(-1)  # [rows]
    spread = float(error.square().mean().sqrt()) / math.sqrt(error.numel())  # of a mean of independent errors
    mean = max(float(error.mean(-1).square().mean().sqrt()) / math.sqrt(len(a)), spread)
    n = min(MOST_EXTREME, a.numel())
    ends = {name: error.flatten()[a.flatten().topk(n, largest=name == "max").indices] for name in ("min", "max")}
    return {
        "mean": mean,
        "sum": mean * a.numel(),
        "rms": max(float(energy.square().mean().sqrt()) / math.sqrt(len(a)) / (2 * size), spread)
        + float(error.square().mean()) / (2 * size),
        **{name: float(e.square().mean().sqrt()) for name, e in ends.items()},
    }


def _scale_of(
    name: str, tap: str, piece: Stats, pooled: Mapping[tuple[str, str], float], changes: Mapping[str, float] | None, n: int, size: float
) -> float:
    """What a statistic may change by."""
    printed = 0.5 * 10.0 ** -piece.digits[name] if name in piece.digits else 0.0
    order = SUM_ORDER * size * (n if name == "sum" else 1)
    expected = 0.0 if changes is None else SIGMAS * changes[name] + PREDICTED_TIMES * size * pooled.get((tap.partition("-")[0], name), 0.0)
    return expected + order + printed
