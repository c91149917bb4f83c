"""What an import found: a summary of each trace, the layer tables of all of them, the ledger, and the document of ``--json``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from quantscope.diagnose.ledger import Hypothesis
from quantscope.importers.consistency import RowOrigin
from quantscope.language import mark, say
from quantscope.phrases import between, clauses, count, joined, listed, paragraph
from quantscope.report.table import FLAG, Table
from quantscope.report.tables import by_layer, swiglu
from quantscope.results import LayerRow, Study
from quantscope.trace import STATS, Evidence, Fingerprint, Full, Origin, Positions, Sample, Stats, Trace
from quantscope.wording import MISSING, mean, printable, sig, times

UNKNOWN_LAST = -1  # the last position, where the ids are not known
MOST_IDS = 12


def summary(name: str, trace: Trace) -> list[str]:
    """Engine, file, tokens, and which taps have what kind of evidence for which positions; one line each."""
    o = trace.origin
    by = f"{o.engine} {o.engine_version}" if o.engine_version else o.engine
    facts = joined([by, *([o.model] if o.model and o.model != name else []), _tokens(o)])
    lines = [say("{name}: {facts}", name=name, facts=facts)]
    groups: dict[tuple[str, str], list[str]] = {}
    for tap, pieces in trace.taps.items():
        for e in pieces:
            groups.setdefault((_kind(e), _positions(e.positions, o)), []).append(tap)
    lines += ["  " + say("{kind}, {where}: {taps}", kind=kind, where=where, taps=_taps(taps)) for (kind, where), taps in groups.items()]
    return [printable(line) for line in lines]


def _tokens(o: Origin) -> str:
    if o.tokens is None:
        return say("token ids not known")
    shown = ", ".join(map(str, o.tokens[:MOST_IDS])) + (" ..." if len(o.tokens) > MOST_IDS else "")
    return say("{tokens} [{ids}]", tokens=count(len(o.tokens), "token"), ids=shown)


def _kind(e: Evidence) -> str:
    if isinstance(e, Stats):
        return say("statistics ({names})", names=joined(s for s in STATS if s in e.values))
    return say({Full: mark("all values"), Sample: mark("samples"), Fingerprint: mark("fingerprints")}[type(e)])


def _positions(own: Positions, origin: Origin) -> str:
    positions = own if own is not None else origin.positions
    if positions is None:
        return say("all positions")
    if positions == (UNKNOWN_LAST,):
        return say("the last position")
    if len(positions) == 1:
        return say("position {position}", position=positions[0])
    return say("{n} positions from {first} to {last}", n=len(positions), first=positions[0], last=positions[-1])


def _taps(taps: Sequence[str]) -> str:
    """``l_out in 5 layers (0, 5, 10, 15, 21)``: taps by name, their layers counted."""
    layers: dict[str, list[str]] = {}
    for tap in dict.fromkeys(taps):
        stem, _, layer = tap.partition("-")
        layers.setdefault(stem, []).append(layer)
    alike: dict[tuple[str, ...], list[str]] = {}
    for stem, own in layers.items():
        alike.setdefault(tuple(own), []).append(stem)
    return clauses(_in_layers(joined(stems), own) for own, stems in alike.items())


def _in_layers(taps: str, layers: Sequence[str]) -> str:
    if list(layers) == [""]:
        return taps
    numbers = [int(i) for i in layers]
    whole = numbers == list(range(numbers[0], numbers[-1] + 1)) and len(numbers) > 2
    shown = between(str(numbers[0]), str(numbers[-1])) if whole else listed(layers)
    return say("{taps} in {_layers} {layers}", taps=taps, _layers="layer" if len(numbers) == 1 else "layers", layers=shown)


def layer_tables(study: Study) -> list[Table]:
    """The tables of the seed analysis: input RMS, output RMS with its growth, mean, SwiGLU; what is not known is a dash."""

    def known(show: Callable[[float], str], value: Callable[[LayerRow], float | None]) -> Callable[[LayerRow], str]:
        return lambda row: MISSING if (x := value(row)) is None or math.isnan(x) else show(x)

    tables = (
        by_layer(study, study.variants, known(lambda x: sig(x, 4), lambda r: r.input_rms), say("Input RMS")),
        by_layer(study, study.variants, lambda r: f"{sig(r.output_rms, 4)} {times(r.rms_growth):>6}", say("Output RMS and its growth")),
        by_layer(study, study.variants, known(mean, lambda r: r.mean), say("Mean of the output")),
    )
    shown = [t for t in tables if t is not None and any(cell != MISSING for row in t.rows for cell in row[1:])]
    return [*shown, *swiglu(study).tables]


_STATUS = {"supported": mark("supported"), "refuted": mark("refuted"), "untested": mark("untested")}


def ledger_table(suspicions: Sequence[Hypothesis]) -> Table:
    """What people suspect, what these numbers say to it, and in the last line of a row the command that would test it."""
    cells = tuple((h.id, say(_STATUS[h.status]), printable(paragraph(h.evidence)) + f"\n→ {printable(h.command)}") for h in suspicions)
    return Table((say("hypothesis"), say("status"), say("evidence → test")), cells, say("Hypotheses"), text_columns=frozenset(range(3)))


def origins_table(rows: Sequence[RowOrigin]) -> Table:
    """Which run each number of a table's rows is from; marked where no one run has all that any has."""
    cells = tuple(((f"{FLAG} " if r.mixed else "") + r.variant, str(r.layer), _from_where(r)) for r in rows)
    return Table((say("variant"), say("layer"), say("from")), cells, say("Which run each number is from"), text_columns=frozenset({0, 2}))


def _from_where(row: RowOrigin) -> str:
    """``input RMS: hello.log; output RMS: test.log; output mean: no run``, one entry a source."""
    sources: dict[str, list[str]] = {}
    for c in row.cells:
        sources.setdefault(say(" or ").join(c.runs) or say("none of these runs"), []).append(say(c.what))
    if len(sources) == 1:
        return next(iter(sources))
    return clauses(say("{numbers}: {runs}", numbers=listed(what), runs=source) for source, what in sources.items())


def document(
    files: Sequence[dict[str, Any]],
    study: Study | None,
    suspicions: Sequence[Hypothesis],
    rows: Sequence[RowOrigin],
    warnings: Sequence[str],
) -> dict[str, Any]:
    """What ``--json`` prints; a number that is not known or not finite is null."""
    layers = None
    if study is not None:
        layers = [{"variant": v.name, "layers": [_finite(asdict(r)) for r in v.layers]} for v in study.variants]
    return {
        "version": 1,
        "files": list(files),
        "layers": layers,
        "findings": [] if study is None else [{"id": f.id, "text": f.text, "evidence": _finite(f.evidence)} for f in study.findings],
        "ledger": [asdict(h) for h in suspicions],
        "rows": [_finite(asdict(row)) for row in rows],
        "warnings": list(warnings),
    }


def described(name: str, kind: str, trace: Trace, written: str | None) -> dict[str, Any]:
    """One trace in the document: its origin, and of every tap what there is; samples and whole tensors by their number of values."""
    taps = {tap: [_finite(_evidence(e)) for e in pieces] for tap, pieces in trace.taps.items()}
    return {"name": name, "format": kind, "written": written, "origin": asdict(trace.origin), "taps": taps}


def _evidence(e: Evidence) -> dict[str, Any]:
    facts: dict[str, Any] = {"kind": {Full: "full", Sample: "sample", Stats: "stats", Fingerprint: "fingerprint"}[type(e)]}
    facts["positions"] = e.positions
    if isinstance(e, Stats):
        return facts | {"values": dict(e.values), "digits": dict(e.digits)}
    if isinstance(e, Sample):
        return facts | {"shape": e.shape, "n_values": len(e.index), "digits": e.digits}
    if isinstance(e, Full):
        return facts | {"shape": tuple(e.values.shape)}
    return facts | {"n": e.n, "rms": e.rms}


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value
