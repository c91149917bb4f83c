"""Where the time of a command goes: its main thread under cProfile, every function's own time put down to one of a few groups.

A function that GROUPS does not name (a torch builtin, a helper of numpy) counts for the functions that called it, by their shares of its
time.  Threads other than the main one are not seen: what the main thread waits for them counts where it waits.
"""

from __future__ import annotations

import os
import pstats
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.study_report import table

Function = tuple[str, int, str]  # file, line, name, as pstats has them
Shares = dict[str, float]  # group → part of 1
OTHER = "other"
N_TOP = 12  # functions that are listed one by one

# group, part of the file's path, beginnings of function names; the first row that fits counts, "" fits every name, None: its callers' group
GROUPS = (
    ("imports", "", ("<module>",)),
    ("GEMM", "~", ("<built-in method torch._C._nn.linear", "<built-in method torch.matmul")),
    ("attention", "~", ("<built-in method torch._C._nn.scaled_dot_product",)),
    ("attention", "quantscope/model/ops.py", ("causal_attention", "attention_map")),
    ("attention", "quantscope/model/rope.py", ("",)),
    ("decode", "quantscope/quants/__init__.py", ("decode",)),
    ("encode", "quantscope/quants/__init__.py", ("encode",)),
    (None, "quantscope/quants/", ("",)),  # its thread pool is everybody's
    ("decode", "quantscope/images.py", ("decoded",)),
    ("encode", "quantscope/images.py", ("_encode", "encoded")),
    ("tap statistics", "quantscope/tap_stats.py", ("",)),
    ("tap statistics", "quantscope/tap_sums.py", ("",)),
    ("tap statistics", "quantscope/tap_kernel.py", ("",)),
    ("logit sums", "quantscope/logit_sums.py", ("",)),
    ("logit sums", "quantscope/logit_stats.py", ("",)),
    ("norms, SwiGLU, sums", "quantscope/model/ops.py", ("",)),
    ("norms, SwiGLU, sums", "quantscope/model/forward.py", ("",)),
    ("reading the file", "quantscope/sources/", ("",)),
    ("reading the file", "quantscope/weights.py", ("",)),
    ("imports", "<frozen importlib", ("",)),
    (None, "quantscope/metrics.py", ("",)),
    (OTHER, "quantscope/", ("",)),
)


def profiled(command: Sequence[str], file: Path, env: Mapping[str, str]) -> str:
    """Run a Python script under cProfile and return the tables of its groups and of its most expensive functions, in Markdown."""
    traced = [sys.executable, "-m", "cProfile", "-o", str(file), *command]
    subprocess.run(traced, env={**os.environ, **env}, check=True, stdout=subprocess.DEVNULL)
    stats: dict[Function, Any] = pstats.Stats(str(file)).stats  # type: ignore[attr-defined]
    whole = sum(own for _, _, own, _, _ in stats.values())
    groups = sorted(group_seconds(stats).items(), key=lambda item: -item[1])
    functions = sorted(stats.items(), key=lambda item: -item[1][2])[:N_TOP]
    by_group = table(("main thread", "seconds", "share"), [(name, f"{s:,.1f}", f"{s / whole:.1%}") for name, s in groups])
    by_function = table(
        ("function", "own seconds", "calls"),
        [(_title(function), f"{own:,.1f}", f"{calls:,}") for function, (_, calls, own, _, _) in functions],
    )
    return f"{by_group}\n{by_function}"


def group_seconds(stats: Mapping[Function, Any]) -> dict[str, float]:
    """Own seconds of all functions by group.  stats: as in ``pstats.Stats``: function → (calls, calls, own, cumulative, callers)."""
    known: dict[Function, Shares] = {}
    out: dict[str, float] = {}
    for function, (_, _, own, _, _) in stats.items():
        for name, share in _shares(function, stats, known, frozenset()).items():
            out[name] = out.get(name, 0.0) + own * share
    return out


def _shares(function: Function, stats: Mapping[Function, Any], known: dict[Function, Shares], above: frozenset[Function]) -> Shares:
    """The groups that a function's own time belongs to."""
    if function not in known:
        name = group_of(function)
        known[function] = {name: 1.0} if name else _callers_shares(function, stats, known, above | {function})
    return known[function]


def _callers_shares(function: Function, stats: Mapping[Function, Any], known: dict[Function, Shares], above: frozenset[Function]) -> Shares:
    """The mean of its callers' groups, weighted by the time it spent for each; callers in a circle count for nothing."""
    spent = {caller: times[2] for caller, times in stats[function][4].items() if caller not in above and caller in stats}
    whole = sum(spent.values())
    if not whole:
        return {OTHER: 1.0}
    out: Shares = {}
    for caller, seconds in spent.items():
        for name, share in _shares(caller, stats, known, above).items():
            out[name] = out.get(name, 0.0) + share * seconds / whole
    return out


def group_of(function: Function) -> str | None:
    file, _, name = function
    for group, where, names in GROUPS:
        if where in file and name.startswith(names):
            return group
    return None


def _title(function: Function) -> str:
    file, line, name = function
    return name if file == "~" else f"{Path(file).name}:{line} {name}"
