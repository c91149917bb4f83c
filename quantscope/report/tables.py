"""A study as tables of strings, in the order of the seed analysis; text.py and markdown.py only lay them out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from quantscope.report.engine_tables import engines
from quantscope.report.logit_tables import logits, paired
from quantscope.report.op_tables import operations, outliers
from quantscope.report.table import DIFFERS, FLAG, Section, Table, label
from quantscope.results import Flag, Generated, LayerRow, Study, Variant
from quantscope.wording import MISSING, count, fixed, mean, percent, printable, quantity, quoted, sci, sig, size, times

MOST_IMPORTANT = 6  # layers with flagged cells that a sample of the layers must contain


def sections(study: Study) -> list[Section]:
    """Every table for which the study has numbers."""
    made = [generated(study), layer_outputs(study), swiglu(study), errors(study), logits(study), paired(study)]
    made += [operations(study), outliers(study), engines(study), sizes(study)]
    return [s for s in made if s.tables]


def header(study: Study) -> list[str]:
    """What was studied, one line each."""
    lines = _model_line(study), _prompt_line(study), _text_line(study), _plan_line(study), _floor_line(study), _base_line(study)
    return [line for line in lines if line]


def _model_line(study: Study) -> str:
    m = study.model
    if m is None:
        return ""
    return (
        f"Model {printable(m.name)}: {printable(m.arch)}, {count(m.n_layer, 'layer')} × {m.n_embd:,} channels, "
        f"vocabulary {m.n_vocab:,}, {quantity(m.n_params)} parameters"
    )


def _prompt_line(study: Study) -> str:
    p = study.prompt
    if p is None:
        return ""
    ids = " ".join(str(i) for i in p.ids[:12]) + (" …" if len(p.ids) > 12 else "")
    what = f"Prompt {quoted(_cut(p.text, 60))}: " if p.text is not None else "Prompt: "
    where = "all positions" if p.positions == "all" else "the last position"
    return f"{what}{count(len(p.ids), 'token')} ({ids}); layer statistics over {where}"


def _text_line(study: Study) -> str:
    t = study.text
    if t is None:
        return ""
    chunks = f"{count(t.n_chunks, 'chunk')} of {t.n_ctx:,}"
    if t.n_chunks_given is not None and t.n_chunks < t.n_chunks_given:
        chunks += f" (of {t.n_chunks_given:,}: stopped early, every mean KL being known well enough)"
    where = "the second half of each chunk, as in llama-perplexity" if t.scoring == "llama.cpp" else "all but the last of each chunk"
    return f"Text {printable(t.path)}: {t.n_tokens:,} tokens, {chunks}, {count(t.n_scored, 'position')} scored: {where}"


def _plan_line(study: Study) -> str:
    t = study.text
    return f"Plan: {study.plan.sentence(t.n_ctx)}" if study.plan and t else ""


def _floor_line(study: Study) -> str:
    f = study.floor
    if f is None:
        return ""
    return (
        f"Numerical floor: float32 rounding alone makes a KL divergence of {sci(f.kl_nats, 2)} nats on average, {sci(f.kl_nats_max, 2)} at "
        f"most ({count(f.n_positions, 'position')}, against float64); nothing below means anything"
    )


def _base_line(study: Study) -> str:
    b = study.base
    if b is None:
        return ""
    return (
        f"Base {printable(b.path)} (SHA-256 {b.sha256[:12]}…): log-probabilities of {count(b.n_chunks, 'chunk')} in steps of up to "
        f"{sci(b.step_nats, 2)} nats; the KL divergence of one position means nothing below half of that"
    )


def _cut(text: str, n: int) -> str:
    return text if len(text) <= n else text[: n - 1] + "…"


# ---- Tokens -------------------------------------------------------------------------------------------------------------


def generated(study: Study) -> Section:
    """Token, id, logit, ranks and probability per variant; a column says whether it is the original's token."""
    reference = study.reference
    wanted = reference.generated[0].id if reference and reference.generated else None
    shown = [v for v in study.variants if v.generated]
    columns = ["variant", "token", "id", "logit", "rank", "rank in original", "probability"]
    columns += ["same token"] if wanted is not None else []
    rows = tuple((label(study, v), *_token_cells(v.generated[0], wanted)) for v in shown)
    tables = [Table(tuple(columns), rows, text_columns=frozenset({0, 1}))] if rows else []
    tables += _continuations(study, shown)
    return Section(
        "Generated token",
        "The token with the largest logit after the prompt. Rank 1 is the largest; a rank in the original above 1 means that the "
        "original would have said something else.",
        tuple(tables),
    )


def _token_cells(g: Generated, wanted: int | None) -> list[str]:
    rank_there = MISSING if g.rank_in_original is None else f"{g.rank_in_original:,}"
    own = MISSING if g.rank is None else f"{g.rank:,}"
    cells = [quoted(g.text), str(g.id), fixed(g.logit, 4), own, rank_there, percent(g.prob, 3)]
    return cells if wanted is None else [*cells, "yes" if g.id == wanted else f"{DIFFERS} no"]


def _continuations(study: Study, shown: Sequence[Variant]) -> list[Table]:
    """The whole greedy continuation, where more than one token was generated."""
    if not any(len(v.generated) > 1 for v in shown):
        return []
    rows = tuple((label(study, v), quoted("".join(g.text for g in v.generated))) for v in shown)
    return [Table(("variant", "greedy continuation"), rows, text_columns=frozenset({0, 1}))]


# ---- Layers -------------------------------------------------------------------------------------------------------------

Show = Callable[[LayerRow], str]


def layer_outputs(study: Study) -> Section:
    """Input RMS, output RMS with its growth, and mean, for every variant and the original."""
    return Section(
        "Layer by layer",
        "RMS = sqrt(mean(x²)) and mean over all channels of the residual stream. Input of a layer = output of the one before it; "
        "growth = output RMS against that of the first layer.",
        _tables(
            by_layer(study, study.variants, lambda r: sig(r.input_rms, 4), "Input RMS"),
            by_layer(study, study.variants, lambda r: f"{sig(r.output_rms, 4)} {times(r.rms_growth):>6}", "Output RMS and its growth"),
            by_layer(study, study.variants, lambda r: mean(r.mean), "Mean of the output"),
        ),
    )


def swiglu(study: Study) -> Section:
    """RMS and mean of the SwiGLU output, with flagged cells and a footnote for each."""
    having = [v for v in study.variants if any(r.swiglu_rms is not None for r in v.layers)]

    def cell(row: LayerRow) -> str:
        flagged = any(f.cell == "swiglu_mean" for f in row.flags)
        return f"{FLAG} {mean(row.swiglu_mean)}" if flagged else mean(row.swiglu_mean)

    return Section(
        "SwiGLU",
        "RMS and mean of silu(gate)·up, the widest signal of a layer.",
        _tables(
            by_layer(study, having, lambda r: sig(r.swiglu_rms, 4), "SwiGLU RMS"),
            by_layer(study, having, cell, "SwiGLU mean", _flag_notes(having)),
        ),
    )


def _flag_notes(variants: Sequence[Variant]) -> tuple[str, ...]:
    return tuple(
        f"{FLAG} {printable(v.name)}, layer {row.layer}: |mean|/RMS is {sig(f.mean_to_rms)}, {times(f.times)} the "
        f"{'value' if f.n_others == 1 else 'median'} {sig(f.median_of_others)} of {count(f.n_others, 'other variant')}"
        for v, row, f in _flagged(variants)
    )


def _flagged(variants: Sequence[Variant]) -> list[tuple[Variant, LayerRow, Flag]]:
    """Flagged cells, strongest first."""
    return sorted(((v, row, f) for v in variants for row in v.layers for f in row.flags), key=lambda item: -item[2].times)


def errors(study: Study) -> Section:
    """NMSE, SQNR and cosine of the layer output against the original's."""
    having = [v for v in study.quantized if any(r.nmse is not None for r in v.layers)]
    return Section(
        "Error against the original",
        "NMSE = Σ(original − variant)² / Σ original² of the layer output; SQNR = −10·log10(NMSE), higher is better; "
        "cosine 1 = the same direction.",
        _tables(
            by_layer(study, having, lambda r: f"{sci(r.nmse)} {fixed(r.sqnr_db, 1):>5}", "NMSE and SQNR [dB]"),
            by_layer(study, having, lambda r: fixed(r.cos_sim, 6), "Cosine"),
        ),
    )


def by_layer(study: Study, variants: Sequence[Variant], show: Show, caption: str, footnotes: tuple[str, ...] = ()) -> Table | None:
    """One quantity: a row per layer, a column per variant; None when no variant has layers."""
    variants = [v for v in variants if v.layers]
    having = [{row.layer: row for row in v.layers} for v in variants]
    numbers = sorted({i for rows in having for i in rows})
    if not numbers:
        return None
    cells = tuple((str(i), *(show(rows[i]) if i in rows else MISSING for rows in having)) for i in numbers)
    important = frozenset(row.layer for _, row, _ in _flagged(variants)[:MOST_IMPORTANT])
    return Table(("layer", *(label(study, v) for v in variants)), cells, caption, footnotes, tuple(numbers), important, frozenset())


def _tables(*tables: Table | None) -> tuple[Table, ...]:
    return tuple(t for t in tables if t is not None)


# ---- Sizes --------------------------------------------------------------------------------------------------------------


def sizes(study: Study) -> Section:
    """File size, bits per weight, and how many tensors have which type."""
    shown = [v for v in study.variants if v.file_bytes is not None or v.bpw is not None or v.types]
    whole = study.reference.file_bytes if study.reference else None
    rows = tuple(
        (
            label(study, v),
            size(v.file_bytes),
            percent(v.file_bytes / whole, 3) if whole and v.file_bytes else MISSING,
            fixed(v.bpw, 2),
            ", ".join(f"{n} × {t}" for t, n in v.type_counts().items()) or MISSING,
        )
        for v in shown
    )
    table = Table(("variant", "file size", "of original", "bits/weight", "tensors by type"), rows, text_columns=frozenset({0, 4}))
    return Section("Size", "", (table,) if rows else ())
