"""Computing an importance matrix: the mean square of every input of every matrix, on a text.

    a_j = Σ_t x_tj² / n        x: what a matrix multiplies, [n tokens, n_in]

The forward is the exact one, so the figures are of the model and not of an engine's rounding.  Matrices with one input share one sum.
As llama-imatrix does: disjoint chunks, the first token of each replaced by BOS where the vocabulary adds one, every position counts; the
layers' matrices always, the head on request, the embedding never.  Source: tools/imatrix/imatrix.cpp of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quantscope.errors import NonFiniteError, UsageError
from quantscope.imatrix import Entry, Imatrix
from quantscope.inputs import Input, read_inputs
from quantscope.lockstep import Member, walk
from quantscope.model.wiring import readers
from quantscope.plan import slices
from quantscope.results import PlanInfo, StudyOptions, TextInfo
from quantscope.variants import line_up, lineup_plan
from quantscope.weights import WeightProvider

ROUTER = "ffn_gate_inp"  # never quantized


@dataclass(frozen=True)
class ImportanceJob:
    """An importance matrix before it is computed."""

    member: Member
    text: Input
    plan: PlanInfo
    process_output: bool

    @property
    def n_steps(self) -> int:
        """Per batch: the embedding, the layers, the end."""
        return self.member.weights.config.n_layer + 2


def prepare_importance(options: StudyOptions, *, process_output: bool = False) -> ImportanceJob:
    """Open, tokenize and plan; raises QuantscopeErrors for a model, text and options that cannot be used.

    A text of less than two chunks is refused, as llama-imatrix does, with how much is needed.
    """
    lineup = line_up(options)
    text = read_inputs(options, lineup.first.source, lineup.first.config).text
    if text is None:
        raise UsageError("no text given, expected one to run the model on: `quantscope imatrix MODEL --text FILE -o FILE.gguf`.")
    return ImportanceJob(lineup.members[0], text, lineup_plan(lineup, text.ids, 0, options), process_output)


def compute_importance(job: ImportanceJob, step: Callable[[int], None] = lambda n: None) -> Imatrix:
    """Run the model over the job's text.  step: called with the number of steps done, n_steps for each of the plan's batches."""
    assert isinstance(job.text.info, TextInfo)
    datasets = (Path(job.text.info.path).name,)
    return compute_imatrix(job.member, job.text.ids, job.plan, process_output=job.process_output, datasets=datasets, step=step)


def compute_imatrix(
    member: Member,
    ids: Tensor,
    plan: PlanInfo,
    *,
    process_output: bool = False,
    datasets: Sequence[str] = (),
    step: Callable[[int], None] = lambda n: None,
) -> Imatrix:
    """The importance matrix of a model on ids [C,T], batch by batch: memory is that of the plan, and one sum per input.

    process_output: the head's matrix, too; a tied one has the embedding's name, where llama-quantize looks for it and llama-imatrix
    writes nothing.  Raises PromptError for ids the model cannot take and NonFiniteError where an activation is NaN or infinite.
    """
    n_chunk, n_ctx = ids.shape
    inputs = dict(_inputs(member.weights, process_output))
    meter = _SquareMeter(inputs)
    n_steps = member.weights.config.n_layer + 2
    for b in range(plan.n_batches):
        part = ids[b * plan.chunks_per_batch : (b + 1) * plan.chunks_per_batch]
        done = b * n_steps
        walk(
            part,
            [member],
            meter,
            has_reference=False,
            slices=slices(plan),
            first=n_ctx,  # no logits
            step=lambda n, done=done: step(done + n),  # type: ignore[misc]
        )
    entries = {name: _entry(meter.sums[tap], name, n_chunk * n_ctx) for tap, names in inputs.items() for name in names}
    return Imatrix(entries, tuple(datasets), n_chunk, n_ctx)


def _entry(sums: Tensor, name: str, n_tokens: int) -> Entry:
    """sums: float64 [n_in].  NonFiniteError where they are not numbers."""
    values = sums.cpu().to(torch.float32)
    if not torch.isfinite(values).all():
        raise NonFiniteError(
            f"the input of {name} has squares that are NaN or infinite on this text, expected numbers: there is no importance to compute. "
            f"The file is damaged, or the model overflows: look for the place with `quantscope study MODEL --text FILE`."
        )
    return Entry(values.numpy()[None], (n_tokens,))


def _inputs(weights: WeightProvider, process_output: bool) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(tap, canonical names of the matrices that multiply it)."""
    for i in range(weights.config.n_layer):
        names = weights.layer_names(i)
        for tap, matrices in readers(weights.config, i, names).items():
            if wanted := tuple(names[f"{m}.weight"] for m in matrices if m != ROUTER):
                yield tap, wanted
    if process_output:
        yield "result_norm", (weights.top_names()["output.weight"],)


class _SquareMeter:
    """An Observer that adds up squares: tap → float64 [channels]."""

    def __init__(self, taps: Collection[str]) -> None:
        self.taps = taps
        self.sums: dict[str, Tensor] = {}

    def tap(self, member: int, name: str, ref: Tensor | None, x: Tensor, chunk: int) -> None:
        squares = x.square().sum(dim=(0, 1), dtype=torch.float64)  # [channels] of [b,T,channels]
        self.sums[name] = self.sums[name] + squares if name in self.sums else squares

    def logits(self, start: int, first_id: int, members: Sequence[Tensor]) -> None:
        """No logits are wanted."""
