"""The figures of ``benchmarks.study``: what was measured, as plain data, and its tables and verdicts in Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from benchmarks.measure import Usage

QUANTSCOPE, LLAMA_CPP = "quantscope", "llama.cpp"
MAX_LOAD, MAX_OTHERS = 0.5, 0.1  # load average before, CPUs busy with other things during the run
MAX_WALL_RATIO, MAX_PEAK_BYTES, MAX_PEAK_SHARE, MAX_DISK_BYTES = 1.0, 2e9, 0.25, 50e6  # the project's targets
LARGE_BYTES = 10e9  # a file from here on has its memory target as a share of its size
MB = 1e6


@dataclass(frozen=True)
class Comparison:
    """What one side found out about one type; None where it gave nothing.  rms_dp and top1_agree are fractions."""

    ppl: float | None = None
    base_ppl: float | None = None
    kl_nats: float | None = None
    kl_nats_se: float | None = None
    kl_nats_max: float | None = None
    rms_dp: float | None = None
    top1_agree: float | None = None


@dataclass(frozen=True)
class Step:
    """One process of one side; ``round`` counts the rounds of that side from 1."""

    side: str
    round: int
    name: str
    usage: Usage
    written_bytes: int


Found = dict[str, Comparison]  # by type

# field of Comparison → what llama-perplexity --kl-divergence writes before its value, and the unit of that
PRINTED = {
    "ppl": (r"Mean PPL\(Q\) *:", 1.0),
    "base_ppl": (r"Mean PPL\(base\) *:", 1.0),
    "kl_nats": (r"Mean +KLD:", 1.0),
    "kl_nats_se": (r"Mean +KLD: +\S+ +±", 1.0),
    "kl_nats_max": (r"Maximum KLD:", 1.0),
    "rms_dp": (r"RMS Δp *:", 0.01),
    "top1_agree": (r"Same top p:", 0.01),
}
COLUMNS = {
    "ppl": ("PPL", "{:.4f}"),
    "base_ppl": ("PPL F16", "{:.4f}"),
    "kl_nats": ("KL [nats]", "{:.4g}"),
    "kl_nats_se": ("±", "{:.2g}"),
    "kl_nats_max": ("max KL", "{:.3g}"),
    "rms_dp": ("RMS Δp", "{:.2g}"),
    "top1_agree": ("same top", "{:.2%}"),
}


@dataclass(frozen=True)
class Report:
    """Everything one run of the benchmark found."""

    date: str
    machine: str
    shape: str
    types: tuple[str, ...]
    chunks: int
    ctx: int
    threads: int
    memory: str
    model_bytes: int
    load_before: float
    steps: tuple[Step, ...]
    found: Mapping[str, Found]  # by side, of its last round

    def rounds(self, side: str) -> list[list[Step]]:
        own = [s for s in self.steps if s.side == side]
        return [[s for s in own if s.round == n] for n in sorted({s.round for s in own})]

    def total(self, side: str, of: Callable[[Step], float], join: Callable[[Iterable[float]], float] = sum) -> float:
        """The mean over the side's rounds of the sum (or another ``join``) over the steps of a round."""
        rounds = self.rounds(side)
        return sum(join(of(step) for step in steps) for steps in rounds) / len(rounds)


def wall_s(step: Step) -> float:
    return step.usage.wall_s


def peak_bytes(step: Step) -> float:
    return step.usage.peak_bytes


def written_bytes(step: Step) -> float:
    return step.written_bytes


Total = tuple[str, str, Callable[[Step], float], Callable[[Iterable[float]], float], float]
TOTALS: tuple[Total, ...] = (
    ("wall time [s]", "{:,.1f}", wall_s, sum, 1),
    ("CPU time [s]", "{:,.1f}", lambda step: step.usage.cpu_s, sum, 1),
    ("peak memory [MB]", "{:,.0f}", peak_bytes, max, MB),
    ("peak of anonymous pages [MB]", "{:,.0f}", lambda step: step.usage.peak_anon_bytes, max, MB),
    ("written to disk [MB]", "{:,.1f}", written_bytes, sum, MB),
)


def parse_perplexity(printed: str) -> Comparison:
    """The statistics in the output of ``llama-perplexity --kl-divergence``."""
    values = {}
    for field, (label, unit) in PRINTED.items():
        hit = re.search(rf"^{label} +(\S+)", printed, re.MULTILINE)
        values[field] = None if hit is None else float(hit[1].rstrip("%")) * unit
    return Comparison(**values)


def parse_study(document: Mapping[str, Any]) -> Found:
    """The same from the content of a study.json."""
    logits = {v["name"]: v["logits"] for v in document["variants"]}
    base = logits.pop(document["original"])
    own = [f.name for f in fields(Comparison) if f.name != "base_ppl"]
    return {name: Comparison(base_ppl=base["ppl"], **{f: values[f] for f in own}) for name, values in logits.items()}


def markdown(r: Report) -> str:
    scored = r.chunks * (r.ctx - 1 - r.ctx // 2)
    head = (
        f"# {r.shape}, {r.model_bytes / 1e9:.2f} GB of F16, as {', '.join(r.types)}\n\n{r.date}, {r.chunks} chunks of {r.ctx} tokens, "
        f"{scored:,} of them scored; {r.threads} threads, quantscope with --memory {r.memory}.\n{r.machine}.\n"
    )
    tables = (steps_table(r.steps), totals_table(r), found_table(r))
    return "\n".join((head, *tables, "\n".join(f"- {line}" for line in verdicts(r))))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def steps_table(steps: Iterable[Step]) -> str:
    header = ("step", "seconds", "CPU seconds", "peak [MB]", "anonymous [MB]", "file pages [MB]", "written [MB]", "others' CPUs")
    return table(header, (_step_row(step) for step in steps))


def _step_row(step: Step) -> list[str]:
    u, again = step.usage, "" if step.round == 1 else f" ({step.round})"
    sizes = (f"{n / MB:,.0f}" for n in (u.peak_bytes, u.peak_anon_bytes, u.peak_file_bytes))
    return [
        f"{step.side}{again}: {step.name}",
        f"{u.wall_s:,.1f}",
        f"{u.cpu_s:,.1f}",
        *sizes,
        f"{step.written_bytes / MB:,.1f}",
        f"{u.others_cpus:.2f}",
    ]


def totals_table(r: Report) -> str:
    both = QUANTSCOPE in r.found and LLAMA_CPP in r.found
    rows = []
    for name, form, of, join, unit in TOTALS:
        values = {side: r.total(side, of, join) / unit for side in r.found}
        ratio = [f"{values[QUANTSCOPE] / values[LLAMA_CPP]:.3f}"] if both else []
        rows.append([name, *(form.format(v) for v in values.values()), *ratio])
    return table(["total", *r.found, *(["quantscope / llama.cpp"] if both else [])], rows)


def found_table(r: Report) -> str:
    """Both sides' statistics of each type, one below the other."""
    rows = []
    for kind in r.types:
        for side, found in r.found.items():
            values = ((form, getattr(found[kind], field)) for field, (_, form) in COLUMNS.items())
            rows.append([f"{kind}, {side}", *("none" if v is None else form.format(v) for form, v in values)])
    return table(["", *(title for title, _ in COLUMNS.values())], rows)


def verdicts(r: Report) -> list[str]:
    """Whether the run counts, and whether each target was met."""
    out = [validity(r.load_before, [s.usage for s in r.steps])]
    if QUANTSCOPE in r.found:
        bound = MAX_PEAK_SHARE * r.model_bytes if r.model_bytes > LARGE_BYTES else MAX_PEAK_BYTES
        out.append(target("peak memory [MB]", r.total(QUANTSCOPE, peak_bytes, max) / MB, bound / MB))
        out.append(target("written to disk [MB]", r.total(QUANTSCOPE, written_bytes) / MB, MAX_DISK_BYTES / MB))
    if QUANTSCOPE in r.found and LLAMA_CPP in r.found:
        ratio = r.total(QUANTSCOPE, wall_s) / r.total(LLAMA_CPP, wall_s)
        out.append(target("wall time, quantscope / llama.cpp", ratio, MAX_WALL_RATIO))
    return out


def target(what: str, value: float, at_most: float) -> str:
    return f"target {'met' if value <= at_most else 'MISSED'}: {what} {value:,.2f}, at most {at_most:,.2f}"


def validity(load_before: float, usages: Sequence[Usage]) -> str:
    """One line: nothing else was running, or what says otherwise."""
    others = sum(u.others_cpus * u.wall_s for u in usages) / sum(u.wall_s for u in usages)
    figures = f"load average before {load_before:.2f} (limit {MAX_LOAD}), {others:.2f} CPUs busy with other things (limit {MAX_OTHERS})"
    if load_before <= MAX_LOAD and others <= MAX_OTHERS:
        return f"valid run: {figures}"
    return f"NOT A VALID RUN, something else was running: {figures}. The figures above do not count: repeat it on an idle machine"
