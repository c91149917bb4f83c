"""A study as tables of strings, in the order of the seed analysis; text.py and markdown.py only lay them out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from quantscope.language import say
from quantscope.phrases import count, joined, quantity, size
from quantscope.phrases import times as times_in_words
from quantscope.report.engine_tables import engines
from quantscope.report.logit_tables import logits, paired
from quantscope.report.op_tables import operations, outliers
from quantscope.report.table import DIFFERS, FLAG, Section, Table, label
from quantscope.results import Flag, Generated, LayerRow, RoutingRow, Study, Variant
from quantscope.wording import MISSING, fixed, mean, percent, printable, quoted, sci, sig, times

MOST_IMPORTANT = 6  # layers with flagged cells that a sample of the layers must contain


def sections(study: Study) -> list[Section]:
    """Every table for which the study has numbers."""
    made = [generated(study), layer_outputs(study), swiglu(study), errors(study), logits(study), paired(study)]
    made += [operations(study), routing(study), outliers(study), engines(study), sizes(study)]
    return [s for s in made if s.tables]


def header(study: Study) -> list[str]:
    """What was studied, one line each."""
    lines = (
        interrupted(study),
        _model_line(study),
        _prompt_line(study),
        _text_line(study),
        _plan_line(study),
        _floor_line(study),
        _base_line(study),
    )
    return [line for line in lines if line]


def interrupted(study: Study) -> str:
    """That the study is incomplete, and how far it had come."""
    i = study.interrupted
    if i is None:
        return ""
    if i.stage == "prompt":
        return say("Incomplete: interrupted before the text. Only the prompt's figures are here; the same command goes on.")
    return say(
        "Incomplete: interrupted after {done} of {batches} of the text, which the figures are over; the same command goes on.",
        done=f"{i.n_done:,}",
        batches=count(i.n_batches, "batch", "batches"),
    )


def _model_line(study: Study) -> str:
    m = study.model
    if m is None:
        return ""
    return say(
        "Model {name}: {arch}, {layers} × {n_embd} channels, vocabulary {n_vocab}, {n_params} parameters",
        name=printable(m.name),
        arch=printable(m.arch),
        layers=count(m.n_layer, "layer"),
        n_embd=f"{m.n_embd:,}",
        n_vocab=f"{m.n_vocab:,}",
        n_params=quantity(m.n_params),
    )


def _prompt_line(study: Study) -> str:
    p = study.prompt
    if p is None:
        return ""
    facts = {
        "tokens": count(len(p.ids), "token"),
        "ids": " ".join(str(i) for i in p.ids[:12]) + (" …" if len(p.ids) > 12 else ""),
        "where": say("all positions") if p.positions == "all" else say("the last position"),
    }
    if p.text is None:
        return say("Prompt: {tokens} ({ids}); layer statistics over {where}", **facts)
    return say("Prompt {text}: {tokens} ({ids}); layer statistics over {where}", text=quoted(_cut(p.text, 60)), **facts)


def _text_line(study: Study) -> str:
    t = study.text
    if t is None:
        return ""
    chunks, n_ctx = count(t.n_chunks, "chunk"), f"{t.n_ctx:,}"
    if t.n_chunks_given is not None and t.n_chunks < t.n_chunks_given and study.interrupted is None:
        what = say(
            "{chunks} of {n_ctx} (of {given}: stopped early, every mean KL being known well enough)",
            chunks=chunks,
            n_ctx=n_ctx,
            given=f"{t.n_chunks_given:,}",
        )
    else:
        what = say("{chunks} of {n_ctx}", chunks=chunks, n_ctx=n_ctx)
    if t.scoring == "llama.cpp":
        where = say("the second half of each chunk, as in llama-perplexity")
    else:
        where = say("all but the last of each chunk")
    return say(
        "Text {path}: {n_tokens} tokens, {chunks}, {positions} scored: {where}",
        path=printable(t.path),
        n_tokens=f"{t.n_tokens:,}",
        chunks=what,
        positions=count(t.n_scored, "position"),
        where=where,
    )


def _plan_line(study: Study) -> str:
    t = study.text
    return say("Plan: {plan}", plan=study.plan.sentence(t.n_ctx)) if study.plan and t else ""


def _floor_line(study: Study) -> str:
    f = study.floor
    if f is None:
        return ""
    return say(
        "Numerical floor: float32 rounding alone makes a KL divergence of {mean} nats on average, {most} at most ({positions}, against "
        "float64); nothing below means anything",
        mean=sci(f.kl_nats, 2),
        most=sci(f.kl_nats_max, 2),
        positions=count(f.n_positions, "position"),
    )


def _base_line(study: Study) -> str:
    b = study.base
    if b is None:
        return ""
    return say(
        "Base {path} (SHA-256 {sha256}…): log-probabilities of {chunks} in steps of up to {step} nats; the KL divergence of one position "
        "means nothing below half of that",
        path=printable(b.path),
        sha256=b.sha256[:12],
        chunks=count(b.n_chunks, "chunk"),
        step=sci(b.step_nats, 2),
    )


def _cut(text: str, n: int) -> str:
    return text if len(text) <= n else text[: n - 1] + "…"


# ---- Tokens -------------------------------------------------------------------------------------------------------------


def generated(study: Study) -> Section:
    """Token, id, logit, ranks and probability per variant; a column says whether it is the original's token."""
    reference = study.reference
    wanted = reference.generated[0].id if reference and reference.generated else None
    shown = [v for v in study.variants if v.generated]
    columns = [say("variant"), say("token"), say("id"), say("logit"), say("rank"), say("rank in original"), say("probability")]
    columns += [say("same token")] if wanted is not None else []
    rows = tuple((label(study, v), *_token_cells(v.generated[0], wanted)) for v in shown)
    tables = [Table(tuple(columns), rows, text_columns=frozenset({0, 1}))] if rows else []
    tables += _continuations(study, shown)
    return Section(
        say("Generated token"),
        say(
            "The token with the largest logit after the prompt. Rank 1 is the largest; a rank in the original above 1 means that the "
            "original would have said something else."
        ),
        tuple(tables),
    )


def _token_cells(g: Generated, wanted: int | None) -> list[str]:
    rank_there = MISSING if g.rank_in_original is None else f"{g.rank_in_original:,}"
    own = MISSING if g.rank is None else f"{g.rank:,}"
    cells = [quoted(g.text), str(g.id), fixed(g.logit, 4), own, rank_there, percent(g.prob, 3)]
    return cells if wanted is None else [*cells, say("yes") if g.id == wanted else say("{mark} no", mark=DIFFERS)]


def _continuations(study: Study, shown: Sequence[Variant]) -> list[Table]:
    """The whole greedy continuation, where more than one token was generated."""
    if not any(len(v.generated) > 1 for v in shown):
        return []
    rows = tuple((label(study, v), quoted("".join(g.text for g in v.generated))) for v in shown)
    return [Table((say("variant"), say("greedy continuation")), rows, text_columns=frozenset({0, 1}))]


# ---- Layers -------------------------------------------------------------------------------------------------------------

Show = Callable[[LayerRow], str]


def layer_outputs(study: Study) -> Section:
    """Input RMS, output RMS with its growth, and mean, for every variant and the original."""
    return Section(
        say("Layer by layer"),
        say(
            "RMS = sqrt(mean(x²)) and mean over all channels of the residual stream. Input of a layer = output of the one before it; "
            "growth = output RMS against that of the first layer."
        ),
        _tables(
            by_layer(study, study.variants, lambda r: sig(r.input_rms, 4), say("Input RMS")),
            by_layer(study, study.variants, lambda r: f"{sig(r.output_rms, 4)} {times(r.rms_growth):>6}", say("Output RMS and its growth")),
            by_layer(study, study.variants, lambda r: mean(r.mean), say("Mean of the output")),
        ),
    )


def swiglu(study: Study) -> Section:
    """RMS and mean of the feed-forward's activation, with flagged cells and a footnote for each."""
    having = [v for v in study.variants if any(r.swiglu_rms is not None for r in v.layers)]

    def cell(row: LayerRow) -> str:
        flagged = any(f.cell == "swiglu_mean" for f in row.flags)
        return f"{FLAG} {mean(row.swiglu_mean)}" if flagged else mean(row.swiglu_mean)

    name, formula = study.activation, study.model.activation_formula if study.model else "silu(gate)·up"
    return Section(
        say("{activation}", activation=name),
        say("RMS and mean of {formula}, the widest signal of a layer.", formula=formula),
        _tables(
            by_layer(study, having, lambda r: sig(r.swiglu_rms, 4), say("{activation} RMS", activation=name)),
            by_layer(study, having, cell, say("{activation} mean", activation=name), tuple(_flag_note(*f) for f in _flagged(having))),
        ),
    )


def _flag_note(v: Variant, row: LayerRow, f: Flag) -> str:
    facts = {
        "mark": FLAG,
        "name": printable(v.name),
        "layer": row.layer,
        "ratio": sig(f.mean_to_rms),
        "times": times_in_words(f.times),
        "others": sig(f.median_of_others),
        "variants": count(f.n_others, "other variant"),
    }
    if f.n_others == 1:
        return say("{mark} {name}, layer {layer}: |mean|/RMS is {ratio}, {times} the value {others} of {variants}", **facts)
    return say("{mark} {name}, layer {layer}: |mean|/RMS is {ratio}, {times} the median {others} of {variants}", **facts)


def _flagged(variants: Sequence[Variant]) -> list[tuple[Variant, LayerRow, Flag]]:
    """Flagged cells, strongest first."""
    return sorted(((v, row, f) for v in variants for row in v.layers for f in row.flags), key=lambda item: -item[2].times)


def errors(study: Study) -> Section:
    """NMSE, SQNR and cosine of the layer output against the original's."""
    having = [v for v in study.quantized if any(r.nmse is not None for r in v.layers)]
    return Section(
        say("Error against the original"),
        say(
            "NMSE = Σ(original − variant)² / Σ original² of the layer output; SQNR = −10·log10(NMSE), higher is better; "
            "cosine 1 = the same direction."
        ),
        _tables(
            by_layer(study, having, lambda r: f"{sci(r.nmse)} {fixed(r.sqnr_db, 1):>5}", say("NMSE and SQNR [dB]")),
            by_layer(study, having, lambda r: fixed(r.cos_sim, 6), say("Cosine")),
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
    return Table((say("layer"), *(label(study, v) for v in variants)), cells, caption, footnotes, tuple(numbers), important, frozenset())


def _tables(*tables: Table | None) -> tuple[Table, ...]:
    return tuple(t for t in tables if t is not None)


# ---- Experts ------------------------------------------------------------------------------------------------------------


def routing(study: Study) -> Section:
    """The share of the tokens that go through other experts than in the original, layer by layer, and the experts nobody reaches."""
    having = [v for v in study.quantized if any(r.rerouted is not None for r in v.routing)]
    idle = [v for v in study.variants if any(r.n_idle for r in v.routing)]
    return Section(
        say("Routing"),
        say(
            "Share of the tokens that go through other experts than in the original; which of the chosen comes first does not count. "
            "llama-quantize leaves the router as it is: it chooses otherwise where its input has changed. The errors of the single "
            "experts' operations are over the experts that both chose."
        ),
        _tables(
            _by_routing(study, having, lambda r: percent(r.rerouted, 3), say("Tokens that go through other experts")),
            _by_routing(study, idle, lambda r: f"{r.n_idle:,}/{r.n_expert:,}", say("Experts that no token reaches")),
        ),
    )


def _by_routing(study: Study, variants: Sequence[Variant], show: Callable[[RoutingRow], str], caption: str) -> Table | None:
    """A row per layer with experts, a column per variant; None where no variant has any."""
    if not variants:
        return None
    layers = tuple(r.layer for r in variants[0].routing)
    cells = tuple((str(layer), *(show(v.routing[k]) for v in variants)) for k, layer in enumerate(layers))
    return Table((say("layer"), *(label(study, v) for v in variants)), cells, caption, (), layers)


# ---- Sizes --------------------------------------------------------------------------------------------------------------


def sizes(study: Study) -> Section:
    """File size, bits per weight, and how many tensors have which type."""
    shown = [v for v in study.variants if v.file_bytes is not None or v.bpw is not None or v.types]
    whole = study.reference.file_bytes if study.reference else None
    cached = any(v.kv for v in shown)
    rows = tuple(
        (
            label(study, v),
            size(v.file_bytes),
            percent(v.file_bytes / whole, 3) if whole and v.file_bytes else MISSING,
            fixed(v.bpw, 2),
            *((size(v.kv_bytes),) if cached else ()),
            joined(f"{n} × {t}" for t, n in v.type_counts().items()) or MISSING,
        )
        for v in shown
    )
    cache = (say("cache/token"),) if cached else ()
    columns = (say("variant"), say("file size"), say("of original"), say("bits/weight"), *cache, say("tensors by type"))
    return Section(say("Size"), "", (Table(columns, rows, text_columns=frozenset({0, len(columns) - 1})),) if rows else ())
