"""The figures of ``benchmarks.faults``: rates beside their targets, misses, and which cause was taken for which."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Judged:
    """What was said of one case, or of one clean comparison, from one kind of evidence.

    engine: "clean" of a real engine without a fault.  first: the first tap that the fault changes.  visible: whether this evidence shows
    the fault at all.  named: what was said to be the cause, candidates that are named together.
    """

    engine: str
    model: str
    type: str
    faults: str
    causes: tuple[str, ...]
    n_tokens: int
    kind: str
    first: str
    visible: bool
    detected: bool = False
    said_first: str = ""
    first_right: bool = False
    named: tuple[str, ...] = ()
    named_causes: tuple[str, ...] = ()
    n_named: int = 0
    consistent: bool = False
    explained: float = 0.0
    top1: bool = False
    top3: bool = False
    convicted: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()  # convicted, and no operation that a fault was planted in
    convicted_right: bool = False
    search_s: float = 0.0
    replay_s: float = 0.0
    error: str = ""
    trace: str = ""  # of the error

    def but(self, **fields: Any) -> Judged:
        return replace(self, **fields)

    @property
    def title(self) -> str:
        return f"{self.engine}, {self.model}, {self.type}, {self.n_tokens} tokens, {self.kind}: {self.faults}"

    @property
    def is_pair(self) -> bool:
        return len(self.causes) == 2


@dataclass(frozen=True)
class Figure:
    """One rate: of the rows that ``among`` takes, those of which ``right`` is true.  least: the target."""

    name: str
    kinds: tuple[str, ...]
    least: float
    right: Callable[[Judged], bool]
    among: Callable[[Judged], bool] = lambda row: not row.is_pair


FULL, FP, SAMPLES, STATS = ("full",), ("fingerprints",), ("samples", "first-ten"), ("statistics",)


def _has_operation(row: Judged) -> bool:
    return not row.is_pair and row.causes != ("bos-missing",)


def _pair(row: Judged) -> bool:
    return row.is_pair


FIGURES = (
    Figure("detection", FULL, 0.99, lambda r: r.detected),
    Figure("first bad tap", FULL, 0.90, lambda r: r.first_right),
    Figure("convicted operation", FULL, 0.97, lambda r: r.convicted_right, _has_operation),
    Figure("cause, top 1", FULL, 0.90, lambda r: r.top1),
    Figure("two faults: both operations convicted", FULL, 0.85, lambda r: r.convicted_right, _pair),
    Figure("two faults: both causes named", FULL, 0.0, lambda r: r.top1, _pair),
    Figure("detection", FP, 0.98, lambda r: r.detected),
    Figure("first bad tap", FP, 0.90, lambda r: r.first_right),
    Figure("cause, top 1", FP, 0.0, lambda r: r.top1),
    Figure("cause, top 3", FP, 0.80, lambda r: r.top3),
    Figure("detection", SAMPLES, 0.97, lambda r: r.detected),
    Figure("cause, top 1", SAMPLES, 0.0, lambda r: r.top1),
    Figure("cause, top 3", SAMPLES, 0.85, lambda r: r.top3),
    Figure("detection", STATS, 0.90, lambda r: r.detected),
    Figure("cause, top 1", STATS, 0.0, lambda r: r.top1),
    Figure("cause, top 3", STATS, 0.70, lambda r: r.top3),
)


@dataclass
class Report:
    """All verdicts of one run of the benchmark."""

    machine: str
    options: Mapping[str, Any]
    rows: list[Judged] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, rows: Iterable[Judged], verbose: bool = False) -> None:
        for row in rows:
            self.rows.append(row)
            what = wrong(row)
            if what or verbose:
                print(f"{what or 'right'} | {row.title} | {_said(row)}", flush=True)

    @property
    def faulty(self) -> list[Judged]:
        """Verdicts that count: of faults that the evidence shows."""
        return [row for row in self.rows if row.engine != "clean" and row.visible]

    @property
    def clean(self) -> list[Judged]:
        return [row for row in self.rows if row.engine == "clean"]

    @property
    def false_alarms(self) -> list[Judged]:
        return [row for row in self.clean if row.detected or row.convicted]


def rate(rows: Iterable[Judged], figure: Figure, kinds: Sequence[str] | None = None) -> tuple[int, int]:
    """(right, of how many)."""
    counted = [row for row in rows if row.kind in (kinds or figure.kinds) and figure.among(row)]
    return sum(figure.right(row) for row in counted), len(counted)


def wrong(row: Judged) -> str:
    """What is wrong with a verdict; empty where all is right, or the evidence does not show the fault."""
    if row.error:
        return "error"
    if row.engine == "clean":
        return "false alarm" if row.detected or row.convicted else ""
    if not row.visible:
        return ""
    missed = [f.name for f in FIGURES if row.kind in f.kinds and (f.least or row.is_pair) and f.among(row) and not f.right(row)]
    return "missed: " + ", ".join(missed) if missed else ""


def _said(row: Judged) -> str:
    """The verdict in one line."""
    if row.error:
        return row.error
    parts = [f"first {row.said_first or 'none'}" + (f" (is {row.first})" if row.first and row.first != row.said_first else "")]
    if row.kind == "full":
        parts.append(f"convicted {' '.join(row.convicted) or 'none'}" + (f", wrongly {' '.join(row.outside)}" if row.outside else ""))
    how = "consistent" if row.consistent else f"best, explains {row.explained:.3f}"
    parts.append(f"{how}: {'; '.join(row.named) or 'none'}" + (f" ({row.n_named} together)" if row.n_named > 1 else ""))
    return " | ".join([*parts, f"{row.search_s:.1f} s"])


# ---- Markdown ----------------------------------------------------------------------------------------------------------------------


def markdown(report: Report) -> str:
    """The section for docs/measured.md."""
    parts = [
        f"{report.machine}. Seed {report.options.get('seed')}, {report.seconds / 60:.0f} minutes.",
        _rates(report),
        _counts(report),
        _clean(report),
        _times(report),
        _together(report),
        _confusion(report),
        _misses(report),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def _rates(report: Report) -> str:
    """Rows: figures by kind; columns: both independent engines, each engine, the target."""
    engines = [e for e in ("numpy", "transformers", "reference") if any(row.engine == e for row in report.faulty)]
    independent = [row for row in report.faulty if row.engine != "reference"]
    columns = [("numpy + transformers", independent), *((e, [r for r in report.faulty if r.engine == e]) for e in engines)]
    body = []
    for f in FIGURES:
        for kind in f.kinds:
            cells = [_cell(rate(rows, f, [kind]), f.least) for _, rows in columns]
            body.append([kind, f.name, f"≥ {f.least:.2f}" if f.least else "", *cells])
    note = (
        "The faults of `reference` are the catalogue's own definitions, with ggml's arithmetic around them; the other engines share none."
    )
    return _table(["evidence", "figure", "target", *(name for name, _ in columns)], body) + f"\n\n{note}"


def _cell(counted: tuple[int, int], least: float) -> str:
    right, n = counted
    if n == 0:
        return "–"
    missed = " **missed**" if right / n < least else ""
    return f"{right / n:.3f} ({right}/{n}){missed}"


def _counts(report: Report) -> str:
    rows = [row for row in report.rows if row.engine != "clean"]
    hidden = Counter(row.kind for row in rows if not row.visible)
    faults = {(row.engine, row.model, row.type, row.faults) for row in rows}
    causes = {cause for row in rows for cause in row.causes}
    parts = ", ".join(f"{kind} {n}" for kind, n in hidden.items()) or "none"
    errors = sum(bool(row.error) for row in rows)
    return (
        f"{len(faults)} cases with {len(causes)} causes. Not counted, because the evidence is that of the right engine within its floor: "
        f"{parts}. Verdicts that ended in an error: {errors}."
    )


def _clean(report: Report) -> str:
    if not report.clean:
        return ""
    n = len(report.clean) // _kinds(report)
    engines = Counter(" ".join(row.faults.split()[:2]) for row in report.clean[:: _kinds(report)])
    alarms = len(report.false_alarms)
    how = ", ".join(f"{name} {m}" for name, m in sorted(engines.items()))
    return f"Clean comparisons: {n} ({how}), {len(report.clean)} verdicts, **{alarms} false alarms** (target 0)."


def _kinds(report: Report) -> int:
    return len({row.kind for row in report.clean})


def _times(report: Report) -> str:
    demo = [row for row in report.faulty if row.model == "demo"]
    parts = []
    for name, seconds, limit in (
        ("replay", [r.replay_s for r in demo if r.replay_s], 10),
        ("search, one fault", [r.search_s for r in demo if not r.is_pair and r.search_s], 60),
        ("search, two faults", [r.search_s for r in demo if r.is_pair and r.search_s], 60),
    ):
        if seconds:
            parts.append(f"{name}: median {median(seconds):.1f} s, longest {max(seconds):.1f} s (target {limit} s)")
    return "On the demo model, one thread of a busy machine: " + "; ".join(parts) + "." if parts else ""


def _together(report: Report) -> str:
    rows = [row for row in report.faulty if row.top1 and row.consistent]
    if not rows:
        return ""
    body = []
    for kind in dict.fromkeys(row.kind for row in rows):
        n = [row.n_named for row in rows if row.kind == kind]
        causes = [len(set(row.named_causes)) for row in rows if row.kind == kind]
        body.append([kind, len(n), sum(c == 1 for c in causes), f"{median(n):g}", max(n), max(causes)])
    head = ["evidence", "right and consistent", "one cause named alone", "median named together", "most", "most causes"]
    return "Candidates named together:\n\n" + _table(head, body)


def _confusion(report: Report) -> str:
    """planted → named, where the planted cause was not among those named."""
    counts = Counter(pair for row in report.faulty if not row.top1 for pair in _mistaken(row))
    if not counts:
        return "Confusion: nothing off the diagonal."
    return "Planted cause → what was named instead:\n\n" + _table(
        ["planted", "named", "verdicts", "evidence"],
        ([a, b, n, ", ".join(sorted(kinds))] for (a, b), n in counts.most_common() for kinds in [_kinds_of(report, a, b)]),
    )


def _mistaken(row: Judged) -> Iterator[tuple[str, str]]:
    yield " + ".join(sorted(row.causes)), ", ".join(dict.fromkeys(row.named_causes)) or "nothing"


def _kinds_of(report: Report, planted: str, named: str) -> set[str]:
    return {row.kind for row in report.faulty if not row.top1 and (planted, named) in list(_mistaken(row))}


def _misses(report: Report) -> str:
    lines = [f"- {what} | {row.title} | {_said(row)}" for row in report.rows if (what := wrong(row))]
    return "Misses:\n\n" + "\n".join(lines) if lines else ""
