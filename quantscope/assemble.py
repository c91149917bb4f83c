"""Records of the walks → the tables of a study.  Nothing is run here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quantscope.arch.config import ACTIVATION_NAMES
from quantscope.kld_base import KldBase
from quantscope.language import english
from quantscope.logit_stats import all_pairs, logit_stats
from quantscope.meters import Record, join_batches, tap_list
from quantscope.metrics import first_argmax, rank
from quantscope.model.cache import held_by
from quantscope.model.taps import CHOSEN, EMBD
from quantscope.passage import passage, top_tokens
from quantscope.results import (
    STUDY_VERSION,
    BaseInfo,
    Generated,
    Interrupted,
    LayerRow,
    LogitStats,
    ModelInfo,
    NumericalFloor,
    OpRow,
    Paired,
    PromptInfo,
    RoutingRow,
    Study,
    TextInfo,
    Variant,
)
from quantscope.routing import routing_rows
from quantscope.stages import Job, Stage
from quantscope.tap_stats import TapStats, op_row
from quantscope.variants import Candidate, Lineup
from quantscope.wording import idle_experts


def assemble(
    job: Job, records: Mapping[str, Sequence[Record]], provenance: dict[str, Any], interrupted: Interrupted | None = None
) -> Study:
    """The study of these stages' records; growth, flags and findings are added by ``findings.complete``.

    interrupted: some of the records are not there yet; the first batch of a prompt or a text must be.
    """
    joined = {name: join_batches(parts) for name, parts in records.items()}
    walks = [(s, joined[s.name]) for s in job.stages if s.name in joined and s.name != "floor"]
    (first, table), (last, whole) = walks[0], walks[-1]  # the same one, unless there is a prompt and a text
    after = torch.from_numpy(table["last"][first.row(0) :]).double()  # [M,V], where the generated tokens are chosen
    tokens = generated(job, after, has_reference=first.has_reference)
    prompt, text = job.inputs.prompt, job.inputs.text if last.labelled else None
    names = [c.member.name for c in job.lineup.candidates]
    lead = [base_name(job)] if last.base else []
    return Study(
        version=STUDY_VERSION,
        original=base_name(job) if last.base else job.lineup.candidates[0].member.name if job.lineup.has_original else None,
        variants=_of_base(job, last, whole)
        + tuple(
            _variant(
                c, layer_rows(first, table, m), (tokens[m],), stats_of(last, whole, m), op_rows(last, whole, m), routing_of(last, whole, m)
            )
            for m, c in enumerate(job.lineup.candidates)
        ),
        provenance=provenance,
        model=_model_info(job.lineup),
        prompt=prompt.info if prompt and isinstance(prompt.info, PromptInfo) else None,
        text=text_info(text.info, whole) if text and isinstance(text.info, TextInfo) else None,
        notes=(*job.lineup.notes, *(job.inputs.tokenizer.notes if job.inputs.tokenizer else ()), *routing_notes(last, whole)),
        plan=last.plan,
        floor=floor(job.stage("floor"), joined["floor"]) if "floor" in joined else None,
        paired=paired(last, whole),
        base=base_info(last.base, whole) if last.base else None,
        interrupted=interrupted,
        top=top_tokens(names, after, job.inputs.tokenizer),
        passage=passage(last, whole, [*lead, *names], n_scored(last, whole), job.inputs.tokenizer),
    )


def base_name(job: Job) -> str:
    """The base's file name, its whole path where a variant has that name."""
    assert job.base is not None
    name = job.base.path.name
    return str(job.base.path) if name in {c.member.name for c in job.lineup.candidates} else name


def _of_base(job: Job, stage: Stage, record: Record) -> tuple[Variant, ...]:
    """The original of which nothing but its log-probabilities is here."""
    if stage.base is None:
        return ()
    stats = logit_stats(log_p=record["log_p"][0], n_positions=record["log_p"][0].size)
    return (Variant(base_name(job), {}, None, None, logits=stats, path=str(stage.base.path)),)


def base_info(base: KldBase, record: Record) -> BaseInfo:
    n_chunks = record["mass"].shape[1]
    missing = max(0.0, 1 - float(record["mass"].mean()))  # rounding of the codes may bring the sum above 1
    return BaseInfo(str(base.path), base.sha256, base.n_chunk, base.largest_step(n_chunks), missing)


def layer_rows(stage: Stage, record: Record, member: int) -> tuple[LayerRow, ...]:
    """The layer table of one variant; with the errors where it is compared with an original."""
    config = stage.members[0].weights.config
    at = dict(zip(tap_list(stage.members[0].weights), map(TapStats.from_vector, record["taps"][stage.row(member)]), strict=True))
    compared = stage.has_reference and member > 0
    rows = []
    for i in range(config.n_layer):
        act = at.get(f"ffn_moe_swiglu-{i}", at[f"ffn_swiglu-{i}"])  # of a layer with experts: of those that are in use
        out, before = at[f"l_out-{i}"], at[f"l_out-{i - 1}" if i else EMBD]
        row = LayerRow(i, before.rms, out.rms, out.mean, swiglu_rms=act.rms, swiglu_mean=act.mean)
        rows.append(replace(row, nmse=out.nmse, sqnr_db=out.sqnr_db, cos_sim=out.cos_sim) if compared else row)
    return tuple(rows)


def op_rows(stage: Stage, record: Record, member: int) -> tuple[OpRow, ...]:
    """Every tap of one variant over the whole input; taps the architecture lacks have no row."""
    rows = []
    compared = stage.has_reference and member > 0
    for name, vector in zip(tap_list(stage.members[0].weights), record["taps"][stage.row(member)], strict=True):
        tap, dash, number = name.rpartition("-")
        if TapStats.from_vector(vector).n:
            rows.append(op_row(tap if dash else name, int(number) if dash else None, vector, compared=compared))
    return tuple(rows)


def routing_of(stage: Stage, record: Record, member: int) -> tuple[RoutingRow, ...]:
    """Where the experts of one variant are."""
    compared = stage.has_reference and member > 0
    return routing_rows(stage.members[0].weights, record, stage.row(member), n_tokens(stage, record), compared=compared)


def routing_notes(stage: Stage, record: Record) -> tuple[str, ...]:
    """That the first variant has experts that no token reaches."""
    some = idle_experts((f"{CHOSEN}-{r.layer}", r.n_idle, r.n_expert) for r in routing_of(stage, record, 0))
    if not some:
        return ()
    return (
        english(
            "No token reaches some of the experts ({some}): nothing is known of what quantization does to them. Study a longer text.",
            some=some,
        ),
    )


def generated(job: Job, logits: Tensor, *, has_reference: bool) -> list[Generated]:
    """The greedy token of each variant from its logits, [M,V] float64, the original's first."""
    out = []
    for own in logits:
        best = first_argmax(own)
        i = int(best)
        text = job.inputs.tokenizer.piece(i) if job.inputs.tokenizer else ""
        there = int(rank(logits[0], best)) if has_reference else None
        out.append(Generated(text, i, float(own[i]), int(rank(own, best)), there, float(own.softmax(-1)[i])))
    return out


def stats_of(stage: Stage, record: Record, member: int) -> LogitStats:
    """Logits of one variant beside the original's: [C,P] of each quantity."""
    row, log_p = stage.row(member), record.get("log_p")
    compared = stage.compares and row > 0
    return logit_stats(
        kl=record["kl"][row] if compared else None,
        same_top=record["same_top"][row] if compared else None,
        log_p=None if log_p is None else log_p[row],
        ref_log_p=log_p[0] if log_p is not None and compared else None,
        n_positions=n_scored(stage, record),
    )


def n_tokens(stage: Stage, record: Record) -> int:
    """Tokens of all chunks that were run."""
    return n_scored(stage, record) // (stage.last - stage.first) * stage.ids.shape[1]


def n_scored(stage: Stage, record: Record) -> int:
    """Positions of all chunks that were run: a text may stop early, a prompt is a single chunk."""
    n_chunks = record["log_p"].shape[1] if "log_p" in record else len(stage.ids)
    return n_chunks * (stage.last - stage.first)


def paired(stage: Stage, record: Record) -> tuple[Paired, ...]:
    """Every two variants, position by position; nothing without an original."""
    return all_pairs([m.name for m in stage.compared], list(record["kl"][1:])) if stage.compares else ()


def text_info(given: TextInfo, record: Record) -> TextInfo:
    """The text as far as it was run: a study may stop early."""
    n_chunks, n_scored = record["log_p"].shape[1:]
    return replace(given, n_chunks=n_chunks, n_scored=n_chunks * n_scored, n_chunks_given=given.n_chunks)


def floor(stage: Stage, record: Record) -> NumericalFloor:
    kl = record["kl"][1]
    layers = tuple(row.nmse for row in layer_rows(stage, record, 1) if row.nmse is not None)
    return NumericalFloor(float(kl.mean()), float(kl.max()), kl.size, layers)


def _variant(
    c: Candidate,
    layers: tuple[LayerRow, ...],
    tokens: tuple[Generated, ...],
    logits: LogitStats,
    ops: tuple[OpRow, ...],
    routing: tuple[RoutingRow, ...],
) -> Variant:
    types = {name: t.name for name, t in c.types.items()}
    weights = c.member.weights
    kv_bytes = c.kv.bytes_per_token(weights.config.n_layer, held_by(weights)) if c.kv else None
    kv = c.kv.name if c.kv else None
    return Variant(c.member.name, types, c.file_bytes, c.bpw, tokens, layers, logits, c.path, ops, kv, kv_bytes, routing)


def _model_info(lineup: Lineup) -> ModelInfo:
    w, c = lineup.first, lineup.first.config
    n_params = sum(w.stored(name).n_elements for name in lineup.candidates[0].types)
    gated = c.block.fused or c.experts is not None or "ffn_gate.weight" in w.layer_names(0)
    name, formula = ACTIVATION_NAMES[c.block.activation, gated]
    return ModelInfo(lineup.candidates[0].member.name, c.arch, c.n_layer, c.n_embd, c.n_vocab, n_params, name, formula)
