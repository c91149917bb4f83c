"""The batches of a stage on a Ray cluster: one task per (group of variants, batch), put together exactly as if they had run here.

A worker opens the same files by the same paths, checks that they have the same content, and walks one batch of the given plan with the
original and its group of variants.  Every member of a walk depends on itself and the original alone, so the groups' records join to
the bits of a local run of the same plan.  Ray runs a task again when its machine dies.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from quantscope.errors import ClusterError, MissingExtraError, QuantscopeError, StudyMismatchError, UsageError
from quantscope.meters import Record, join_groups
from quantscope.results import PlanInfo, StudyOptions
from quantscope.sources.resolve import is_name
from quantscope.stages import Job, Stage, prepare, run_batch

RETRIES = 5  # of a task whose machine is lost
CONNECT_S = 5.0  # [s] to wait for an answer from a cluster's address
AHEAD = 2  # batches that are submitted beyond those that can run: a worker never waits for us


@dataclass(frozen=True)
class Given:
    """What every task needs to know."""

    options: StudyOptions
    stage: str
    plan: PlanInfo  # the driver's
    hashes: tuple[tuple[str, str], ...]  # path of a model file or the base, its SHA-256
    threads: int


class ClusterRun:
    """Computes batches of one stage on the cluster; call it with their numbers in rising order.

    hashes: path → SHA-256 of every model file and of the base.  numbers: of the batches that will be asked for.  n_cpus: of the cluster.
    Workers use as many threads as this process does, since a matrix product's bits may depend on that.
    """

    def __init__(self, options: StudyOptions, stage: Stage, hashes: dict[str, str], numbers: Sequence[int], n_cpus: int) -> None:
        import ray

        threads = torch.get_num_threads()
        self.ray, self.stage, self.numbers = ray, stage, list(numbers)
        self.at_once = max(1, n_cpus // threads)  # tasks
        n_groups = self.at_once // max(1, len(self.numbers))  # each group walks with the original again: as few as keep all busy
        self.groups = member_groups(len(stage.members), stage.has_reference, n_groups)
        known = tuple((_absolute(path), digest) for path, digest in sorted(hashes.items()))
        self.given = ray.put(Given(_with_absolute_paths(options), stage.name, stage.plan, known, threads))
        self.task = ray.remote(max_retries=RETRIES, num_cpus=min(threads, n_cpus))(_batch_of_a_group)
        self.under_way: dict[int, list[Any]] = {}

    def __call__(self, index: int) -> Record:
        at, ahead = self.numbers.index(index), AHEAD + self.at_once // len(self.groups)
        for number in self.numbers[at : at + 1 + ahead]:
            self._submit(number)
        try:
            records = self.ray.get(self.under_way.pop(index))
        except self.ray.exceptions.RayTaskError as e:
            if isinstance(e.cause, QuantscopeError):
                raise e.cause from None  # its own words, without the worker's traceback
            raise
        except self.ray.exceptions.RayError as e:
            raise ClusterError(
                f"--ray: the cluster could not finish batch {index + 1} of {self.stage.n_batches} in {RETRIES + 1} tries "
                f"({type(e).__name__}). Its machines were lost or ran out of memory: see `ray status`. Every batch finished before is kept "
                f"in --out DIR: give the same command again, with a smaller --memory if need be."
            ) from e
        return join_groups(records, has_reference=self.stage.compares)

    def _submit(self, number: int) -> None:
        if number not in self.under_way:
            self.under_way[number] = [self.task.remote(self.given, number, group) for group in self.groups]


def _with_absolute_paths(options: StudyOptions) -> StudyOptions:
    """A worker has a working folder of its own."""
    return replace(
        options,
        models=tuple(map(_absolute, options.models)),
        ref=options.ref and _absolute(options.ref),
        text=options.text and options.text.absolute(),
        base=options.base and options.base.absolute(),
    )


def _absolute(path: str) -> str:
    return path if is_name(path) else str(Path(path).absolute())


def member_groups(n_members: int, has_reference: bool, n_groups: int) -> list[list[int]]:
    """Members split into at most ``n_groups`` nearly equal groups, in order; the original leads every one of them.

    ``[[0, 1, 2], [0, 3]]`` for an original and three variants in two groups.
    """
    own = list(range(1 if has_reference else 0, n_members))
    n = max(1, min(n_groups, len(own)))
    cuts = [len(own) * k // n for k in range(n + 1)]
    lead = [0] if has_reference else []
    return [lead + own[a:b] for a, b in pairwise(cuts)]


def _batch_of_a_group(given: Given, index: int, group: Sequence[int]) -> Record:
    """On a worker: the record of one batch for some of the members."""
    torch.set_num_threads(given.threads)
    stage = _prepared(given.options, given.hashes).stage(given.stage)
    return run_batch(replace(stage, plan=given.plan).of_members(group), index)


@lru_cache(maxsize=1)
def _prepared(options: StudyOptions, hashes: tuple[tuple[str, str], ...]) -> Job:
    """The study as this worker sees it, once per process.  Raises StudyMismatchError when its files are not those of the driver."""
    job = prepare(options)
    all_found = job.hashes()
    for path, wanted in hashes:
        found = all_found[path]
        if found != wanted:
            raise StudyMismatchError(
                f"{path}: its content on a machine of the cluster (SHA-256 {found[:12]}…) differs from the one here ({wanted[:12]}…). "
                f"Every machine must see the same files under the same paths: share the folder, or copy the files again."
            )
    return job


def _check_listening(address: str) -> None:
    """OSError when nothing listens at HOST:PORT: ray itself would try for minutes, and then end the process."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()


@contextlib.contextmanager
def connected(address: str) -> Iterator[int]:
    """A connection to the cluster at ``address`` ("local" starts one on this machine); gives the number of its CPUs.

    Raises MissingExtraError without ray, UsageError when there is no cluster at the address.
    """
    try:
        import ray
    except ImportError:
        raise MissingExtraError("--ray needs the package ray, which is not installed: run `pip install 'quantscope[ray]'`.") from None
    ours = not ray.is_initialized()
    if ours:
        try:
            _check_listening(address)
            ray.init(address=address, log_to_driver=False, configure_logging=False, include_dashboard=False)
        except (OSError, RuntimeError, ValueError) as e:
            raise UsageError(
                f"--ray {address}: no Ray cluster answers there ({type(e).__name__}). Start one with `ray start --head`, give its address "
                f"as printed there, or `--ray local` to use this machine."
            ) from e
    try:
        yield int(ray.cluster_resources().get("CPU", 1))
    finally:
        if ours:
            ray.shutdown()
