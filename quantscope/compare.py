"""Two traces of the same tokens, tap by tap in the order of the graph: where they part first, and what the evidence can show.

    error of a tap = Σ (ref − test)² / Σ ref²  (NMSE)          floor of a tap = what honest arithmetic alone may do there

A tap *differs* when its error exceeds its floor.  With whole tensors the error is exact; with fingerprints it is an estimate (± 35 %); with
samples it is estimated from the values that were seen; with statistics it is a lower bound, (rms′/rms − 1)² or (mean′ − mean)²/rms²: they
can show that two signals differ, never that they agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from quantscope.errors import TraceContentError
from quantscope.fingerprint import RELATIVE_SD, estimate_nmse, fingerprint
from quantscope.importers.axes import ORDER_MATTERS
from quantscope.language import mark, retold, say
from quantscope.metrics import cos_sim, mean, nmse, rms
from quantscope.model.taps import graph_order, stem_of
from quantscope.phrases import clauses
from quantscope.trace import Evidence, Fingerprint, Full, Origin, Positions, Sample, Stats, Trace, check_same_run, covered, rows_of
from quantscope.weights import interleave_rows

Kind: TypeAlias = Literal["values", "fingerprint", "sample", "statistics"]
Verdict: TypeAlias = Literal["within", "differs", "not shown"]

EXACT_FLOOR = 1e-9  # NMSE between two float32 programs that differ in the order of their sums only; measured: docs/measured.md
ROUNDING_FLOOR = 1e-2  # of an engine whose arithmetic is unknown or rounds activations, where no emulation says more
PREDICTED_TIMES = 4.0  # an engine may have this multiple of the predicted error: rounding falls otherwise, its size stays


@dataclass(frozen=True)
class Worst:
    """The element with the largest difference."""

    index: tuple[int, ...]  # (position, channel), of an attention map (head, position, key)
    ref: float
    test: float


@dataclass(frozen=True)
class Row:
    """One tap.  nmse: exact, estimated or a lower bound, by ``kind``; NaN where nothing can be said."""

    tap: str
    kind: Kind
    nmse: float
    floor: float
    verdict: Verdict
    cos_sim: float | None = None
    worst: Worst | None = None
    n: int = 0  # values that were compared
    n_all: int = 0  # values the tap has
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """Rows in the order of the graph; what only one trace has; what the reader must know."""

    ref: Origin
    test: Origin
    rows: tuple[Row, ...]
    only_ref: tuple[str, ...]
    only_test: tuple[str, ...]
    notes: tuple[str, ...]
    floor_source: str

    @property
    def first_divergence(self) -> Row | None:
        return next((row for row in self.rows if row.verdict == "differs"), None)

    @property
    def last_agreement(self) -> Row | None:
        """The last tap before the first divergence that is shown to agree."""
        found = None
        for row in self.rows:
            if row.verdict == "differs":
                break
            found = row if row.verdict == "within" else found
        return found


def compare(ref: Trace, test: Trace, *, predicted: Trace | None = None, floor: float | None = None, same_file: bool = True) -> Comparison:
    """Compare every tap that both traces have evidence of.

    predicted: the emulated engine on the same file; its error against ``ref`` times 4 is the floor of each tap.  Without it, what ``ref``
    itself says of that (``Origin.predicted``).  floor: one NMSE for all taps instead.  same_file: refuse traces of different files.
    Raises TraceMismatchError for other tokens or files, TraceContentError when the traces have no tap or no position in common.
    """
    check_same_run(ref.origin, test.origin, same_file=same_file)
    floors, source = _floors(ref, test, predicted, floor)
    notes = _limits_of_origin(ref, test)
    test = _on_trust(test, ref)
    common = sorted((name for name in ref.taps if name in test.taps), key=graph_order)
    rows = [row for name in common for row in _rows(ref, test, name, partial(_floor_of, ref, test, name, floors(name), predicted))]
    if not rows:
        raise TraceContentError(
            f"nothing to compare: {ref.title} has {_some(ref.taps)}, {test.title} has {_some(test.taps)}, and no tap has evidence of the "
            f"same kind and positions in both. Trace the reference at all positions, or give names with `quantscope import --map`."
        )
    return Comparison(
        ref.origin,
        test.origin,
        tuple(rows),
        tuple(sorted((n for n in ref.taps if n not in test.taps), key=graph_order)),
        tuple(sorted((n for n in test.taps if n not in ref.taps), key=graph_order)),
        (*_limits(rows), *notes),
        source,
    )


def _on_trust(test: Trace, ref: Trace) -> Trace:
    """A trace that does not say its ids, with those of the reference: "the last position" is then one of them."""
    if test.origin.tokens is not None or ref.origin.tokens is None:
        return test
    return Trace(replace(test.origin, tokens=ref.origin.tokens), test.taps)


def _some(taps: Mapping[str, object]) -> str:
    names = list(taps)
    return f"{len(names)} taps ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"


# ---- floors --------------------------------------------------------------------------------------------------------------------------


def _floors(ref: Trace, test: Trace, predicted: Trace | None, floor: float | None) -> tuple[Callable[[str], float], str]:
    """The floor of each tap, and where it comes from."""
    if floor is not None:
        return lambda tap: floor, say("an NMSE of {floor} at every tap, as asked for", floor=f"{floor:g}")
    known = predictions(ref, test, predicted)
    if not known and _both_exact(ref, test):
        return lambda tap: EXACT_FLOOR, say("an NMSE of {floor}, the order of float32 sums", floor=f"{EXACT_FLOOR:g}")
    if not known:
        return lambda tap: ROUNDING_FLOOR, _wide_allowance(test)
    largest = max(known.values())
    bf16 = predicted is not None and _in_bf16(predicted)
    return (
        lambda tap: PREDICTED_TIMES * known.get(tap, largest) + EXACT_FLOOR,
        say(
            "{times} times what {arithmetic} changes at the same tap",
            times=f"{PREDICTED_TIMES:g}",
            arithmetic="bfloat16" if bf16 else say("ggml's arithmetic (8-bit activations, 16-bit cache)"),
        ),
    )


def _wide_allowance(test: Trace) -> str:
    floor = f"{ROUNDING_FLOOR:g}"
    if _in_bf16(test):
        return say(
            "an NMSE of {floor}, a wide allowance for engines that round activations; --predicted with `quantscope trace MODEL "
            "--arithmetic bf16` says what this file needs",
            floor=floor,
        )
    return say(
        "an NMSE of {floor}, a wide allowance for engines that round activations; a reference of `quantscope trace MODEL` says what this "
        "file needs",
        floor=floor,
    )


def _in_bf16(trace: Trace) -> bool:
    return trace.origin.dtype == "bfloat16"


def _floor_of(ref: Trace, test: Trace, tap: str, floor: float, predicted: Trace | None, piece: Evidence) -> float:
    """The floor of one piece: of a sample at least what the emulated engine's whole tensors say of these values and their rows.

    Printed rows are not those of average size: the first rows of an attention map are, and a massive token's.
    """
    exact, rounded = (None if t is None else t.find(tap, Full) for t in (ref, predicted))
    if not isinstance(piece, Sample) or exact is None or rounded is None or exact.values.shape != rounded.values.shape:
        return floor
    there = covered(piece, test.origin)
    if there is not None and not _has(ref, exact, there):
        return floor
    error = (exact.values.double() - rounded.values.double()).square()
    error = error + error.mean(-1, keepdim=True)  # each value's own, and that of its row
    x = exact.values.double()
    if there is not None:
        error, x = (rows_of(Full(y, exact.positions), ref.origin, there) for y in (error, x))
    if int(piece.index.max()) >= error.numel():
        return floor
    return max(floor, PREDICTED_TIMES * _ratio(error.flatten()[piece.index].mean().item(), x.square().mean().item()))


def _both_exact(ref: Trace, test: Trace) -> bool:
    return all(t.origin.arithmetic.startswith("exact") for t in (ref, test))


def predictions(ref: Trace, test: Trace, predicted: Trace | None) -> Mapping[str, float]:
    """Tap → NMSE of the emulated arithmetic: of a trace of it, else what the reference's own trace says of ggml's.

    Nothing for an exact engine, nor for one in bfloat16, which rounds what ggml does not.
    """
    if predicted is None:
        return {} if _both_exact(ref, test) or _in_bf16(test) else ref.origin.predicted or {}
    check_same_run(ref.origin, predicted.origin)
    return {name: error for name in ref.taps if (error := tap_error(ref, predicted, name)) is not None and not math.isnan(error)}


# ---- one tap -------------------------------------------------------------------------------------------------------------------------


def _rows(ref: Trace, test: Trace, tap: str, floor_of: Callable[[Evidence], float]) -> list[Row]:
    """The strongest comparison that both traces allow, of every piece of that kind: a log of decoding has one for each step."""
    for kind, compare_kind in _BY_STRENGTH:
        pieces: list[Evidence] = test.all_of(tap, kind)  # type: ignore[type-var]
        compared = [(piece, row) for piece in pieces if (row := compare_kind(ref, test, tap, piece, floor_of(piece))) is not None]
        if len(compared) > 1:
            return [replace(row, note=_joined(_at(covered(piece, test.origin)), row.note)) for piece, row in compared]
        if compared:
            return [compared[0][1]]
    return []


def _at(positions: Positions) -> str:
    if positions is None:
        return ""
    if len(positions) == 1:
        return say("position {position}", position=positions[0])
    return say("positions {first} to {last}", first=positions[0], last=positions[-1])


def _joined(*notes: str) -> str:
    return clauses(note for note in notes if note)


def _shapes(a: Tensor | Sample, b: Tensor | Sample) -> str:
    return say("shapes {shape} and {other}", shape=list(a.shape), other=list(b.shape))


def _values(ref: Trace, test: Trace, tap: str, piece: Full, floor: float) -> Row | None:
    found = _same_rows(ref, tap, covered(piece, test.origin), piece.values)
    if found is None:
        return _other_way(ref, test, tap, piece, floor)
    a, b, note = found[0], found[1], ""
    if a.shape != b.shape:
        return Row(tap, "values", math.nan, floor, "differs", note=_shapes(a, b), n_all=a.numel())
    b, note = _channel_order(tap, a, b, test.origin, ref.origin)
    if not b.isfinite().all():
        bad = int((~b.isfinite()).sum())
        first = tuple(int(i) for i in (~b.isfinite()).nonzero()[0])
        worst = Worst(first, a[first].item(), b[first].item())
        note = say("{n} values are not finite", n=bad)
        return Row(tap, "values", math.inf, floor, "differs", worst=worst, n=b.numel(), n_all=b.numel(), note=note)
    error = nmse(a.flatten(), b.flatten()).item()
    return Row(
        tap,
        "values",
        error,
        floor,
        _judge(error, floor),
        cos_sim(a.flatten(), b.flatten()).item(),
        _worst(a, b),
        a.numel(),
        a.numel(),
        note,
    )


def _other_way(ref: Trace, test: Trace, tap: str, piece: Full, floor: float) -> Row | None:
    """The test has the values and the reference has less: compare what the reference has."""
    for kind, compare_kind in _BY_STRENGTH[1:]:
        for other in ref.all_of(tap, kind):  # type: ignore[type-var]
            row = compare_kind(test, ref, tap, other, floor)
            if row is not None:
                return _swapped(row)
    return None


def _swapped(row: Row) -> Row:
    worst = row.worst and Worst(row.worst.index, row.worst.test, row.worst.ref)
    return Row(row.tap, row.kind, row.nmse, row.floor, row.verdict, row.cos_sim, worst, row.n, row.n_all, row.note)


def _same_rows(ref: Trace, tap: str, wanted: Positions, values: Tensor) -> tuple[Tensor, Tensor] | None:
    """The rows of the reference at the positions of ``values``, and ``values``; None where the reference has not all of them."""
    full = ref.find(tap, Full)
    if full is None:
        return None
    there = covered(full, ref.origin)
    if wanted is None or there is None or wanted == there:
        return full.values.double(), values.double()
    if not set(wanted) <= set(there):
        return None
    return rows_of(full, ref.origin, wanted).double(), values.double()


def _channel_order(tap: str, a: Tensor, b: Tensor, test: Origin, ref: Origin) -> tuple[Tensor, str]:
    """q and k of an engine that keeps Hugging Face's half-split channels, reordered where that is what brings them together."""
    config = ref.config or test.config
    if config is None or stem_of(tap) not in ORDER_MATTERS or config["rope"]["layout"] != "interleaved":
        return b, ""
    in_order = interleave_rows(b.T, b.shape[-1] // config["head_dim"]).T
    if nmse(a.flatten(), in_order.flatten()) < 0.1 * nmse(a.flatten(), b.flatten()):
        return in_order, say("channels were half-split (Hugging Face order), reordered")
    return b, ""


def _worst(a: Tensor, b: Tensor) -> Worst:
    flat = int((a - b).abs().argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), a.shape))
    return Worst(index, a[index].item(), b[index].item())


def _fingerprints(ref: Trace, test: Trace, tap: str, piece: Fingerprint, floor: float) -> Row | None:
    wanted = covered(piece, test.origin)
    own = next((f for f in ref.all_of(tap, Fingerprint) if covered(f, ref.origin) == wanted), None)
    full = ref.find(tap, Full)
    if own is None and full is not None:
        rows = full.values if wanted is None else rows_of(full, ref.origin, wanted) if _has(ref, full, wanted) else None
        if rows is not None:
            own = fingerprint(rows)
    if own is None:
        return None
    if own.n != piece.n:
        return Row(tap, "fingerprint", math.nan, floor, "differs", note=say("{n} and {other} values", n=own.n, other=piece.n), n_all=own.n)
    error = estimate_nmse(own, piece)
    # an estimate three standard deviations above the floor is no chance
    verdict: Verdict = "differs" if not error <= floor * (1 + 3 * RELATIVE_SD) else "within"
    return Row(tap, "fingerprint", error, floor, verdict, n=piece.n, n_all=piece.n)


def _has(trace: Trace, full: Full, wanted: Sequence[int]) -> bool:
    there = covered(full, trace.origin)
    return there is None or set(wanted) <= set(there)


def _samples(ref: Trace, test: Trace, tap: str, piece: Sample, floor: float) -> Row | None:
    wanted, full = covered(piece, test.origin), ref.find(tap, Full)
    if full is None or (wanted is not None and not _has(ref, full, wanted)):
        return _two_samples(ref, test, tap, piece, floor)
    rows = full.values if wanted is None else rows_of(full, ref.origin, wanted)
    narrower = piece.shape[0] == 1 == len(rows) and piece.shape[-1] < rows.shape[-1]  # a log that does not say the width of a tap
    if tuple(rows.shape) != piece.shape and not narrower:
        return Row(tap, "sample", math.nan, floor, "differs", note=_shapes(rows, piece), n_all=rows.numel())
    everything = rows.double()
    return _sampled(tap, everything.flatten()[piece.index], piece, floor, tuple(rows.shape), everything.square().mean().item())


def _two_samples(ref: Trace, test: Trace, tap: str, piece: Sample, floor: float) -> Row | None:
    other = next(
        (s for s in ref.all_of(tap, Sample) if s.shape == piece.shape and covered(s, ref.origin) == covered(piece, test.origin)), None
    )
    if other is None:
        return None
    place = {int(i): k for k, i in enumerate(other.index)}
    both = [(place[int(i)], k) for k, i in enumerate(piece.index) if int(i) in place]
    if not both:
        return None
    theirs, ours = (torch.tensor(x) for x in zip(*both, strict=True))
    part = Sample(piece.values[ours], piece.index[ours], piece.shape, piece.positions, _fewest(piece.digits, other.digits))
    seen = other.values[theirs].double()
    return _sampled(tap, seen, part, floor, piece.shape, seen.square().mean().item())


def _fewest(a: int | None, b: int | None) -> int | None:
    return min((d for d in (a, b) if d is not None), default=None)


def _sampled(tap: str, a: Tensor, piece: Sample, floor: float, shape: tuple[int, ...], mean_square: float) -> Row:
    """mean (ref − test)² over the sample / mean ref² over the tap, which estimates the NMSE of the whole tap."""
    b = piece.values.double()
    error = _ratio((a - b).square().mean().item(), mean_square) if b.isfinite().all() else math.inf
    # a value printed with d decimals is off by up to half a unit, evenly: variance 10^(−2d) / 12
    printed = 0.0 if piece.digits is None else _ratio(10.0 ** (-2 * piece.digits) / 12, mean_square)
    k = int((a - b).abs().argmax())
    index = tuple(int(i) for i in torch.unravel_index(piece.index[k], shape))
    note = say("printed to {n} decimals", n=piece.digits) if piece.digits is not None else ""
    floor = (floor + PREDICTED_TIMES * printed) * _sampling_allowance(a.numel())
    worst = Worst(index, a[k].item(), b[k].item())
    return Row(tap, "sample", error, floor, _judge(error, floor), cos_sim(a, b).item(), worst, a.numel(), math.prod(shape), note)


def _ratio(a: float, b: float) -> float:
    return a / b if b else (math.inf if a else 0.0)


def _sampling_allowance(n: int) -> float:
    """What the mean square of n errors of equal size stays below, as a multiple of its expectation, but once in 10,000: χ²ₙ / n."""
    from scipy.stats import chi2

    return float(chi2.ppf(1 - 1e-4, n)) / n


def _statistics(ref: Trace, test: Trace, tap: str, piece: Stats, floor: float) -> Row | None:
    wanted, full = covered(piece, test.origin), ref.find(tap, Full)
    if full is not None and (wanted is None or _has(ref, full, wanted)):
        own, n = stats_of(full.values if wanted is None else rows_of(full, ref.origin, wanted)), full.values.numel()
    else:
        other = next((s for s in ref.all_of(tap, Stats) if covered(s, ref.origin) == wanted), None)
        if other is None:
            return None
        own, n = dict(other.values), 0
    bound, note = _lower_bound(own, piece, n)
    if math.isnan(bound):
        return None
    verdict: Verdict = "differs" if bound > floor else "not shown"
    return Row(tap, "statistics", bound, floor, verdict, n=0, n_all=n, note=note)


def stats_of(x: Tensor) -> dict[str, float]:
    """RMS, mean, min, max and sum over all values."""
    flat = x.flatten().double()
    return {
        "rms": rms(flat).item(),
        "mean": mean(flat).item(),
        "min": flat.min().item(),
        "max": flat.max().item(),
        "sum": flat.sum().item(),
    }


def _lower_bound(own: Mapping[str, float], piece: Stats, n: int) -> tuple[float, str]:
    """The largest NMSE that the statistics prove, and the statistic that proves it; NaN without an RMS to relate it to."""
    size = own.get("rms", math.nan)
    if math.isnan(size):
        return math.nan, ""
    bounds = {}
    for name, value in piece.values.items():
        if name in own and math.isfinite(value):
            slack = 0.5 * 10.0 ** -piece.digits[name] if name in piece.digits else 1e-6 * abs(own[name])
            difference = max(0.0, abs(value - own[name]) - slack)
            spread = {"rms": 1.0, "mean": 1.0}.get(name, 1 / n if n else 0.0)  # an extreme is one value of n
            spread = spread / n if name == "sum" and n else spread  # Σ = n · mean
            bounds[name] = difference**2 * spread / size**2 if size else (math.inf if difference else 0.0)
        elif name in own:
            bounds[name] = math.inf
    if not bounds:
        return math.nan, ""
    name = max(bounds, key=lambda k: bounds[k])
    return bounds[name], say("{statistic} {value} and {other}", statistic=name, value=f"{own[name]:.6g}", other=f"{piece.values[name]:.6g}")


def _judge(error: float, floor: float) -> Verdict:
    return "within" if error <= floor else "differs"  # NaN differs


_BY_STRENGTH: tuple[tuple[type[Evidence], Callable[..., Row | None]], ...] = (
    (Full, _values),
    (Fingerprint, _fingerprints),
    (Sample, _samples),
    (Stats, _statistics),
)


# ---- what such evidence can and cannot show ------------------------------------------------------------------------------------------

_SHOWS: dict[Kind, str] = {
    "fingerprint": mark(
        "{n} of {total} taps are compared by fingerprints: the error of a tap is known to about ±35 %; no class of fault is hidden from "
        "them, and they do not say which element is wrong."
    ),
    "sample": mark(
        "{n} of {total} taps are compared by samples: only the values that were printed are compared; a difference elsewhere in the tensor "
        "is not seen, and an agreement says little about the rest."
    ),
    "statistics": mark(
        "{n} of {total} taps are compared by statistics: an RMS or mean that differs proves a difference; one that agrees proves nothing, "
        "since a transposed weight or a permuted channel keeps both. Record fingerprints or values to know."
    ),
}


def _limits(rows: Sequence[Row]) -> list[str]:
    counts = {kind: sum(row.kind == kind for row in rows) for kind in _SHOWS}
    return [say(_SHOWS[kind], n=n, total=len(rows)) for kind, n in counts.items() if n]


def _limits_of_origin(ref: Trace, test: Trace) -> list[str]:
    notes: list[str] = []
    for trace in (ref, test):
        if trace.origin.tokens is None:
            notes.append(say("{trace} does not say its token ids: that both saw the same tokens is taken on trust.", trace=trace.title))
        if trace.origin.model_sha256 is None:
            notes.append(
                say("{trace} does not say the hash of its file: that both ran the same file is taken on trust.", trace=trace.title)
            )
        notes += map(retold, trace.origin.notes)
    return list(dict.fromkeys(notes))


def tap_error(ref: Trace, test: Trace, tap: str) -> float | None:
    """The largest error of a tap's whole tensors or fingerprints; None where the traces have none in common."""
    rows = _rows(ref, test, tap, lambda piece: 0) if tap in ref.taps and tap in test.taps else []
    return max((row.nmse for row in rows if row.kind in ("values", "fingerprint")), default=None)
