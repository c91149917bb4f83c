"""What one more variant and one more batch cost: the wall time, CPU time and memory of whole studies of growing size.

    python -m benchmarks.scaling [--shape tinyllama-4l] [--variants 1,2,4,8] [--batches 1,2,4,8] [--full] [--runs 1] [--work DIR]

Each cell is one ``quantscope study`` in a process of its own.  By default the first row (variants, with one batch) and the first column
(batches, with one variant) are measured, with ``--full`` every pair.  A batch has ``--batch-chunks`` chunks of ``--ctx`` tokens: fewer than
the plan would take, so that eight of them take minutes; each batch encodes all weights anew, so a token costs more than it does in larger
ones.  Below the table, a least-squares line for each direction and how well it fits.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from statistics import correlation, linear_regression

from benchmarks.measure import Usage, load_average, machine, run, use_cpus
from benchmarks.shaped_model import SHAPES
from benchmarks.study import Setting, emptied, prepare, quantscope_command, warm_up, work_folder
from benchmarks.study_report import MAX_LOAD, MB, QUANTSCOPE, table, validity

# cheap and dear types to encode in turn, so that each number of variants has its share of both
TYPES = ("Q4_0", "Q4_K_M", "Q8_0", "Q5_K_M", "Q5_0", "Q6_K", "Q4_1", "Q3_K_M")
# the command with smaller batches than the plan's own; the first argument is their size in tokens
WITH_BATCH_TOKENS = """
import sys
from quantscope import plan
plan.BATCH_TOKENS = int(sys.argv.pop(1))
plan.SLICE_TOKENS = min(plan.SLICE_TOKENS, plan.BATCH_TOKENS)
from quantscope.cli.main import run
run()
"""


@dataclass(frozen=True)
class Cell:
    """One study; with several runs, the one of median wall time."""

    variants: int
    batches: int
    tokens: int
    usage: Usage


@dataclass(frozen=True)
class Line:
    """y = at_zero + per_x · x by least squares; r2: the part of y's variance that it explains."""

    per_x: float
    at_zero: float
    r2: float


def line(x: Sequence[float], y: Sequence[float]) -> Line:
    """The least-squares line through at least two points of different x and y."""
    per_x, at_zero = linear_regression(x, y)
    return Line(per_x, at_zero, correlation(x, y) ** 2)


def cells_wanted(variants: Sequence[int], batches: Sequence[int], full: bool) -> list[tuple[int, int]]:
    """(variants, batches), the smallest first: all pairs, or those of the first row and column."""
    pairs = [(v, b) for v in variants for b in batches if full or v == variants[0] or b == batches[0]]
    return sorted(pairs, key=lambda pair: ((pair[0] + 1) * pair[1], pair))


def measure_cell(s: Setting, variants: int, batches: int, batch_chunks: int, runs: int) -> Cell:
    """RuntimeError when the study was cut into other batches than asked for."""
    cell = replace(s, types=TYPES[:variants], chunks=batches * batch_chunks)
    prepare(cell)
    usages = []
    for _ in range(runs):
        out = emptied(s.work / "quantscope")
        arguments = quantscope_command(cell, out)[1:]
        code = [sys.executable, "-c", WITH_BATCH_TOKENS, str(batch_chunks * s.ctx)]
        usages.append(run([*code, *arguments], s.log("scaling", variants, f"{batches}-batches"), s.env))
        found = json.loads((out / "study.json").read_text("utf-8"))["plan"]["n_batches"]
        if found != batches:
            raise RuntimeError(f"{batches} batches of {batch_chunks} chunks were wanted, and the plan made {found}: more --memory may do")
    usage = sorted(usages, key=lambda u: u.wall_s)[(runs - 1) // 2]
    return Cell(variants, batches, batches * batch_chunks * s.ctx, usage)


def cells_table(cells: Sequence[Cell]) -> str:
    header = ("variants", "batches", "tokens", "seconds", "CPU seconds", "peak [MB]", "anonymous [MB]", "others' CPUs")
    rows = []
    for cell in sorted(cells, key=lambda c: (c.batches, c.variants)):
        u = cell.usage
        times = (f"{u.wall_s:,.1f}", f"{u.cpu_s:,.1f}")
        sizes = (f"{u.peak_bytes / MB:,.0f}", f"{u.peak_anon_bytes / MB:,.0f}", f"{u.others_cpus:.2f}")
        rows.append([f"{cell.variants}", f"{cell.batches}", f"{cell.tokens:,}", *times, *sizes])
    return table(header, rows)


def lines_table(cells: Sequence[Cell]) -> str:
    """For each row and column of at least two cells: seconds per variant, per 1,000 tokens."""
    rows = []
    for b in sorted({c.batches for c in cells}):
        row = [c for c in cells if c.batches == b]
        rows += _line_rows(f"a variant, {row[0].tokens:,} tokens", row, [c.variants for c in row])
    for v in sorted({c.variants for c in cells}):
        column = [c for c in cells if c.variants == v]
        rows += _line_rows(f"1,000 tokens, {v} variant{'s' if v > 1 else ''}", column, [c.tokens / 1000 for c in column])
    return table(("one more", "of", "seconds", "at zero", "R²"), rows)


def _line_rows(what: str, cells: Sequence[Cell], x: Sequence[float]) -> list[list[str]]:
    if len(cells) < 2:
        return []
    rows = []
    for name, y in (("wall time", [c.usage.wall_s for c in cells]), ("CPU time", [c.usage.cpu_s for c in cells])):
        found = line(x, y)
        rows.append([what, name, f"{found.per_x:.2f}", f"{found.at_zero:.1f}", f"{found.r2:.4f}"])
    return rows


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama-4l", help="default %(default)s")
    parser.add_argument("--variants", default="1,2,4,8", help=f"numbers of variants, at most {len(TYPES)}; default %(default)s")
    parser.add_argument("--batches", default="1,2,4,8", help="numbers of batches; default %(default)s")
    parser.add_argument("--full", action="store_true", help="measure every pair, not only the first row and column")
    parser.add_argument("--runs", type=int, default=1, help="of each cell, the median counts; default %(default)s")
    parser.add_argument("--batch-chunks", type=int, default=2, help="chunks per batch; default %(default)s")
    parser.add_argument("--ctx", type=int, default=512, help="tokens per chunk; default %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="default %(default)s")
    parser.add_argument("--memory", default="2G", help="default %(default)s")
    parser.add_argument("--work", type=Path, help="folder for the model, which is kept; default: a temporary one")
    parser.add_argument("--patience", type=float, default=180, help="seconds to wait for the load to fall first; default %(default)s")
    parser.add_argument("--json", type=Path, help="write all figures there")
    options = parser.parse_args()
    options.variants, options.batches = ([int(n) for n in text.split(",")] for text in (options.variants, options.batches))
    if not 1 <= min(options.variants) <= max(options.variants) <= len(TYPES):
        parser.error(f"--variants: expected numbers from 1 to {len(TYPES)}")
    if min(options.batches) * options.batch_chunks < 2:
        parser.error("--batches and --batch-chunks: a study needs two chunks at least")
    return options


def main() -> None:
    o = parse_arguments()
    load_before = load_average(MAX_LOAD, o.patience)
    use_cpus(o.threads)
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    with work_folder(o.work) as work:
        s = Setting(o.shape, TYPES, o.batch_chunks, o.ctx, o.threads, o.memory, work)
        prepare(s)
        warm_up(s, [QUANTSCOPE])
        cells = []
        for variants, batches in cells_wanted(o.variants, o.batches, o.full):
            cells.append(measure_cell(s, variants, batches, o.batch_chunks, o.runs))
            print(f"{variants} variants, {batches} batches: {cells[-1].usage.wall_s:.1f} s", file=sys.stderr, flush=True)
    print(f"# {o.shape}: cost by variants and tokens\n\n{date}, {o.threads} threads, --memory {o.memory}.\n{machine()}.\n")
    print(f"{cells_table(cells)}\n{lines_table(cells)}")
    print(f"- {validity(load_before, [c.usage for c in cells])}")
    if o.json:
        o.json.write_text(
            json.dumps({"date": date, "load_before": load_before, "cells": [asdict(c) for c in cells]}, indent=1) + "\n", "utf-8"
        )


if __name__ == "__main__":
    main()
