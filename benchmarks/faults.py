"""Faults planted in three engines, and what quantscope says of each: whether it differs, where first, which operation, which cause.

    python -m benchmarks.faults [--cases 90] [--pairs 20] [--clean 200] [--minutes 20] [--all] [--json FILE] [--markdown FILE]

A case is one engine with a fault on one file.  Its full trace is weakened to each kind of evidence (``fault_cases.KINDS``), and each is
searched alone.  A case counts for a kind where its evidence shows the fault: where it differs from that of the same engine without the
fault by more than the floor of the arithmetic that the engine has.  The rest is reported as invisible.  ``fault_report`` counts.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from benchmarks import fault_cases
from benchmarks.fault_cases import ENGINES, KINDS, MODELS, Case, File, Run, clean, setup_of, taps_of, traced, weights_of
from benchmarks.fault_report import Judged, Report, markdown
from benchmarks.measure import machine
from benchmarks.planted import Planted
from quantscope import engines, metrics
from quantscope.compare import EXACT_FLOOR, PREDICTED_TIMES, stats_of
from quantscope.diagnose.causes import Named, find
from quantscope.diagnose.convictions import expected_rounding
from quantscope.diagnose.readings import readings, said
from quantscope.diagnose.replay import replay
from quantscope.diagnose.search import Candidate, Search, search
from quantscope.diagnose.setup import Setup
from quantscope.engines import Request
from quantscope.model.arithmetic import Arithmetic
from quantscope.model.taps import graph_order, split_tap
from quantscope.quants import set_threads
from quantscope.trace import Full, Sample, Stats, Trace
from quantscope.weights import Weights

FIRST = 3  # candidates that "top 3" looks at
Job: TypeAlias = "partial[list[Judged]]"


# ---- what the evidence shows -------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _arithmetics(run: Run) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """Taps of the right forward in float32, and in the arithmetic that the engine says it has."""
    predicted = expected_rounding(clean(run).origin)
    return taps_of(setup_of(run)), None if predicted is None else taps_of(setup_of(run, arithmetic=predicted))


def nmse(a: Tensor, b: Tensor) -> float:
    return float(metrics.nmse(a.flatten(), b.flatten()))


def floor_of(run: Run, tap: str) -> float:
    """NMSE that the engine's arithmetic may cause at a tap."""
    exact, rounded = _arithmetics(run)
    return EXACT_FLOOR if rounded is None else PREDICTED_TIMES * nmse(exact[tap], rounded[tap]) + EXACT_FLOOR


def first_changed(case: Case, faulty: Trace) -> str | None:
    """The first tap, in the order of the graph, that the fault changes by more than the floor."""
    right = clean(case.run)
    for tap in sorted(set(faulty.taps) & set(right.taps), key=graph_order):
        a, b = right.find(tap, Full), faulty.find(tap, Full)
        assert a is not None
        assert b is not None
        if a.values.shape != b.values.shape or not b.values.isfinite().all():
            return tap
        if nmse(a.values, b.values) > floor_of(case.run, tap):
            return tap
    return None


def visible(case: Case, weak: Trace, right: Trace) -> bool:
    """Whether this evidence differs from that of the engine without the fault, ``right``, by more than the floor."""
    return any(_piece_differs(case.run, tap, weak, right) for tap in set(weak.taps) & set(right.taps))


def _piece_differs(run: Run, tap: str, weak: Trace, right: Trace) -> bool:
    (piece,), (other,), (full,) = weak.taps[tap], right.taps[tap], clean(run).taps[tap]
    a, b = said(piece), said(other)
    assert isinstance(full, Full)
    if a.shape != b.shape or not a.isfinite().all() or not b.isfinite().all():
        return not torch.equal(a, b)
    if isinstance(piece, Stats):
        slack = torch.tensor([_statistic_floor(run, tap, name) + 10.0 ** -piece.digits.get(name, 9) for name in piece.values])
        return bool(((a - b).abs() > slack).any())
    printed = 10.0 ** (-2 * piece.digits) / 12 if isinstance(piece, Sample) and piece.digits is not None else 0.0
    size = float(full.values.double().square().mean())
    return float((a - b).square().mean()) > floor_of(run, tap) * size + PREDICTED_TIMES * printed


def _statistic_floor(run: Run, tap: str, name: str) -> float:
    """What the arithmetic may change a statistic by: as readings.py has it, the largest change in any layer."""
    return PREDICTED_TIMES * _changes(run).get((tap.partition("-")[0], name), 0.0) + math.sqrt(EXACT_FLOOR) * _rms(run)[tap]


@lru_cache(maxsize=4)
def _rms(run: Run) -> dict[str, float]:
    return {tap: float(x.double().square().mean().sqrt()) for tap, x in _arithmetics(run)[0].items()}


@lru_cache(maxsize=4)
def _changes(run: Run) -> dict[tuple[str, str], float]:
    exact, rounded = _arithmetics(run)
    largest: dict[tuple[str, str], float] = {}
    for tap in exact if rounded is not None else ():
        a, b = stats_of(exact[tap]), stats_of(rounded[tap])  # type: ignore[index]
        for name in a:
            key = tap.partition("-")[0], name
            largest[key] = max(largest.get(key, 0.0), abs(a[name] - b[name]))
    return largest


# ---- one case ----------------------------------------------------------------------------------------------------------------------


def judge(case: Case, kinds: Sequence[str]) -> list[Judged]:
    """What is said of a case from each kind of evidence."""
    faulty, right = traced(case.run, case.planted), clean(case.run)
    first = first_changed(case, faulty)
    shown = first is not None and _both_show(case, faulty)
    judged = []
    for kind in kinds:
        weak = KINDS[kind](faulty)
        row = _blank(case, kind, first, shown and visible(case, weak, KINDS[kind](right)))
        judged.append(_replayed(_diagnosed(row, case, weak), case, weak) if kind == "full" else _searched(row, case, weak))
    return judged


def _both_show(case: Case, faulty: Trace) -> bool:
    """Of two faults, whether each still changes something where the other is already: else there is one to find."""
    if len(case.planted) == 1:
        return True
    return all(_beyond_floor(case.run, traced(case.run, (p,)), faulty) for p in case.planted)


def _beyond_floor(run: Run, a: Trace, b: Trace) -> bool:
    for tap in a.taps:
        x, y = a.find(tap, Full), b.find(tap, Full)
        if x is None or y is None or x.values.shape != y.values.shape:
            return True
        finite = x.values.isfinite() & y.values.isfinite()
        if not torch.equal(x.values.isfinite(), y.values.isfinite()):
            return True
        if finite.any() and nmse(x.values[finite], y.values[finite]) > floor_of(run, tap):
            return True
    return False


def _blank(case: Case, kind: str, first: str | None, shows: bool) -> Judged:
    run = case.run
    causes = tuple(p.cause for p in case.planted)
    return Judged(run.engine, run.file.model, run.file.type, case.faults, causes, len(run.ids), kind, first or "", shows)


def _searched(row: Judged, case: Case, weak: Trace) -> Judged:
    began = time.perf_counter()
    try:
        found = search(
            weak, weights_of(case.run.file.path), predicted=expected_rounding(weak.origin), n_prompt=case.run.n_prompt, ids=case.run.ids
        )
    except Exception as e:  # a search that fails has found nothing
        return row.but(error=f"{type(e).__name__}: {e}", trace=traceback.format_exc()[-1500:])
    return row.but(search_s=time.perf_counter() - began, **_findings(case, row, found))


def _diagnosed(row: Judged, case: Case, full: Trace) -> Judged:
    """The verdict on whole tensors: the causes of the convicted operations, then the catalogue for what is left."""
    began = time.perf_counter()
    try:
        found = find(full, weights_of(case.run.file.path), n_prompt=case.run.n_prompt, ids=case.run.ids)
    except Exception as e:
        return row.but(error=f"{type(e).__name__}: {e}", trace=traceback.format_exc()[-1500:])
    top1 = len(found.named) == len(case.planted) and all(any(_is(n, p) for n in found.named) for p in case.planted)
    near = any(names(c, case.planted) for c in found.alternatives[:FIRST])
    return row.but(
        search_s=time.perf_counter() - began,
        detected=found.level > 1,
        said_first=found.taps[0] if found.taps else "",
        first_right=bool(found.taps) and found.taps[0] == row.first,
        named=tuple(n.instance.label for n in found.named)[:8],
        named_causes=(" + ".join(sorted(n.instance.fault.name for n in found.named)),) if found.named else (),
        n_named=1 + sum(len(n.twins) for n in found.named) if found.named else 0,
        consistent=bool(found.named) and not found.unexplained,
        explained=1.0 if found.named and not found.unexplained else 0.0,
        top1=top1,
        top3=top1 or near,
    )


def _is(n: Named, p: Planted) -> bool:
    """Whether a fault that was named is this one, or cannot be told from it."""
    if n.instance.fault.name == p.cause:
        return _at_place(n.instance.place, n.instance.ops, p)
    return p.cause in n.twins


def _findings(case: Case, row: Judged, found: Search) -> dict[str, object]:
    named = list(found.consistent or found.candidates[:1])
    distinct: list[Candidate] = []
    for c in found.candidates:
        if labels(c) not in [labels(d) for d in distinct]:
            distinct.append(c)
    top1 = any(names(c, case.planted) for c in named)
    return {
        "detected": bool(found.differing),
        "said_first": found.differing[0] if found.differing else "",
        "first_right": bool(found.differing) and found.differing[0] == row.first,
        "named": tuple(c.label for c in named[:8]),
        "named_causes": tuple(" + ".join(sorted(c.names)) for c in named),
        "n_named": len({labels(c) for c in named}),
        "consistent": bool(found.consistent),
        "explained": max((c.explained for c in found.candidates), default=0.0),
        "top1": top1,
        "top3": top1 or any(names(c, case.planted) for c in distinct[:FIRST]),
    }


def labels(c: Candidate) -> tuple[str, ...]:
    return tuple(sorted(instance.label for instance in c.faults))


def names(c: Candidate, planted: Sequence[Planted]) -> bool:
    """Whether a candidate is what was planted: each fault by its name and at its operation or layer, and nothing else."""
    left = list(planted)
    for instance in c.faults:
        same = next((p for p in left if p.cause == instance.fault.name and _at_place(instance.place, instance.ops, p)), None)
        if same is None:
            return False
        left.remove(same)
    return not left


def _at_place(place: str, ops: tuple[str, ...], planted: Planted) -> bool:
    if planted.cause in ("layer-skipped", "layer-repeated"):
        return planted.layers == (int(place),)
    return not ops or bool(set(ops) & set(planted.taps))


def _replayed(row: Judged, case: Case, full: Trace) -> Judged:
    """With the operations that local replay convicts."""
    began = time.perf_counter()
    try:
        found = replay(full, weights_of(case.run.file.path), predicted=expected_rounding(full.origin))
    except Exception as e:
        return row.but(error=f"{type(e).__name__}: {e}", trace=traceback.format_exc()[-1500:])
    seconds = time.perf_counter() - began
    convicted = [r.tap for r in found.those("convicted")]
    outside = [tap for tap in convicted if not any(_made_by(p, tap) for p in case.planted)]
    each = [any(_made_by(p, tap) for tap in convicted) for p in case.planted if p.cause != "bos-missing"]
    return row.but(convicted=tuple(convicted[:6]), outside=tuple(outside[:6]), convicted_right=all(each) and not outside, replay_s=seconds)


def _made_by(planted: Planted, tap: str) -> bool:
    """Whether the fault is in the operation that makes this tap."""
    stem, layer = split_tap(tap) or (tap, None)
    stands_for = {*planted.taps, *(["kqv_out"] if "kq_soft_max" in planted.taps else [])}
    return stem in stands_for and (layer is None or planted.at(layer))


# ---- clean comparisons -------------------------------------------------------------------------------------------------------------


def judge_clean(asked: tuple[int, File, Request], kinds: Sequence[str]) -> list[Judged]:
    """What is said of a real engine without a fault: nothing, or it is a false alarm.

    Whether anything differs is decided by ``readings``, which is what the search begins with.  The search itself, which then goes through
    the catalogue, is run on the evidence that differs, and to see that both say the same on one kind in each fifth comparison.
    """
    number, file, request = asked
    trace, weights = engines.run(request), weights_of(file.path)
    predicted = expected_rounding(trace.origin)
    setup = Setup(weights, torch.tensor([request.tokens]))
    ref = _with_batch(setup)
    rounded = None if predicted is None else _with_batch(replace(setup, arithmetic=predicted))
    how = f"{request.engine} {request.dtype} kv {request.kv} threads {request.threads}"
    rows = []
    for k, kind in enumerate(kinds):
        weak = KINDS[kind](trace)
        row = Judged("clean", file.model, file.type, how, (), len(request.tokens), kind, "", True)
        differing = [(r.tap, r.excess) for r in readings(weak, ref, rounded) if r.excess > 1]
        row = row.but(detected=bool(differing), said_first=" ".join(f"{tap} {excess:.2f}" for tap, excess in differing[:3]))
        if differing or (number % 5 == 0 and number // 5 % len(kinds) == k):
            row = _searched_clean(row, weak, weights, predicted)
        if kind == "full":
            convicted = replay(trace, weights, predicted=predicted).those("convicted")
            row = row.but(convicted=tuple(r.tap for r in convicted[:6]))
        rows.append(row)
    return rows


def _with_batch(setup: Setup) -> dict[str, Tensor]:
    return {name: x[None] for name, x in taps_of(setup).items()}


def _searched_clean(row: Judged, weak: Trace, weights: Weights, predicted: Arithmetic | None) -> Judged:
    began = time.perf_counter()
    found = search(weak, weights, predicted=predicted, pairs=False)
    named = tuple(c.label for c in found.candidates[:3])
    return row.but(search_s=time.perf_counter() - began, detected=row.detected or bool(found.differing), named=named)


# ---- running -----------------------------------------------------------------------------------------------------------------------


def one_thread() -> None:
    """Two workers on two cores."""
    torch.set_num_threads(1)
    set_threads(1)


def jobs_of(files: Sequence[File], options: argparse.Namespace) -> list[Job]:
    """Cases, pairs and clean comparisons that the options ask for, mixed, so that a run that is cut short has some of each."""
    kinds = options.kinds.split(",")
    runs = partial(fault_cases.shuffled_runs, files, options.engines.split(","))
    cases = fault_cases.sampled_cases(runs(options.seed), None if options.all else options.cases, options.seed, options.only)
    pairs = fault_cases.sampled_pairs(runs(options.seed + 1), options.pairs, options.seed) if options.pairs else []
    asked = fault_cases.clean_requests([f for f in files if f.path.is_file()], options.clean, options.seed)
    groups: list[list[Job]] = [
        [partial(judge_clean, (k, *one), kinds) for k, one in enumerate(asked)],
        [partial(judge, case, kinds) for case in cases],
        [partial(judge, case, ["full"]) for case in pairs],
    ]
    placed = [((k + 0.5) / len(group), n, job) for n, group in enumerate(groups) for k, job in enumerate(group)]
    return [job for _, _, job in sorted(placed, key=lambda place: place[:2])]


def measured(files: Sequence[File], options: argparse.Namespace, pool: ProcessPoolExecutor | None = None) -> Report:
    """All that the options ask for, judged; what is not begun after ``options.minutes`` is left out."""
    began = time.perf_counter()
    report = Report(machine(), vars(options))
    jobs = jobs_of(files, options)
    begun = [job if pool is None else pool.submit(job).result for job in jobs]
    for k, result in enumerate(begun):
        if options.minutes and time.perf_counter() - began > 60 * options.minutes:
            print(f"stopped after {options.minutes} minutes, {k} of {len(jobs)} done", flush=True)
            break
        report.add(result(), options.verbose)
    if pool is not None:
        pool.shutdown(cancel_futures=True)
    report.seconds = time.perf_counter() - began
    return report


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.faults", description="What quantscope says of planted faults.")
    made.add_argument("--cases", type=int, default=90, help="engines with one fault (90)")
    made.add_argument("--pairs", type=int, default=20, help="engines with two faults (20)")
    made.add_argument("--clean", type=int, default=200, help="comparisons with real engines (200)")
    made.add_argument("--all", action="store_true", help="every fault in every engine on every file: many hours")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--minutes", type=float, default=0, help="begin nothing more after this time; 0: no limit")
    made.add_argument("--kinds", default=",".join(KINDS), help="of evidence")
    made.add_argument("--engines", default=",".join(ENGINES))
    made.add_argument("--models", default=",".join(MODELS))
    made.add_argument("--only", default="", help="cases whose fault has this in its name")
    made.add_argument("--workers", type=int, default=2, help="processes; 0: none but this one")
    made.add_argument("--verbose", action="store_true", help="a line for every verdict, not only for misses")
    made.add_argument("--json", type=Path, help="write every verdict here")
    made.add_argument("--markdown", type=Path, help="write the tables here, too")
    return made


def main() -> None:
    options = parser().parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers
    with tempfile.TemporaryDirectory(prefix="quantscope-faults-") as folder:
        files = fault_cases.make_files(Path(folder), options.models.split(","))
        one_thread()
        if options.workers:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(options.workers, context, one_thread) as pool:
                report = measured(files, options, pool)
        else:
            report = measured(files, options)
    text = markdown(report)
    print(text)
    if options.json:
        options.json.write_text(json.dumps({"machine": report.machine, "rows": [asdict(row) for row in report.rows]}, indent=1), "utf-8")
    if options.markdown:
        options.markdown.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
