"""The whole quantization study beside llama.cpp's own programs: the same file, text and types, in one run, on the same CPUs.

    python -m benchmarks.study [--shape tinyllama|7b] [--types Q4_0,...] [--chunks 16] [--ctx 512] [--threads 2] [--memory 2G]
                               [--work DIR] [--only quantscope|llama.cpp] [--order llama.cpp,quantscope] [--json FILE] [--profile]

llama.cpp: a base run of llama-perplexity that writes the logits, then for each type llama-quantize and a comparing run; one quantized file
at a time.  quantscope: one ``quantscope study``, which also gives the statistics of every operation.  A side may come several times in
``--order`` (quantscope,llama.cpp,quantscope), so that a drift of the machine meets both; its totals are then the means of its rounds.

A run counts only when nothing else was running; the last lines say so, and whether the targets of the project were met.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from benchmarks.llama_programs import llama_program, version
from benchmarks.measure import load_average, machine, run, tree_bytes, use_cpus
from benchmarks.profile_groups import profiled
from benchmarks.shaped_model import SHAPES
from benchmarks.study_report import LLAMA_CPP, MAX_LOAD, QUANTSCOPE, Found, Report, Step, markdown, parse_perplexity, parse_study

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_TYPES = "Q4_0,Q4_K_M,Q5_K_M,Q6_K,Q8_0"
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
Say = Callable[[Step], None]


@dataclass(frozen=True)
class Setting:
    """What is measured, and the folder of all its files."""

    shape: str
    types: tuple[str, ...]
    chunks: int
    ctx: int
    threads: int
    memory: str
    work: Path

    @property
    def model(self) -> Path:
        return self.work / f"{self.shape}-f16.gguf"

    @property
    def text(self) -> Path:
        return self.work / f"text-{self.n_tokens}.txt"

    @property
    def n_tokens(self) -> int:
        return max(2, self.chunks) * self.ctx  # neither side takes a text of one chunk

    @property
    def env(self) -> dict[str, str]:
        return dict.fromkeys(THREAD_VARIABLES, str(self.threads))

    def log(self, side: str, number: int, name: str) -> Path:
        return self.work / "logs" / f"{side}-{number}-{name.replace(' ', '-')}.txt"


def llama_round(s: Setting, number: int, say: Say) -> tuple[list[Step], Found]:
    """The base run, then each type: quantize, compare, delete."""
    folder = emptied(s.work / "llama.cpp")
    quantized, steps, found = folder / "quantized.gguf", list[Step](), Found()

    def step(name: str, *command: str) -> str:
        before, log = tree_bytes(folder), s.log(LLAMA_CPP, number, name)
        usage = run(command, log, s.env)
        steps.append(Step(LLAMA_CPP, number, name, usage, tree_bytes(folder) - before))
        say(steps[-1])
        return log.read_text("utf-8", "replace")

    perplexity = [llama_program("llama-perplexity"), "-c", str(s.ctx), "-t", str(s.threads)]
    perplexity += ["--kl-divergence-base", str(folder / "logits.kld")]
    step("base run", *perplexity, "-m", str(s.model), "-f", str(s.text), "--chunks", str(s.chunks))
    for kind in s.types:
        step(f"quantize {kind}", llama_program("llama-quantize"), str(s.model), str(quantized), kind, str(s.threads))
        found[kind] = parse_perplexity(step(f"compare {kind}", *perplexity, "-m", str(quantized), "--kl-divergence"))
        quantized.unlink()
    shutil.rmtree(folder)
    return steps, found


def quantscope_round(s: Setting, number: int, say: Say) -> tuple[list[Step], Found]:
    """One command."""
    out = emptied(s.work / "quantscope")  # a finished study would only be shown again
    usage = run([sys.executable, *quantscope_command(s, out)], s.log(QUANTSCOPE, number, "study"), s.env)
    step = Step(QUANTSCOPE, number, "study", usage, tree_bytes(out))
    say(step)
    return [step], parse_study(json.loads((out / "study.json").read_text("utf-8")))


ROUNDS = {LLAMA_CPP: llama_round, QUANTSCOPE: quantscope_round}


def quantscope_command(s: Setting, out: Path) -> list[str]:
    """The console script beside this Python, and its arguments."""
    script = str(Path(sys.executable).with_name("quantscope"))
    sizes = ["--ctx", str(s.ctx), "--chunks", str(s.chunks), "--memory", s.memory]
    return [script, "study", str(s.model), "--types", ",".join(s.types), "--text", str(s.text), *sizes, "--out", str(out)]


def emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def prepare(s: Setting) -> None:
    """Write the model and the text where they are missing, in a process of their own: this one must stay small (``measure.run``)."""
    s.work.mkdir(parents=True, exist_ok=True)
    check_disk(s)
    writer = [sys.executable, "-m", "benchmarks.shaped_model", s.shape, str(s.model)]
    subprocess.run([*writer, "--text", str(s.text), "--tokens", str(s.n_tokens)], cwd=ROOT, check=True, stdout=sys.stderr)
    with s.model.open("rb") as file:  # into the page cache: the first side is not to wait for the disk alone
        while file.read(1 << 20):
            pass


def check_disk(s: Setting) -> None:
    """SystemExit unless there is room for the F16 file, the largest quantized one, and llama.cpp's logits of 16 bits each."""
    n_values = sum(math.prod(dims) for _, dims in SHAPES[s.shape].tensors())
    needed = int(1.1 * n_values) + s.chunks * s.ctx * SHAPES[s.shape].n_vocab
    needed += 0 if s.model.is_file() else 2 * n_values
    free = shutil.disk_usage(s.work).free
    if free < needed:
        sys.exit(f"{s.work}: {free / 1e9:.1f} GB are free, and this run needs {needed / 1e9:.1f} GB. Name another folder with --work.")


def warm_up(s: Setting, sides: Sequence[str]) -> None:
    """Each side once on a tiny model: compiles quantscope's kernels where that was not done yet, and shows at once what does not work."""
    with tempfile.TemporaryDirectory(dir=s.work) as folder:
        tiny = replace(s, shape="tiny", chunks=2, work=Path(folder))
        prepare(tiny)
        for side in sides:
            ROUNDS[side](tiny, 0, lambda step: None)


def measured(s: Setting, order: Sequence[str], load_before: float) -> Report:
    """One round after the other."""
    date, steps, found = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"), list[Step](), dict[str, Found]()
    for i, side in enumerate(order):
        more, found[side] = ROUNDS[side](s, 1 + order[:i].count(side), show)
        steps += more
    where = machine() + (f", llama.cpp {version()}" if LLAMA_CPP in order else "")
    return Report(
        date=date,
        machine=where,
        shape=s.shape,
        types=s.types,
        chunks=s.chunks,
        ctx=s.ctx,
        threads=s.threads,
        memory=s.memory,
        model_bytes=s.model.stat().st_size,
        load_before=load_before,
        steps=tuple(steps),
        found=found,
    )


def show(step: Step) -> None:
    print(f"{step.side}, {step.name}: {step.usage.wall_s:.1f} s, {step.usage.peak_bytes / 1e6:,.0f} MB", file=sys.stderr, flush=True)


@contextmanager
def work_folder(given: Path | None) -> Iterator[Path]:
    """The folder given, which is kept, or a temporary one."""
    if given is not None:
        yield given.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="quantscope-benchmark-") as folder:
        yield Path(folder)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama")
    parser.add_argument("--types", default=DEFAULT_TYPES, help="default %(default)s")
    parser.add_argument("--chunks", type=int, default=16, help="default %(default)s")
    parser.add_argument("--ctx", type=int, default=512, help="tokens per chunk; default %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="of both sides; default %(default)s")
    parser.add_argument("--memory", default="2G", help="quantscope's bound; default %(default)s")
    parser.add_argument("--work", type=Path, help="folder for the model and the logs, which are kept; default: a temporary one")
    parser.add_argument("--only", choices=ROUNDS, help="measure one side")
    parser.add_argument("--order", default=f"{LLAMA_CPP},{QUANTSCOPE}", help="of the rounds; default %(default)s")
    parser.add_argument("--patience", type=float, default=180, help="seconds to wait for the load to fall first; default %(default)s")
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--no-warm-up", action="store_true", help="do not try the sides on a tiny model first")
    parser.add_argument("--profile", action="store_true", help="run quantscope's side once more under cProfile: where its time goes")
    options = parser.parse_args()
    options.order = [options.only] if options.only else options.order.split(",")
    if not set(options.order) <= set(ROUNDS):
        parser.error(f"--order {','.join(options.order)}: expected {' and '.join(ROUNDS)}, as often as you like")
    return options


def main() -> None:
    options = parse_arguments()
    load_before = load_average(MAX_LOAD, options.patience)  # before anything of ours adds to it
    use_cpus(options.threads)
    with work_folder(options.work) as work:
        types = tuple(options.types.split(","))
        s = Setting(options.shape, types, options.chunks, options.ctx, options.threads, options.memory, work)
        prepare(s)
        if not options.no_warm_up:
            warm_up(s, options.order)
        report = measured(s, options.order, load_before)
        print(markdown(report))
        if options.json:
            options.json.write_text(json.dumps(asdict(report), indent=1) + "\n", "utf-8")
        if options.profile:
            print(profiled(quantscope_command(s, emptied(work / "profiled")), work / "profile.pstats", s.env))


if __name__ == "__main__":
    main()
