"""Computing an importance matrix: the mean square of every input of every matrix, on a text.

    a_j = Σ_t x_tj² / n        x: what a matrix multiplies, [n tokens, n_in]; of an expert, the n tokens that the router sends to it

The forward is the exact one, so the figures are of the model and not of an engine's rounding.  As llama-imatrix does: disjoint chunks, the
first token of each replaced by BOS where the vocabulary adds one, every position counts; the layers' matrices always, the head on request,
the embedding never.  Source: tools/imatrix/imatrix.cpp of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from quantscope.errors import NonFiniteError, UsageError
from quantscope.imatrix import Entry, Imatrix
from quantscope.inputs import Input, read_inputs
from quantscope.lockstep import Member, walk
from quantscope.model.arithmetic import Arithmetic
from quantscope.plan import slices
from quantscope.results import PlanInfo, StudyOptions, TextInfo
from quantscope.variants import line_up, lineup_plan
from quantscope.weights import WeightProvider


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
    """The importance matrix of a model on ids [C,T], batch by batch: memory is that of the plan, and the sums.

    process_output: the head's matrix, too; a tied one has the embedding's name, where llama-quantize looks for it and llama-imatrix
    writes nothing.  Raises PromptError for ids the model cannot take and NonFiniteError where an activation is NaN or infinite.
    """
    n_chunk, n_ctx = ids.shape
    squares, head = _Squares(member.weights), _HeadInput(process_output)
    n_steps = member.weights.config.n_layer + 2
    for b in range(plan.n_batches):
        part = ids[b * plan.chunks_per_batch : (b + 1) * plan.chunks_per_batch]
        done = b * n_steps
        walk(
            part,
            [replace(member, arithmetic=squares)],
            head,
            has_reference=False,
            slices=slices(plan),
            first=n_ctx,  # no logits
            step=lambda n, done=done: step(done + n),  # type: ignore[misc]
        )
    sums = dict(squares.of)
    if head.inputs is not None:
        sums[member.weights.top_names()["output.weight"]] = head.inputs
    return Imatrix({name: _entry(found, name) for name, found in sums.items()}, tuple(datasets), n_chunk, n_ctx)


def _entry(found: _Sums, name: str) -> Entry:
    """NonFiniteError where the sums are not numbers."""
    values = found.squares.cpu().to(torch.float32)
    if not torch.isfinite(values).all():
        raise NonFiniteError(
            f"the input of {name} has squares that are NaN or infinite on this text, expected numbers: there is no importance to compute. "
            f"The file is damaged, or the model overflows: look for the place with `quantscope study MODEL --text FILE`."
        )
    return Entry(values.numpy(), tuple(found.n))


class _Sums:
    """Σ x² float64 [n_mat, n_in] over n tokens [n_mat]: one matrix, or one an expert."""

    def __init__(self, n_mat: int, n_in: int, device: torch.device) -> None:
        self.squares = torch.zeros(n_mat, n_in, dtype=torch.float64, device=device)
        self.n = [0] * n_mat

    def add(self, squares: Tensor, n: int, e: int = 0) -> None:
        """squares: [n_in] over n tokens, of matrix e."""
        self.squares[e] += squares
        self.n[e] += n


class _Squares(Arithmetic):
    """The exact operations, adding up the squares of what every matrix of the layers multiplies.

    of: canonical name of a matrix → its sums.
    """

    def __init__(self, weights: WeightProvider) -> None:
        self.of: dict[str, _Sums] = {}
        self.config = weights.config
        self.names: Mapping[str, str] = {}  # of the layer at hand, local → canonical
        self.last: tuple[Tensor, Tensor] | None = None  # an input and its squares: several matrices in a row have the same

    def layer(self, weights: WeightProvider, i: int, dtype: torch.dtype) -> Mapping[str, Tensor]:
        self.names = weights.layer_names(i)
        return super().layer(weights, i, dtype)

    def linear(self, x: Tensor, w: Mapping[str, Tensor], name: str, *, scale_last: bool = False) -> Tensor:
        self._add(name, 1, x)
        return super().linear(x, w, name, scale_last=scale_last)

    def expert_linear(self, x: Tensor, w: Mapping[str, Tensor], name: str, e: int) -> Tensor:
        assert self.config.experts is not None
        self._add(name, self.config.experts.n_expert, x, e)
        return super().expert_linear(x, w, name, e)

    def by_head(self, x: Tensor, w: Mapping[str, Tensor], name: str) -> Tensor:
        """As llama-imatrix counts them: the inputs of all heads' matrices side by side."""
        self._add(name, 1, x.flatten(-2))
        return super().by_head(x, w, name)

    def _add(self, name: str, n_mat: int, x: Tensor, e: int = 0) -> None:
        """x: [...,n_in], the input of matrix e."""
        if self.last is None or self.last[0] is not x:
            self.last = x, x.square().flatten(0, -2).sum(0, dtype=torch.float64)
        matrix = self.names[f"{name}.weight"]
        if matrix not in self.of:
            self.of[matrix] = _Sums(n_mat, x.shape[-1], x.device)
        self.of[matrix].add(self.last[1], x[..., 0].numel(), e)


class _HeadInput:
    """An Observer of what the head multiplies, where that is wanted."""

    def __init__(self, wanted: bool) -> None:
        self.taps: Collection[str] = ("result_norm",) if wanted else ()
        self.inputs: _Sums | None = None

    def tap(self, member: int, name: str, ref: Tensor | None, x: Tensor, chunk: int) -> None:
        if self.inputs is None:
            self.inputs = _Sums(1, x.shape[-1], x.device)
        self.inputs.add(x.square().sum((0, 1), dtype=torch.float64), x[..., 0].numel())

    def logits(self, start: int, first_id: int, members: Sequence[Tensor]) -> None:
        """No logits are wanted."""
