"""What a process costs: seconds, CPU seconds, peak memory, and how busy the machine was with other things meanwhile.  Linux only.

    usage = run(["llama-quantize", ...], log=Path("step.log"))

Peak memory is the kernel's own figure for the process (``ru_maxrss``).  It counts the pages of memory-mapped files that are resident, which
the kernel may drop at any time, so the peaks of anonymous and of file pages are also sampled, 50 times a second.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SAMPLE_S = 0.02
TAIL = 2000  # characters of the output of a failed process that are shown
PACKAGES = ("quantscope", "torch", "numpy", "numba", "llama-cpp-python")


@dataclass(frozen=True)
class Usage:
    """One finished process.  Its anonymous and file peaks need not be of the same moment."""

    wall_s: float
    cpu_s: float  # user and system
    peak_bytes: int
    peak_anon_bytes: int
    peak_file_bytes: int
    others_cpus: float  # CPUs that were busy with something else (the hypervisor's other guests included), on average


class Sampler(threading.Thread):
    """Follows the resident memory of a process, anonymous and file pages apart, until ``finish``."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.path, self.done = Path(f"/proc/{pid}/status"), threading.Event()
        self.peaks = {"RssAnon": 0, "RssFile": 0}  # [bytes]

    def run(self) -> None:
        while not self.done.wait(SAMPLE_S):
            try:
                now = status_bytes(self.path.read_text("ascii", "replace"))
            except OSError:  # it has ended
                return
            self.peaks = {key: max(peak, now.get(key, 0)) for key, peak in self.peaks.items()}

    def finish(self) -> None:
        self.done.set()
        self.join()


def run(command: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> Usage:
    """Run a command to its end, its output into ``log``.  RuntimeError with the end of the output when it fails.

    Call it from a small process: until it executes the command, a child counts as large as its parent.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    before, start = _busy_and_own_s(), time.perf_counter()
    with log.open("wb") as out:
        child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})})
        sampler = Sampler(child.pid)
        sampler.start()
        try:
            _, status, used = os.wait4(child.pid, 0)
        except BaseException:
            child.kill()
            raise
        child.returncode = os.waitstatus_to_exitcode(status)
    wall_s = time.perf_counter() - start
    after = _busy_and_own_s()
    sampler.finish()
    if child.returncode:
        tail = log.read_text("utf-8", "replace")[-TAIL:]
        raise RuntimeError(f"exit code {child.returncode}: {' '.join(command)}\n{tail}")
    cpu_s = used.ru_utime + used.ru_stime
    others_s = (after[0] - before[0]) - (after[1] - before[1]) - cpu_s
    peaks = sampler.peaks
    return Usage(wall_s, cpu_s, used.ru_maxrss * 1024, peaks["RssAnon"], peaks["RssFile"], max(0.0, others_s / wall_s))


def status_bytes(text: str) -> dict[str, int]:
    """``RssAnon:     1234 kB`` and its like in /proc/PID/status → bytes by name."""
    rows = (line.split() for line in text.splitlines())
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if len(row) == 3 and row[2] == "kB"}


def busy_ticks(stat: str) -> int:
    """Clock ticks that all CPUs of this machine were not idle or waiting for a disk, from the text of /proc/stat."""
    user, nice, system, _, _, irq, softirq, steal = map(int, stat.splitlines()[0].split()[1:9])
    return user + nice + system + irq + softirq + steal


def _busy_and_own_s() -> tuple[float, float]:
    """Seconds the machine's CPUs were busy since it started, and those of this very process."""
    ticks = busy_ticks(Path("/proc/stat").read_text("ascii"))
    return ticks / os.sysconf("SC_CLK_TCK"), time.process_time()


def tree_bytes(folder: Path) -> int:
    """The sum of the sizes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def use_cpus(n: int) -> None:
    """Let this process and its children run on n CPUs only, so that a program which ignores its thread option gains nothing."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:n])


def load_average(limit: float, patience_s: float) -> float:
    """The load average of the last minute, once it is below the limit, or when patience is at an end: what ended just now still counts."""
    end = time.monotonic() + patience_s
    while (load := os.getloadavg()[0]) > limit and time.monotonic() < end:
        time.sleep(2)
    return load


def machine() -> str:
    """CPU, number of CPUs in use, memory, system and versions, for the head of a report."""
    info = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    cpu = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), platform.machine())
    flags = next((set(line.split(":")[1].split()) for line in info if line.startswith("flags")), set())
    simd = next((name for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in flags), "no AVX2")
    memory = status_bytes(Path("/proc/meminfo").read_text("ascii"))["MemTotal"]
    packages = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    return (
        f"{cpu} ({simd}), {len(os.sched_getaffinity(0))} of {os.cpu_count()} CPUs, {memory / 2**30:.1f} GiB, Linux {platform.release()}; "
        f"Python {platform.python_version()}, {packages}"
    )
