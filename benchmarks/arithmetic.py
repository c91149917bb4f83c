"""Prompt processing with emulated ggml arithmetic beside llama.cpp's own, on the same file, in the same run, at the same number of threads.

    python -m benchmarks.arithmetic [--types Q4_0,Q8_0,Q4_K_M,Q6_K,F16] [--tokens 512] [--threads 2] [--rounds 5]

Every round runs llama-bench once and the forward once, exact and emulated, so that a busy machine slows all of them.  ``wall`` is the
best of the rounds; ``CPU`` is what all threads used, also the best, and does not suffer from neighbours.  llama-bench leaves flash
attention off and makes one repetition after its own warm-up; its CPU seconds are those of the whole process, halved.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from benchmarks.llama_programs import llama_program
from benchmarks.measure import load_average, machine, use_cpus
from quantscope.model.arithmetic import EXACT
from quantscope.model.forward import forward
from quantscope.model.ggml_arithmetic import ggml_arithmetic
from quantscope.quants import set_threads
from quantscope.sources.resolve import open_source
from quantscope.weights import Weights

DEMO = Path(__file__).resolve().parents[1] / "quantscope" / "data" / "demo-f16.gguf"
DEFAULT_TYPES = "Q4_0,Q8_0,Q4_K_M,Q6_K,F16"
TARGET = 3.0  # times llama.cpp's seconds


@dataclass
class Times:
    """Best seconds so far: wall clock, and CPU of all threads."""

    wall_s: float = field(default=float("inf"))
    cpu_s: float = field(default=float("inf"))

    def add(self, wall_s: float, cpu_s: float) -> None:
        self.wall_s, self.cpu_s = min(self.wall_s, wall_s), min(self.cpu_s, cpu_s)


def run_llama_bench(model: Path, n_tokens: int, n_threads: int) -> tuple[float, float]:
    """Wall seconds of one prompt, CPU seconds of one (the process does two, one of them to warm up)."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    options = ["-p", str(n_tokens), "-n", "0", "-t", str(n_threads), "-r", "1", "-fa", "0", "-o", "json"]
    done = subprocess.run([llama_program("llama-bench"), "-m", str(model), *options], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return float(json.loads(done.stdout)[0]["samples_ns"][0]) / 1e9, cpu_s / 2


def timed(function: Callable[[], object]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(model: Path, n_tokens: int, n_threads: int, rounds: int) -> dict[str, Times]:
    """The three contestants in turn; one run ahead compiles the kernels and reads the file."""
    weights, ids = Weights(open_source(model)), torch.from_numpy(np.random.default_rng(0).integers(0, 4096, (1, n_tokens)))
    times = {name: Times() for name in ("llama.cpp", "emulated", "exact")}
    contestants = {
        "llama.cpp": lambda: run_llama_bench(model, n_tokens, n_threads),
        "emulated": lambda: timed(lambda: forward(ids, weights, arithmetic=ggml_arithmetic("F16"))),
        "exact": lambda: timed(lambda: forward(ids, weights, arithmetic=EXACT)),
    }
    contestants["emulated"]()
    for _ in range(rounds):
        for name, run in contestants.items():
            times[name].add(*run())
    return times


def quantize(preset: str, folder: Path) -> Path:
    """The demo model as llama-quantize writes it."""
    if preset == "F16":
        return DEMO
    path = folder / f"{preset}.gguf"
    subprocess.run([llama_program("llama-quantize"), str(DEMO), str(path), preset], capture_output=True, check=True)
    return path


def report(preset: str, times: dict[str, Times]) -> str:
    """One line of the table."""
    llama, ours, exact = times["llama.cpp"], times["emulated"], times["exact"]
    wall, cpu = ours.wall_s / llama.wall_s, ours.cpu_s / llama.cpu_s
    seconds = "  ".join(f"{t.wall_s:8.3f} {t.cpu_s:8.3f}" for t in (llama, ours, exact))
    return f"{preset:8} {seconds}  {wall:6.2f} {cpu:6.2f}  {'ok' if min(wall, cpu) <= TARGET else 'above the target'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", default=DEFAULT_TYPES)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    use_cpus(arguments.threads)
    set_threads(arguments.threads)
    torch.set_num_threads(arguments.threads)
    print(f"{machine()}; load average {load_average(float('inf'), 0):.1f}; {arguments.tokens} tokens, {arguments.threads} threads")
    print(f"{'':8} {'llama.cpp':>17}  {'emulated':>17}  {'exact':>17}  {'emulated / llama.cpp':>20}")
    print(f"{'type':8} " + "  ".join(f"{'wall s':>8} {'CPU s':>8}" for _ in range(3)) + f"  {'wall':>6} {'CPU':>6}")
    with tempfile.TemporaryDirectory() as folder:
        for preset in arguments.types.split(","):
            model = quantize(preset, Path(folder))
            print(report(preset, measure(model, arguments.tokens, arguments.threads, arguments.rounds)), flush=True)


if __name__ == "__main__":
    main()
