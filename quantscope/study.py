"""The main job: one model in many quantizations (or several files) on the same tokens, layer by layer.

    line up the variants → token ids → walk in lockstep → tables → findings

A prompt gives the generated tokens and the layer tables, a text KL divergence and perplexity.  With a prompt only, the
divergence is over the prompt; with a text only, the layer tables are over the text and the token is the one after its first chunk.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version

import torch

from quantscope import __version__
from quantscope.findings import complete
from quantscope.inputs import Input, read_inputs
from quantscope.lockstep import walk
from quantscope.meters import LayerMeter, LogitMeter, Meters, NextToken
from quantscope.results import (
    STUDY_VERSION,
    Generated,
    LayerRow,
    LogitStats,
    ModelInfo,
    Progress,
    PromptInfo,
    Study,
    StudyOptions,
    TextInfo,
    Variant,
)
from quantscope.tokenizers import Tokenizer
from quantscope.variants import Candidate, Lineup, line_up

BATCH_BYTES = 1 << 30  # activations of one batch of chunks stay near this


def no_progress(stage: str, done: int, total: int) -> None:
    """Report nothing."""


def run_study(options: StudyOptions, progress: Progress = no_progress) -> Study:
    """Everything ``quantscope study`` reports.

    Raises QuantscopeErrors for models, prompts, texts and options that cannot be used, before anything is computed.
    """
    lineup = line_up(options)
    inputs = read_inputs(options, lineup.first.source, lineup.first.config)
    first = _run(inputs.prompt or inputs.text, lineup, options, progress, with_layers=True)
    last = _run(inputs.text, lineup, options, progress, with_layers=False) if inputs.prompt and inputs.text else first
    generated = _generated(first.next_token, lineup, inputs.tokenizer)
    study = Study(
        version=STUDY_VERSION,
        original=lineup.candidates[0].member.name if lineup.has_original else None,
        variants=tuple(map(_variant, lineup.candidates, first.layers, generated, last.logits)),
        provenance=_provenance(lineup, options),
        model=_model_info(lineup),
        prompt=inputs.prompt.info if inputs.prompt and isinstance(inputs.prompt.info, PromptInfo) else None,
        text=inputs.text.info if inputs.text and isinstance(inputs.text.info, TextInfo) else None,
        notes=lineup.notes + (inputs.tokenizer.notes if inputs.tokenizer else ()),
    )
    return complete(study)


@dataclass(frozen=True)
class Run:
    """What one walk gave: a layer table and logit statistics per variant, and the next tokens."""

    layers: list[tuple[LayerRow, ...]]
    logits: list[LogitStats]
    next_token: NextToken


def _run(given: Input | None, lineup: Lineup, options: StudyOptions, progress: Progress, *, with_layers: bool) -> Run:
    """One input through all variants, a batch of rows at a time."""
    assert given is not None  # read_inputs gives a prompt, a text or both
    config, members = lineup.first.config, lineup.members
    layers = LayerMeter(config.n_layer, len(members), options.positions) if with_layers else None
    logits = LogitMeter(len(members), first=given.first, last=given.last, has_reference=lineup.has_original, labelled=given.labelled)
    next_token = NextToken()
    meters = Meters(layers, logits, next_token)
    batches = torch.split(given.ids, _rows_per_batch(given, lineup))
    stages = config.n_layer + 2
    for index, ids in enumerate(batches):
        meters.batch(ids, index)

        def step(done: int, before: int = index * stages) -> None:
            progress(given.name, before + done, len(batches) * stages)

        walk(ids.to(options.device), members, meters, has_reference=lineup.has_original, dtype=getattr(torch, options.dtype), step=step)
    tables = [layers.rows(m, compared=lineup.has_original and m > 0) if layers else () for m in range(len(members))]
    return Run(tables, [logits.stats(m) for m in range(len(members))], next_token)


def _rows_per_batch(given: Input, lineup: Lineup) -> int:
    """As many rows as keep the activations near BATCH_BYTES: every member's stream, and one layer's work."""
    c, T = lineup.first.config, given.ids.shape[1]
    stream = (len(lineup.members) + 6) * c.n_embd
    work = 4 * c.n_ff + 3 * c.n_group * T
    return max(1, BATCH_BYTES // (8 * T * (stream + work)))


def _generated(next_token: NextToken, lineup: Lineup, tokenizer: Tokenizer | None) -> list[tuple[Generated, ...]]:
    text = {i: tokenizer.piece(i) if tokenizer else "" for i in next_token.ids()}
    return [(next_token.generated(m, text, has_reference=lineup.has_original),) for m in range(len(lineup.members))]


def _variant(c: Candidate, layers: tuple[LayerRow, ...], generated: tuple[Generated, ...], logits: LogitStats) -> Variant:
    types = {name: t.name for name, t in c.types.items()}
    return Variant(c.member.name, types, c.file_bytes, c.bpw, generated, layers, logits, c.path)


def _model_info(lineup: Lineup) -> ModelInfo:
    w, c = lineup.first, lineup.first.config
    n_params = sum(w.stored(name).n_elements for name in lineup.candidates[0].types)
    return ModelInfo(lineup.candidates[0].member.name, c.arch, c.n_layer, c.n_embd, c.n_vocab, n_params)


def _provenance(lineup: Lineup, options: StudyOptions) -> dict[str, object]:
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
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "files": {c.path: c.source.sha256() for c in lineup.candidates if c.path},
    }
