"""The main job: one model in many quantizations (or several files) on the same tokens, layer by layer.

    prepare (line up the variants, token ids, plan) → stages, batch by batch, each stored → assemble → findings

A prompt gives the generated tokens and the layer tables, a text KL divergence, perplexity and the statistics of every operation.  With
a prompt only, the divergence is over the prompt; with a text only, the layer tables are over the text and the token is the one after its
first chunk.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantscope import __version__
from quantscope.assemble import assemble
from quantscope.cluster import ClusterRun, connected
from quantscope.engine_effects import MOST_TOKENS, check_engines, engine_runs
from quantscope.findings import complete
from quantscope.logit_stats import relative_half_width
from quantscope.meters import Record
from quantscope.monitor import SILENT, Monitor
from quantscope.results import Interrupted, Study, StudyOptions
from quantscope.stages import Job, Stage, prepare, run_batch
from quantscope.store import NAME, StudyStore
from quantscope.wording import count

FORMAT = 3  # of the stored records
Compute = Callable[[int], Record]  # number of a batch → its record
Keep = Callable[[list[Record]], None]  # told the records so far


def run_study(options: StudyOptions, monitor: Monitor = SILENT, folder: Path | None = None, *, replace_finished: bool = False) -> Study:
    """Everything ``quantscope study`` reports.

    folder: where finished batches are kept; what is there of the same study is not computed again.  replace_finished: another study that
    is there and finished makes room for this one.
    Raises QuantscopeErrors for models, prompts, texts and options that cannot be used, before anything is computed.
    """
    check_engines(options.engines)
    job = prepare(options)
    with connected(options.ray) if options.ray else nullcontext(0) as n_cpus:
        if folder is None:
            records = _run(job, options, monitor, None, n_cpus)
        else:
            with StudyStore.open(folder, identity(job, options), replace_finished=replace_finished) as store:
                records = _run(job, options, monitor, store, n_cpus)
                store.finish()
    study = assemble(job, records, _provenance(job, options))
    if options.engines:
        study = replace(study, engines=engine_runs(job.lineup, _engine_tokens(job), options.engines, monitor))
    return complete(study)


def _engine_tokens(job: Job) -> list[int]:
    """What other engines are run on: the prompt, else the beginning of the text."""
    prompt, text = job.inputs.prompt, job.inputs.text
    if prompt is not None:
        return [int(i) for i in prompt.ids[0]]
    assert text is not None
    return [int(i) for i in text.ids[0, :MOST_TOKENS]]


def _run(job: Job, options: StudyOptions, monitor: Monitor, store: StudyStore | None, n_cpus: int) -> dict[str, list[Record]]:
    """The records of every stage; those of a text come from the cluster, of ``n_cpus``, where there is one."""
    out: dict[str, list[Record]] = {}
    for stage in job.stages:
        there = store.done(stage.name) if store else []
        missing = [i for i in range(stage.n_batches) if i not in there]
        if stage.labelled:
            monitor.note(f"Plan: {stage.plan.sentence(stage.ids.shape[1])}.")
        if stage.labelled and there:
            monitor.note(_resumed(stage, len(there)))
        monitor.begin(stage.name, stage.n_batches * stage.n_steps, stage.ids.numel())
        on_cluster = n_cpus and stage.labelled and missing
        compute = ClusterRun(options, stage, job.hashes(), missing, n_cpus) if on_cluster else _here(stage, monitor)
        keep = _sketching(job, options, stage, out, store) if store and stage.name != "floor" else None
        out[stage.name] = run_stage(stage, options.until_ci, compute, monitor, store, keep)
    return out


def _sketching(job: Job, options: StudyOptions, stage: Stage, before: dict[str, list[Record]], store: StudyStore) -> Keep:
    """Stores the results so far, for a report of a study that does not come to its end: after its last batch it has come there."""
    provenance = _provenance(job, options)

    def keep(done: list[Record]) -> None:
        if stage is job.stages[-1] and len(done) == stage.n_batches:
            return
        so_far = Interrupted(stage.name, len(done), stage.n_batches)
        store.sketch(json.dumps(assemble(job, {**before, stage.name: done}, provenance, so_far).to_json()))

    return keep


def _resumed(stage: Stage, n: int) -> str:
    done = f"{n:,} of {count(stage.n_batches, 'batch', 'batches')}"
    return f"Stored already, and not computed again: {done} ({NAME}; delete it to begin anew)."


def run_stage(
    stage: Stage, until_ci: float | None, compute: Compute, monitor: Monitor, store: StudyStore | None, keep: Keep | None = None
) -> list[Record]:
    """The records of its batches in order: those that are stored, and the others, computed and stored one by one.

    keep: called after each batch that was computed.  Fewer than all of them where the study may stop early and every mean KL divergence
    is known well enough.
    """
    done: list[Record] = []
    for index in range(stage.n_batches):
        there = store.get(stage.name, index) if store else None
        record = compute(index) if there is None else there
        done.append(record)
        if there is None and store:
            store.put(stage.name, index, record)
        if there is None and keep:
            keep(done)
        monitor.step(stage.name, (index + 1) * stage.n_steps, f"batch {index + 1}/{stage.n_batches}")
        if stage.labelled and stage.compares and _known(stage, done, until_ci, monitor):
            break
    return done


def _known(stage: Stage, done: list[Record], until_ci: float | None, monitor: Monitor) -> bool:
    """Whether every mean KL divergence is known to ``until_ci``; tells the monitor the means so far."""
    kl = np.concatenate([r["kl"] for r in done], axis=1)  # [M,C,P]
    monitor.scores({m.name: float(x.mean()) for m, x in zip(stage.compared, kl[1:], strict=True)})
    return until_ci is not None and all(relative_half_width(x) <= until_ci for x in kl[1:])


def _here(stage: Stage, monitor: Monitor) -> Compute:
    """Batches are computed by this process."""

    def compute(index: int) -> Record:
        def step(done: int) -> None:
            where = "embedding" if done == 1 else f"layer {done - 1}/{stage.n_steps - 2}" if done < stage.n_steps else "head"
            monitor.step(stage.name, index * stage.n_steps + done, f"batch {index + 1}/{stage.n_batches}, {where}")

        return run_batch(stage, index, step)

    return compute


def identity(job: Job, options: StudyOptions) -> dict[str, Any]:
    """What must be the same for a study to be continued: inputs by their content, options, plan, and what decides about single bits."""
    text = job.inputs.text
    return {
        "format": FORMAT,
        "quantscope": __version__,
        "models": {c.path: c.source.sha256() for c in job.lineup.candidates if c.path},
        "options": {
            "--types": list(options.types),
            "--kv": list(options.kv),
            "--ref": options.ref,
            "--prompt": options.prompt,
            "--tokens": None if options.tokens is None else list(options.tokens),
            "--text": text.sha256 if text else None,
            "--ctx": options.n_ctx if text else None,
            "--chunks": options.n_chunks,
            "--positions": options.positions,
            "--scoring": options.scoring,
            "--kl-divergence-base": job.base.sha256 if job.base else None,
            "--dtype": options.dtype,
            "--device": options.device,
        },
        "plan": {s.name: [s.plan.n_batches, s.plan.chunks_per_batch, s.plan.chunks_per_slice] for s in job.stages},
        "arithmetic": {"torch": torch.__version__, "threads": torch.get_num_threads(), "cpu": torch.backends.cpu.get_cpu_capability()},
    }


def _provenance(job: Job, options: StudyOptions) -> dict[str, object]:
    """Versions, machine, options and the hash of every file: what it takes to repeat the study."""
    return {
        "quantscope": __version__,
        "engine": "reference",
        "arithmetic": f"exact {options.dtype}",
        "torch": torch.__version__,
        "numpy": version("numpy"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": options.device,
        "threads": torch.get_num_threads(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "files": job.hashes(),
    }
