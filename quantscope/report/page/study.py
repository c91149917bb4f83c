"""A study as a page: the tables of the report, with charts of the same numbers in front of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from quantscope.language import say
from quantscope.model.taps import LAYER_TAPS, place_of
from quantscope.phrases import count
from quantscope.report import tables as study_tables
from quantscope.report.engine_tables import engines, place_of_row
from quantscope.report.logit_tables import logits, paired
from quantscope.report.markdown import flat
from quantscope.report.op_tables import operations, outliers
from quantscope.report.page.content import Block, Chart, Frame, Page, Series, grid, rounded
from quantscope.report.table import Section, label
from quantscope.results import EngineRow, EngineRun, LayerRow, LogitStats, Study, Variant
from quantscope.wording import printable, sci, sig

MOST_HEAVY = 16  # variants whose heat maps, single tokens and distributions are in the page: beyond it would be too large a file
PERCENTILES = ("min", "p001", "p01", "p05", "p10", "median", "p90", "p95", "p99", "p999", "max")
STREAM = "l_out"


def study_page(study: Study) -> Page:
    """The page; of a study that was interrupted, with a warning."""
    name = study.model.name if study.model else study.original or say("several variants")
    answer, *others = study.findings or (None,)
    made = [
        _block("token", study_tables.generated(study), (top_chart(study),)),
        _block("layers", study_tables.layer_outputs(study), (rms_chart(study), mean_chart(study))),
        _block("swiglu", study_tables.swiglu(study), (swiglu_rms_chart(study), swiglu_mean_chart(study))),
        _block("error", study_tables.errors(study), (nmse_chart(study),)),
        _block("logits", logits(study), (percentile_chart(study), histogram_chart(study))),
        passage_block(study),
        _block("better", paired(study), ()),
        _block("operations", operations(study), (operation_chart(study),)),
        _block("routing", study_tables.routing(study), (routing_chart(study),)),
        _block("outliers", outliers(study), (outlier_chart(study),)),
        _block("engines", engines(study), engine_charts(study)),
        _block("size", study_tables.sizes(study), (size_chart(study),)),
        Block("findings", say("Findings"), lines=tuple((f.id, f.text) for f in others if f)),
        Block("notes", say("Notes"), lines=tuple(("", printable(note)) for note in study.notes)),
        Block(
            "provenance", say("Provenance"), lines=tuple((printable(key), printable(str(value))) for key, value in flat(study.provenance))
        ),
    ]
    return Page(
        say("quantscope study of {name}", name=printable(name)),
        answer.text if answer else "",
        tuple(line for line in study_tables.header(study) if line != study_tables.interrupted(study)),
        tuple(b for b in made if b.charts or b.tables or b.lines or b.passage),
        tuple(label(study, v) for v in ordered(study)),
        None if study.reference is None else label(study, study.reference),
        study_tables.interrupted(study),
    )


def ordered(study: Study) -> list[Variant]:
    """The original first, the others in their order."""
    return [*([study.reference] if study.reference else []), *study.quantized]


def _block(id_: str, section: Section, charts: Sequence[Chart | None]) -> Block:
    return Block(id_, section.title, section.explanation, tuple(c for c in charts if c is not None), section.tables)


# ---- through the layers ---------------------------------------------------------------------------------------------------------


def rms_chart(study: Study) -> Chart | None:
    return _by_layer(study, "rms", say("RMS of the residual stream"), say("output RMS"), lambda r: r.output_rms, log=True)


def mean_chart(study: Study) -> Chart | None:
    return _by_layer(study, "mean", say("Mean of the residual stream"), say("mean"), lambda r: r.mean)


def swiglu_rms_chart(study: Study) -> Chart | None:
    name = study.activation
    title, axis = say("RMS of the {activation} output", activation=name), say("{activation} RMS", activation=name)
    return _by_layer(study, "swiglu-rms", title, axis, lambda r: r.swiglu_rms, log=True)


def swiglu_mean_chart(study: Study) -> Chart | None:
    name = study.activation
    title, axis = say("Mean of the {activation} output", activation=name), say("{activation} mean", activation=name)
    return _by_layer(study, "swiglu-mean", title, axis, lambda r: r.swiglu_mean)


def nmse_chart(study: Study) -> Chart | None:
    title = say("Error of each layer's output against the original")
    chart = _by_layer(study, "nmse", title, say("NMSE"), lambda r: r.nmse, log=True)
    floor = max(study.floor.layer_nmse, default=None) if study.floor else None
    if chart is None or floor is None:
        return chart
    note = say("Rounding in float32 makes an NMSE of {nmse} at most by itself: a line down there means nothing.", nmse=sci(floor, 2))
    return dataclasses.replace(chart, note=note)


def _by_layer(
    study: Study, id_: str, title: str, y_title: str, value: Callable[[LayerRow], float | None], *, log: bool = False
) -> Chart | None:
    """A line for each variant that has the quantity; None where none has."""
    series = tuple(
        Series(
            label(study, v),
            [r.layer for r in v.layers],
            rounded([value(r) for r in v.layers]),
            label(study, v),
            original=_is_original(study, v),
        )
        for v in ordered(study)
        if any(value(r) is not None for r in v.layers)
    )
    return Chart(id_, title, "lines", say("layer"), y_title, series, log_y=log) if series else None


def _is_original(study: Study, v: Variant) -> bool:
    return v.name == study.original


# ---- operations -----------------------------------------------------------------------------------------------------------------


def operation_chart(study: Study) -> Chart | None:
    """Operation × layer: the NMSE of every variant."""
    having = [v for v in study.quantized if any(r.nmse is not None and r.layer is not None for r in v.ops)]
    if not having:
        return None
    rows = [r for r in having[0].ops if r.layer is not None]
    taps = [t for t in LAYER_TAPS if any(r.tap == t for r in rows)] or list(dict.fromkeys(r.tap for r in rows))
    layers = sorted({r.layer for r in rows if r.layer is not None})
    frames = tuple(
        Frame(label(study, v), grid({(r.tap, r.layer): r.nmse for r in v.ops}, taps, layers), label(study, v)) for v in having[:MOST_HEAVY]
    )
    return Chart(
        "operations",
        say("Error of every operation in every layer"),
        "heat",
        say("layer"),
        say("operation"),
        x=layers,
        y=taps,
        frames=frames,
        z_title=say("NMSE"),
        log_z=True,
        note=_left_out(len(having)),
    )


def _left_out(n: int) -> str:
    """What the page says where it shows some of n variants only."""
    if n <= MOST_HEAVY:
        return ""
    return say("The first {shown} of {variants} are in this figure; study.json has all.", shown=MOST_HEAVY, variants=count(n, "variant"))


def routing_chart(study: Study) -> Chart | None:
    """The tokens that go through other experts than in the original."""
    series = tuple(
        Series(
            label(study, v),
            [r.layer for r in v.routing],
            rounded([None if r.rerouted is None else 100 * r.rerouted for r in v.routing]),
            label(study, v),
        )
        for v in study.quantized
        if any(r.rerouted is not None for r in v.routing)
    )
    title = say("Tokens that go through other experts than in the original")
    return Chart("routing", title, "lines", say("layer"), say("tokens [%]"), series) if series else None


def outlier_chart(study: Study) -> Chart | None:
    """The largest activation of the residual stream."""
    having = [(v, [r for r in v.ops if r.tap == STREAM and r.layer is not None]) for v in ordered(study)]
    series = tuple(
        Series(
            label(study, v),
            [r.layer for r in rows],
            rounded([r.abs_max for r in rows]),
            label(study, v),
            original=_is_original(study, v),
        )
        for v, rows in having
        if rows
    )
    title = say("Largest activation of the residual stream")
    return Chart("outliers", title, "lines", say("layer"), say("largest |x|"), series, log_y=True) if series else None


# ---- engines --------------------------------------------------------------------------------------------------------------------


def engine_charts(study: Study) -> list[Chart]:
    """For each file the three effects through the layers, the predicted one as a band; then in every operation."""
    names = list(dict.fromkeys(run.variant for run in study.engines if run.rows))
    heats = [_heat(k, run) for k, run in enumerate([run for run in study.engines if run.ops][:MOST_HEAVY])]
    return [*(_split(study, k, name) for k, name in enumerate(names[:MOST_HEAVY])), *(c for c in heats if c is not None)]


def _heat(k: int, run: EngineRun) -> Chart | None:
    """Operation × layer of one run: a frame for the engine's effect, the quantization's and the predicted one."""
    found = {place: row for row in run.ops if (place := place_of(row.tap))[1] is not None}
    taps = [t for t in LAYER_TAPS if any(tap == t for tap, _ in found)]
    layers = sorted({layer for _, layer in found if layer is not None})
    ways: dict[str, Callable[[EngineRow], float | None]] = {
        run.engine: lambda r: r.engine,
        say("quantization"): lambda r: r.quantization,
        say("{engine}, predicted", engine=run.engine): lambda r: r.predicted,
    }
    frames = []
    for name, value in ways.items():
        cells = {place: value(row) for place, row in found.items()}
        if any(cells.values()):
            frames.append(Frame(name, grid(cells, taps, layers)))
    title = say("{engine} on {name}: every operation in every layer", engine=run.engine, name=printable(run.variant))
    if not frames:
        return None
    return Chart(
        f"engine-operations-{k}",
        title,
        "heat",
        say("layer"),
        say("operation"),
        x=layers,
        y=taps,
        frames=tuple(frames),
        z_title=say("NMSE"),
        log_z=True,
    )


def _split(study: Study, k: int, variant: str) -> Chart:
    runs = [run for run in study.engines if run.variant == variant and run.rows]
    key = label(study, study.variant(variant)) if any(v.name == variant for v in study.variants) else variant
    places = [place_of_row(row) for row in runs[0].rows]
    quantization = rounded([row.quantization for row in runs[0].rows])
    series = [Series(say("quantization"), places, quantization, key, style="dash")] if any(quantization) else []
    for run in runs:
        predicted = rounded([row.predicted for row in run.rows])
        if any(p is not None for p in predicted):
            name = say("{engine}, predicted", engine=run.engine)
            series.append(Series(name, places, predicted, key, high=predicted, style="band"))
        series.append(Series(run.engine, places, rounded([row.engine for row in run.rows]), key))
    title = say("{name}: what the quantization does, and what the engine adds", name=printable(variant))
    return Chart(f"engines-{k}", title, "lines", say("layer"), say("NMSE"), tuple(series), log_y=True)


# ---- logits ---------------------------------------------------------------------------------------------------------------------


def percentile_chart(study: Study) -> Chart | None:
    """The distribution of the KL divergence over the positions."""
    names = [say("smallest"), *(f"{p} %" for p in ("0.1", "1", "5", "10")), say("median"), *(f"{p} %" for p in ("90", "95", "99", "99.9"))]
    names.append(say("largest"))
    series = []
    for v in study.quantized:
        values = [None if v.logits is None else getattr(v.logits, f"kl_nats_{p}") for p in PERCENTILES]
        if sum(x is not None for x in values) > 1:
            series.append(Series(label(study, v), names, rounded(values), label(study, v)))
    title = say("KL divergence over the positions: from the least to the most changed")
    return Chart("percentiles", title, "lines", say("percentile"), say("KL [nats]"), tuple(series), log_y=True) if series else None


def histogram_chart(study: Study) -> Chart | None:
    """How many positions have which KL divergence; None in studies that did not count them."""
    series = []
    for v in study.quantized:
        found = _histogram(v.logits)
        if found is not None:
            series.append(Series(label(study, v), *found, label(study, v)))
    title = say("How many positions are changed how much")
    return Chart("histogram", title, "steps", say("KL [nats]"), say("positions"), tuple(series), log_x=True) if series else None


def _histogram(stats: LogitStats | None) -> tuple[list[float], list[float | None]] | None:
    h = stats.kl_histogram if stats else None
    if h is None or not any(h.counts):
        return None
    filled = [i for i, n in enumerate(h.counts) if n]
    span = range(max(0, filled[0] - 1), min(len(h.counts), filled[-1] + 2))
    return [float(f"{10 ** (h.low + (i + 0.5) / h.per_decade):.3g}") for i in span], [float(h.counts[i]) for i in span]


def top_chart(study: Study) -> Chart | None:
    """The logits of the most probable next tokens, side by side."""
    top = study.top
    if top is None:
        return None
    words = [f"{_shown(piece)}  ({i})" for piece, i in zip(top.pieces, top.ids, strict=True)]
    series = []
    for v in [v for v in ordered(study) if v.name in top.logits][:MOST_HEAVY]:
        text = [
            "" if rank is None else say("probability {p}, rank {rank}", p=sig(p), rank=f"{rank:,}")
            for p, rank in zip(top.probs[v.name], top.ranks[v.name], strict=True)
        ]
        name = label(study, v)
        series.append(Series(name, words, rounded(top.logits[v.name]), name, text=text, original=_is_original(study, v)))
    title = say("The most probable next tokens")
    return Chart("top", title, "points", say("token"), say("logit"), tuple(series), note=_left_out(len(top.logits)))


def _shown(piece: str) -> str:
    return printable(piece).replace(" ", "␣") or "∅"


def size_chart(study: Study) -> Chart | None:
    """Size against KL divergence."""
    having = [v for v in study.quantized if v.file_bytes and v.logits and v.logits.kl_nats and math.isfinite(v.logits.kl_nats)]
    if not having:
        return None
    series = []
    for v in having:
        s = v.logits
        assert s is not None
        low, high = (None if b is None else rounded([b]) for b in (s.kl_nats_low, s.kl_nats_high))
        text = [say("{bpw} bits per weight", bpw=sig(v.bpw))] if v.bpw is not None else None
        megabytes = rounded([(v.file_bytes or 0) / 1e6])
        series.append(Series(label(study, v), megabytes, rounded([s.kl_nats]), label(study, v), low, high, text, style="label"))
    title = say("Size against KL divergence: lower left is better")
    return Chart("pareto", title, "lines", say("file size [MB]"), say("KL [nats]"), tuple(series), log_y=True)


# ---- the text -------------------------------------------------------------------------------------------------------------------


def passage_block(study: Study) -> Block:
    """Every token of a part of the text, coloured by what quantization does to the prediction after it."""
    p, title = study.passage, say("The text itself")
    if p is None or not p.ids:
        return Block("text", title)
    shown = [v for v in ordered(study) if v.name in p.top][:MOST_HEAVY]
    data = {
        "pieces": list(p.pieces),
        "next": list(p.next),
        "breaks": [i for i in range(1, len(p.ids)) if p.chunk[i] != p.chunk[i - 1]],
        "kl": {label(study, v): rounded(p.kl_nats[v.name]) for v in shown if v.name in p.kl_nats},
        "top": {label(study, v): [[[piece, *rounded([prob])] for piece, prob in row] for row in p.top[v.name]] for v in shown},
    }
    explanation = say(
        "{shown} of {all} positions. The stronger the colour of a token, the more the prediction of what follows it differs from the "
        "original's; point at a token, tap it or go to it with the arrow keys to see both.",
        shown=f"{len(p.ids):,}",
        all=f"{p.n_positions:,}",
    )
    rest = _left_out(len(p.top))
    return Block("text", title, f"{explanation} {rest}".strip(), passage=data)
