"""A study on the GPU beside the same study on the CPU, and the codecs' throughput on both.

    python -m benchmarks.cuda [--types Q4_0,...] [--mb 512] [--runs 5] [--shapes demo,tinyllama] [--presets Q4_0,...] [--chunks 4]
                              [--ctx 512] [--memory 4G] [--rounds 2] [--device cuda] [--work DIR] [--json FILE]

Codecs: GB of float32 per second, what encoding reads and decoding writes, the median of the runs; on the GPU from its memory to its
memory (``torch_codecs``), on the CPU with all its threads (the numba kernels).  Both must give the same bits.

Studies: the whole command in a process of its own, each device in turn, the median of the rounds; and by how much the figures of the two
differ.  Shapes: ``demo``, the bundled model, or one of ``benchmarks.shaped_model``.  Each side runs the demo model once ahead, which
compiles the kernels.  ``--device cpu`` compares the CPU with itself, to try the benchmark where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benchmarks.measure import Usage, run
from benchmarks.shaped_model import DEMO_TEXT, SHAPES
from benchmarks.study import ROOT, emptied, work_folder
from benchmarks.study_report import MB, table
from quantscope.qtypes import QuantType
from quantscope.qtypes import qtype as type_named
from quantscope.quants import decode, encode, thread_count, torch_codecs
from quantscope.results import Study

DEFAULT_PRESETS = "Q4_0,Q4_K_M,Q5_K_M,Q6_K,Q8_0"
DEMO = "demo"
ROW = 4096
CPU = "cpu"

# arguments: where to write, then those of quantscope
RUN_AND_TELL = """
import json, sys, torch
from pathlib import Path
from quantscope.cli.main import main
code = main(sys.argv[2:])
used = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if torch.cuda.is_initialized() else (0, 0)
Path(sys.argv[1]).write_text(json.dumps(used))
sys.exit(code)
"""


@dataclass(frozen=True)
class Speed:
    """GB of float32 per second of one codec on the device and on the CPU."""

    doing: str
    name: str
    device: float
    cpu: float


@dataclass(frozen=True)
class Setting:
    """One study."""

    shape: str
    presets: tuple[str, ...]
    chunks: int
    ctx: int
    memory: str
    work: Path

    @property
    def model(self) -> Path:
        return DEMO_TEXT.with_name("demo-f16.gguf") if self.shape == DEMO else self.work / f"{self.shape}-f16.gguf"

    @property
    def text(self) -> Path:
        return DEMO_TEXT if self.shape == DEMO else self.work / f"text-{self.n_tokens}.txt"

    @property
    def n_tokens(self) -> int:
        return max(2, self.chunks) * self.ctx  # a text of one chunk is not taken


@dataclass(frozen=True)
class Run:
    """One study on one device; the bytes are of the GPU's memory: of tensors, and what torch took from the driver for them."""

    usage: Usage
    allocated_bytes: int
    reserved_bytes: int
    study: Study


@dataclass(frozen=True)
class Outcome:
    """A study on both devices.  differences: ``largest_differences``."""

    shape: str
    model_bytes: int
    presets: tuple[str, ...]
    chunks: int
    ctx: int
    memory: str
    usages: dict[str, list[Usage]]  # by device
    allocated_bytes: int
    reserved_bytes: int
    kl_nats: dict[str, dict[str, float]]  # by device, by preset
    differences: dict[str, float]


# ---- Codecs --------------------------------------------------------------------------------------------------------------------------


def speeds(names: Sequence[str], n_bytes: float, runs: int, device: str) -> Iterator[Speed]:
    """Encoding, then decoding, of each type; SystemExit where the device's bits are not the CPU's."""
    n = max(1, int(n_bytes / 4 / ROW)) * ROW
    x = (np.random.default_rng(0).standard_t(4, n) * 0.02).astype(np.float32).reshape(-1, ROW)  # heavy tails, like trained weights
    there = torch.from_numpy(x).to(device)
    for name in names:
        qtype = type_named(name)
        raw, raw_there = encode(x, qtype, ROW), torch_codecs.encode(there, qtype)
        check_same(raw, raw_there, qtype, "bytes")
        out = np.empty(n, np.float32)
        check_same(decode(raw, qtype, out).view(np.uint8), torch_codecs.decode(raw_there, qtype).view(torch.uint8), qtype, "values")
        for doing, ours, cpus in (
            ("encode", lambda t=qtype: torch_codecs.encode(there, t), lambda t=qtype: encode(x, t, ROW)),
            ("decode", lambda t=qtype, r=raw_there: torch_codecs.decode(r, t), lambda t=qtype, r=raw, o=out: decode(r, t, o)),
        ):
            yield Speed(doing, name, *(4 * n / seconds(function, runs, where) / 1e9 for function, where in ((ours, device), (cpus, CPU))))


def check_same(cpus: np.ndarray, devices: torch.Tensor, qtype: QuantType, what: str) -> None:
    n_wrong = int((devices.cpu().numpy() != cpus.reshape(-1)).sum())
    if n_wrong:
        sys.exit(f"{qtype}: {n_wrong:,} of {cpus.size:,} bytes of the {what} are not the CPU's. The figures would be of wrong codecs.")


def seconds(function: Callable[[], object], runs: int, device: str) -> float:
    """The median; one run ahead warms the caches."""
    times = []
    for _ in range(runs + 1):
        wait_for(device)
        start = time.perf_counter()
        function()
        wait_for(device)
        times.append(time.perf_counter() - start)
    return median(times[1:])


def wait_for(device: str) -> None:
    """Work on a GPU goes on after the call that began it has returned."""
    if device != CPU:
        torch.cuda.synchronize(device)


# ---- Studies -------------------------------------------------------------------------------------------------------------------------


def study_on(s: Setting, device: str) -> Run:
    """One command, in a process of its own."""
    out, told = emptied(s.work / "study"), s.work / "told.json"
    sizes = ["--ctx", str(s.ctx), "--chunks", str(s.chunks), "--memory", s.memory]
    command = ["study", str(s.model), "--types", ",".join(s.presets), "--text", str(s.text), *sizes, "--device", device, "--out", str(out)]
    usage = run([sys.executable, "-c", RUN_AND_TELL, str(told), *command], s.work / "logs" / f"{s.shape}-{device}.txt")
    print(f"{s.shape}, {device}: {usage.wall_s:.1f} s, {usage.peak_bytes / MB:,.0f} MB", file=sys.stderr, flush=True)
    allocated, reserved = json.loads(told.read_text("utf-8"))
    return Run(usage, allocated, reserved, Study.from_json(json.loads((out / "study.json").read_text("utf-8"))))


def compared(s: Setting, device: str, rounds: int) -> Outcome:
    """Both devices, one after the other."""
    runs: dict[str, list[Run]] = {device: [], CPU: []}
    for _ in range(rounds):
        for where in (CPU, device):
            runs[where].append(study_on(s, where))
    ours, theirs = (runs[where][-1] for where in (device, CPU))
    return Outcome(
        shape=s.shape,
        model_bytes=s.model.stat().st_size,
        presets=s.presets,
        chunks=s.chunks,
        ctx=s.ctx,
        memory=s.memory,
        usages={where: [r.usage for r in own] for where, own in runs.items()},
        allocated_bytes=max(r.allocated_bytes for r in runs[device]),
        reserved_bytes=max(r.reserved_bytes for r in runs[device]),
        kl_nats={where: mean_kl(r.study) for where, r in ((device, ours), (CPU, theirs))},
        differences=largest_differences(ours.study, theirs.study),
    )


def prepare(s: Setting) -> None:
    """Write the model and the text where they are missing, in a process of their own: this one must stay small (``measure.run``)."""
    if s.shape != DEMO:
        writer = [sys.executable, "-m", "benchmarks.shaped_model", s.shape, str(s.model)]
        subprocess.run([*writer, "--text", str(s.text), "--tokens", str(s.n_tokens)], cwd=ROOT, check=True, stdout=sys.stderr)


def mean_kl(study: Study) -> dict[str, float]:
    return {v.name: v.logits.kl_nats for v in study.variants if v.logits is not None and v.logits.kl_nats is not None}


def largest_differences(ours: Study, theirs: Study) -> dict[str, float]:
    """The largest |a − b| / |b| over the variants (and taps) of each figure; b is the CPU's.  same top: |a − b|, of fractions."""
    pairs = list(zip(ours.variants, theirs.variants, strict=True))
    logits = [(a.logits, b.logits) for a, b in pairs if a.logits is not None and b.logits is not None]
    ops = [rows for a, b in pairs for rows in zip(a.ops, b.ops, strict=True)]
    return {
        "KL": max(relative(a.kl_nats, b.kl_nats) for a, b in logits),
        "PPL": max(relative(a.ppl, b.ppl) for a, b in logits),
        "NMSE of a tap": max(relative(a.nmse, b.nmse) for a, b in ops),
        "RMS of a tap": max(relative(a.rms, b.rms) for a, b in ops),
        "same top": max(abs((a.top1_agree or 0.0) - (b.top1_agree or 0.0)) for a, b in logits),
    }


def relative(a: float | None, b: float | None) -> float:
    """|a − b| / |b|; 0 where neither is there or both are 0."""
    if a == b:
        return 0.0
    return abs(a - b) / abs(b) if a is not None and b else float("inf")


# ---- Report --------------------------------------------------------------------------------------------------------------------------


def speed_table(found: Sequence[Speed], device: str) -> str:
    rows = ([f"{s.doing} {s.name}", f"{s.device:.2f}", f"{s.cpu:.2f}", f"{s.device / s.cpu:.1f}"] for s in found)
    return table([f"GB/s of float32, all {thread_count()} threads", device, CPU, "ratio"], rows)


def outcome_table(found: Sequence[Outcome], device: str) -> str:
    rows: list[list[str]] = []
    for o in found:
        own, cpus = (median(u.wall_s for u in o.usages[where]) for where in (device, CPU))
        spread = "; ".join(", ".join(f"{u.wall_s:.1f}" for u in o.usages[where]) for where in (device, CPU))
        sizes = (max(u.peak_bytes for u in o.usages[where]) for where in (device, CPU))
        gpu = f"{o.allocated_bytes / MB:,.0f} ({o.reserved_bytes / MB:,.0f})"
        head = f"{o.shape}, {o.chunks} × {o.ctx}"
        rows.append([head, f"{own:.1f}", f"{cpus:.1f}", f"{cpus / own:.2f}", spread, gpu, *(f"{n / MB:,.0f}" for n in sizes)])
    header = (
        "study",
        f"{device} [s]",
        "cpu [s]",
        "ratio",
        "each round",
        "peak on the GPU: tensors (taken) [MB]",
        f"peak RSS {device} [MB]",
    )
    return table([*header, "cpu [MB]"], rows)


def agreement_table(found: Sequence[Outcome]) -> str:
    names = list(found[0].differences)
    return table(["largest relative difference", *names], ([o.shape, *(f"{o.differences[n]:.1e}" for n in names)] for o in found))


def machine_line(device: str) -> str:
    cpus = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines() if "model name" in line]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "numba"))
    parts = [f"{cpus[0] if cpus else platform.machine()}, {os.cpu_count()} CPUs; Python {platform.python_version()}, {versions}"]
    if device != CPU:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()[0]
        parts.insert(0, f"{torch.cuda.get_device_name(device)}, driver {driver}, CUDA {torch.version.cuda}")
    return "; ".join(parts)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--types", default=",".join(torch_codecs.TORCH_TYPES), help="of the codecs; '' for none; default %(default)s")
    parser.add_argument("--mb", type=float, default=512, help="MB of float32 per measurement of a codec; default %(default)s")
    parser.add_argument("--runs", type=int, default=5, help="of each codec; default %(default)s")
    parser.add_argument("--shapes", default=f"{DEMO},tinyllama", help=f"of {DEMO}, {', '.join(SHAPES)}; '' for none; default %(default)s")
    parser.add_argument("--presets", default=DEFAULT_PRESETS, help="of the studies; default %(default)s")
    parser.add_argument("--chunks", type=int, default=4, help="default %(default)s")
    parser.add_argument("--ctx", type=int, default=512, help="tokens per chunk; default %(default)s")
    parser.add_argument("--memory", default="4G", help="bound of both sides; default %(default)s")
    parser.add_argument("--rounds", type=int, default=2, help="of each study; default %(default)s")
    parser.add_argument("--device", choices=("cuda", CPU), default="cuda", help="default %(default)s")
    parser.add_argument("--work", type=Path, help="folder for the models and the logs, which are kept; default: a temporary one")
    parser.add_argument("--json", type=Path, help="write all figures there")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    presets = tuple(options.presets.split(","))
    outcomes: list[Outcome] = []
    with work_folder(options.work) as work:
        work.mkdir(parents=True, exist_ok=True)
        for shape in filter(None, options.shapes.split(",")):
            s = Setting(shape, presets, options.chunks, options.ctx, options.memory, work)
            prepare(s)
            if not outcomes:
                for device in (options.device, CPU):
                    study_on(Setting(DEMO, presets, 1, 64, options.memory, work), device)
            outcomes.append(compared(s, options.device, options.rounds))
            print(outcome_table(outcomes[-1:], options.device), agreement_table(outcomes[-1:]), sep="\n", flush=True)
    found: list[Speed] = []
    for speed in speeds([t for t in options.types.split(",") if t], options.mb * MB, options.runs, options.device):
        found.append(speed)
        print(f"{speed.doing} {speed.name}: {speed.device:.2f} GB/s, cpu {speed.cpu:.2f} GB/s", file=sys.stderr, flush=True)
    where = machine_line(options.device)  # not earlier: a child counts as large as this process, and a GPU's context is large
    if found:
        print(speed_table(found, options.device))
    print(where)
    if options.json:
        figures = {"machine": where, "speeds": [asdict(s) for s in found], "studies": [asdict(o) for o in outcomes]}
        options.json.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
