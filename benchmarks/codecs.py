"""Decoding and encoding speed beside ggml's own functions (and gguf-py), in the same run, on the same bytes, at the same number of threads.

    python -m benchmarks.codecs [--types Q4_0,Q4_K] [--mb 64] [--runs 9] [--threads 1,2] [--no-encode | --importance] [--startup]

Figures are GB of float32 per second: what decoding writes and encoding reads.  Every run measures all contestants one after the other,
so a busy machine slows all of them; a ratio is the median over the runs of the ratio within a run.  ggml's functions use one thread;
here they get the same shares of blocks as ours, from the same thread pool.  gguf-py always uses one thread.
Pin single-thread runs with ``taskset -c 0`` on a busy machine.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import gguf
import numpy as np
from gguf.quants import dequantize
from numpy.typing import NDArray

from quantscope.qtypes import QuantType
from quantscope.qtypes import qtype as type_named
from quantscope.quants import CODECS, can_encode, decode, encode, set_threads, thread_count
from quantscope.quants.threads import share_out
from tests.oracle import ggml

DEFAULT_TYPES = "F16,BF16,Q4_0,Q4_1,Q5_0,Q5_1,Q8_0,Q2_K,Q3_K,Q4_K,Q5_K,Q6_K"
ROW = 4096
MEGABYTE = 1_000_000

# (what, types, contestant, least ratio)
TARGETS = (
    ("decode", ("Q4_0", "Q8_0", "Q4_K", "Q6_K"), "ggml", 0.9),
    ("decode", ("Q4_0", "Q8_0", "Q4_K", "Q6_K"), "gguf-py", 5.0),
    ("encode", ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"), "ggml", 1.0),
    ("weighted", ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"), "ggml", 1.0),
)

FIRST_CALL = """
import time
start = time.perf_counter()
import numpy as np
from quantscope.qtypes import QTYPES
from quantscope.quants import decode
imported = time.perf_counter()
for name in {names}:
    decode(np.zeros(QTYPES[name].type_size, np.uint8), QTYPES[name])
print(f"{{imported - start:.2f}} {{time.perf_counter() - imported:.2f}}")
"""


@dataclass(frozen=True)
class Result:
    """What ``doing`` a type reached: GB/s, and how many times as fast as each other contestant."""

    doing: str
    qtype: QuantType
    threads: int
    speed: dict[str, float]
    ratio: dict[str, float]


def measure(doing: str, qtype: QuantType, contestants: dict[str, Callable[[], object]], n_floats: int, runs: int) -> Result:
    """Every contestant once per run, in turn; the first is ours.  One run ahead warms the caches (and compiles)."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for run in range(runs + 1):
        for name, function in contestants.items():
            if name == "gguf-py" and run > 3:
                continue  # slow, and far from the target either way
            start = time.perf_counter()
            function()
            if run:
                seconds[name].append(time.perf_counter() - start)
    ours = seconds["quantscope"]
    speed = {name: 4 * n_floats / median(times) / 1e9 for name, times in seconds.items()}
    ratio = {name: median(t / o for t, o in zip(times, ours, strict=False)) for name, times in seconds.items() if name != "quantscope"}
    return Result(doing, qtype, thread_count(), speed, ratio)


def weights(n: int) -> NDArray[np.float32]:
    """Heavy tails, like trained weights."""
    return (np.random.default_rng(0).standard_t(4, n) * 0.02).astype(np.float32)


def encoded(x: NDArray[np.float32], qtype: QuantType) -> NDArray[np.uint8]:
    """Bytes of this type to decode; random ones where neither we nor ggml encode it without an importance matrix."""
    if can_encode(qtype):
        return encode(x.reshape(-1, ROW), qtype, ROW)
    if ggml.can_quantize(qtype):
        return ggml.quantize(x, qtype, ROW)
    return np.random.default_rng(0).integers(0, 256, qtype.row_bytes(x.size), dtype=np.uint8)


def decoding(x: NDArray[np.float32], qtype: QuantType, runs: int) -> Result:
    raw = encoded(x, qtype)
    ours, theirs = np.empty(x.size, np.float32), np.empty(x.size, np.float32)
    rows = raw.reshape(-1, qtype.row_bytes(ROW))

    def with_ggml(source: NDArray[np.uint8], target: NDArray[np.float32]) -> None:
        ggml.to_float(source.reshape(-1), qtype, target.reshape(-1))

    contestants: dict[str, Callable[[], object]] = {
        "quantscope": lambda: decode(raw, qtype, ours),
        "ggml": lambda: share_out(with_ggml, rows, theirs.reshape(-1, ROW)),
        "gguf-py": lambda: dequantize(rows, gguf.GGMLQuantizationType[qtype.name]),
    }
    result = measure("decode", qtype, contestants, x.size, runs)
    ggml.assert_same_floats(ours, theirs, qtype)
    return result


def encoding(x: NDArray[np.float32], qtype: QuantType, runs: int, importance: NDArray[np.float32] | None = None) -> Result:
    theirs = np.empty(qtype.row_bytes(x.size), np.uint8)
    rows = x.reshape(-1, ROW)

    def with_ggml(source: NDArray[np.float32], target: NDArray[np.uint8]) -> None:
        ggml.quantize(source.reshape(-1), qtype, ROW, target.reshape(-1), importance)

    contestants: dict[str, Callable[[], object]] = {
        "quantscope": lambda: encode(rows, qtype, ROW, importance),
        "ggml": lambda: share_out(with_ggml, rows, theirs.reshape(-1, qtype.row_bytes(ROW))),
    }
    result = measure("encode" if importance is None else "weighted", qtype, contestants, x.size, runs)
    ggml.assert_same_bytes(encode(rows, qtype, ROW, importance), theirs, qtype)
    return result


def weighted_encoding(x: NDArray[np.float32], qtype: QuantType, runs: int) -> Result:
    """Encoding with an importance like that of a trained model's layer."""
    return encoding(x, qtype, runs, np.random.default_rng(1).lognormal(-2, 2, ROW).astype(np.float32))


def machine_line() -> str:
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("numba", "llvmlite", "numpy", "gguf", "llama-cpp-python")
    )
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"{model}, {os.cpu_count()} CPUs, using {thread_count()}{load}; Python {platform.python_version()}, {versions}"


def line(result: Result) -> str:
    speeds = "  ".join(f"{name} {speed:6.2f} GB/s" for name, speed in result.speed.items())
    ratios = "  ".join(f"{ratio:6.2f}× {name}" for name, ratio in result.ratio.items())
    return f"{result.doing}  {result.qtype.name:8} {result.threads} thread{'s' if result.threads > 1 else ' '}  {speeds:62}  {ratios}"


def verdicts(results: list[Result]) -> list[str]:
    """One line per target: the worst ratio over the measured types and numbers of threads."""
    out = []
    for doing, names, other, least in TARGETS:
        found = [r for r in results if r.doing == doing and r.qtype.name in names]
        if found:
            worst = min(found, key=lambda r: r.ratio[other])
            met = "met" if worst.ratio[other] >= least else "MISSED"
            types = ", ".join(dict.fromkeys(r.qtype.name for r in found))
            at = f"{worst.ratio[other]:.2f}× with {worst.qtype} on {worst.threads} thread(s)"
            out.append(f"target {met}: {doing} {types} ≥ {least}× {other}; worst {at}")
    return out


def startup(names: list[str]) -> list[str]:
    """Seconds that a new process needs for `import` and its first decodes, with and without machine code on disk."""
    out = []
    with tempfile.TemporaryDirectory() as folder:
        for cache, selection in (("empty", names), ("warm", names), ("warm", names[:1])):
            environment = {**os.environ, "NUMBA_CACHE_DIR": folder}
            code = FIRST_CALL.format(names=selection)
            found = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
            imported, decoded = found.stdout.split()
            out.append(f"new process, {cache} cache: import {imported} s, first decode of {', '.join(selection)}: {decoded} s")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--types", default=DEFAULT_TYPES, help="comma-separated, or 'all'; default %(default)s")
    parser.add_argument("--mb", type=float, default=64, help="MB of float32 per measurement; default %(default)s")
    parser.add_argument("--runs", type=int, default=9, help="default %(default)s")
    parser.add_argument("--threads", default="1,2", help="default %(default)s")
    parser.add_argument("--no-encode", action="store_true", help="measure decoding only")
    parser.add_argument("--importance", action="store_true", help="measure encoding with a weight per column only")
    parser.add_argument("--startup", action="store_true", help="measure compilation and the first call instead")
    options = parser.parse_args()
    names = list(CODECS) if options.types == "all" else options.types.split(",")
    types = [type_named(name) for name in names if name not in ("F32", "Q8_1", "Q8_K")]  # ggml has no function to compare with

    print(machine_line())
    if options.startup:
        print("\n".join(startup([t.name for t in types])))
        return
    x = weights(max(1, int(options.mb * MEGABYTE / 4 / ROW)) * ROW)
    results: list[Result] = []
    tasks = (weighted_encoding,) if options.importance else (decoding,) if options.no_encode else (decoding, encoding)
    for threads in map(int, options.threads.split(",")):
        set_threads(threads)
        for doing in tasks:
            for qtype in types:
                if doing is decoding or can_encode(qtype):
                    results.append(doing(x, qtype, options.runs))
                    print(line(results[-1]), flush=True)
    print("\n".join(verdicts(results)))


if __name__ == "__main__":
    main()
