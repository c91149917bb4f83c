"""A stage of a study: one input (a prompt, a text), cut into batches that walk through all variants and leave a record each.

    Stage  →  run_batch(stage, 0), run_batch(stage, 1) …  →  join_batches

A batch depends on nothing but its stage and number, so that batches can be stored, resumed and computed elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from quantscope.errors import UsageError
from quantscope.inputs import Input, Inputs, read_inputs
from quantscope.kld_base import KldBase, check_base, read_base
from quantscope.lockstep import Member, walk
from quantscope.meters import BatchMeter, Record
from quantscope.plan import slices
from quantscope.results import PlanInfo, StudyOptions
from quantscope.variants import Lineup, line_up, lineup_plan

FLOOR_TOKENS = 64  # enough to see the size of rounding, and a float64 run of a large model takes seconds


@dataclass(frozen=True)
class Stage:
    """ids [C,T] through the members, the first of which is the original if ``has_reference``; positions first … last − 1 are scored.

    base: the original's log-probabilities at these positions, where they come from a file; then none of the members is the original.
    """

    name: str
    ids: Tensor
    first: int
    last: int
    labelled: bool
    members: tuple[Member, ...]
    has_reference: bool
    plan: PlanInfo
    positions: Literal["all", "last"] = "all"
    device: str = "cpu"
    base: KldBase | None = None

    @property
    def compares(self) -> bool:
        """Whether the logits are compared with an original's, which then has row 0 of a record."""
        return self.has_reference or self.base is not None

    @property
    def compared(self) -> tuple[Member, ...]:
        """Those that are compared with it: rows 1, 2 … of a record."""
        return self.members[1:] if self.has_reference else self.members

    def row(self, member: int) -> int:
        """The row of a record that a member has."""
        return member + (self.base is not None)

    @property
    def n_batches(self) -> int:
        return self.plan.n_batches

    @property
    def n_steps(self) -> int:
        """Per batch: the embedding, the layers, the head."""
        return self.members[0].weights.config.n_layer + 2

    def batch(self, index: int) -> Tensor:
        n = self.plan.chunks_per_batch
        return self.ids[index * n : (index + 1) * n]

    def of_members(self, numbers: Sequence[int]) -> Stage:
        """The same stage for some of the members; the original stays the first."""
        return replace(self, members=tuple(self.members[m] for m in numbers))


@dataclass(frozen=True)
class Job:
    """A study before it runs: who takes part, on what, and in which stages."""

    lineup: Lineup
    inputs: Inputs
    stages: tuple[Stage, ...]
    base: KldBase | None = None

    def hashes(self) -> dict[str, str]:
        """Path → SHA-256 of every file that the numbers come from, the text excepted."""
        files = {c.path: c.source.sha256() for c in self.lineup.candidates if c.path}
        return files | ({str(self.base.path): self.base.sha256} if self.base else {})

    def stage(self, name: str) -> Stage:
        return next(s for s in self.stages if s.name == name)


def prepare(options: StudyOptions) -> Job:
    """Open, tokenize and plan; raises QuantscopeErrors for models, prompts, texts and options that cannot be used.

    The text comes last: it is the long one, and what the prompt gives is stored before it begins.
    """
    lineup = line_up(options)
    base = None if options.base is None else _base(options, options.base)
    if base and options.n_chunks is None:
        options = replace(options, n_chunks=base.n_chunk)
    inputs = read_inputs(options, lineup.first.source, lineup.first.config)
    if base and inputs.text:
        add_bos = inputs.tokenizer is not None and inputs.tokenizer.add_bos
        check_base(base, inputs.text, lineup.first.config.n_vocab, options.n_chunks or base.n_chunk, add_bos=add_bos)
    given = [i for i in (inputs.prompt, inputs.text) if i is not None]
    stages = [input_stage(i, lineup, options, base if i.labelled else None) for i in given]
    if lineup.has_original and options.dtype == "float32":
        stages.insert(0, floor_stage(given[-1], lineup, options))
    return Job(lineup, inputs, tuple(stages), base)


def _base(options: StudyOptions, path: Path) -> KldBase:
    """The file in place of an original.  Raises UsageError for options that do not go with it."""
    if options.text is None or options.scoring != "llama.cpp":
        raise UsageError(
            f"--kl-divergence-base {path}: it holds the second half of each chunk of a text, expected that text with `--text FILE`, and "
            f"not `--scoring all`."
        )
    base = read_base(path)
    if base.n_ctx != options.n_ctx:
        raise UsageError(
            f"--kl-divergence-base {path}: its chunks have {base.n_ctx} tokens, expected {options.n_ctx}, as --ctx says. Give `--ctx "
            f"{base.n_ctx}`, or leave --ctx out."
        )
    return base


def input_stage(given: Input, lineup: Lineup, options: StudyOptions, base: KldBase | None = None) -> Stage:
    """The stage of a prompt or a text.  Raises UsageError when the memory bound is too small for it."""
    types = [dict(c.types) for c in lineup.candidates]
    plan = lineup_plan(lineup, given.ids, given.last - given.first, options, types, n_stored=int(base is not None))
    return Stage(
        given.name,
        given.ids,
        given.first,
        given.last,
        given.labelled,
        tuple(lineup.members),
        lineup.has_original,
        plan,
        options.positions,
        options.device,
        base,
    )


def floor_stage(given: Input, lineup: Lineup, options: StudyOptions) -> Stage:
    """The original in float64 and in float32 on the first tokens of the input: what rounding alone does to the logits."""
    original = lineup.members[0]
    ids = given.ids[:1, :FLOOR_TOKENS]
    plan = lineup_plan(lineup, ids, ids.shape[1], options, [lineup.candidates[0].types] * 2, bytes_per_value=8)
    pair = replace(original, name="float64", dtype=torch.float64), replace(original, name="float32", dtype=torch.float32)
    return Stage("floor", ids, 0, ids.shape[1], False, pair, True, plan, device=options.device)


def run_batch(stage: Stage, index: int, step: Callable[[int], None] = lambda n: None) -> Record:
    """Walk one batch and return its record.  step: called with the number of steps done, n_steps in all."""
    ids, members = stage.batch(index), stage.members
    meter = BatchMeter(
        ids,
        members[0].weights,
        len(members),
        chunk0=index * stage.plan.chunks_per_batch,
        first=stage.first,
        last=stage.last,
        has_reference=stage.has_reference,
        labelled=stage.labelled,
        positions=stage.positions,
        base=stage.base,
    )
    walk(ids, members, meter, has_reference=stage.has_reference, slices=slices(stage.plan), first=stage.first, step=step)
    return meter.record()
