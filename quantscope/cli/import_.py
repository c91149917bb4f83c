"""``quantscope import``: logs, dumps, arrays and tables of other engines, as traces and as layer tables."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from quantscope.cli.lang import Lang, LangOption
from quantscope.cli.study import parse_ids
from quantscope.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantscope.arch.config import ModelConfig
    from quantscope.diagnose.ledger import Hypothesis
    from quantscope.importers.answers import Answer
    from quantscope.importers.base import Imported, Run
    from quantscope.importers.consistency import RowOrigin
    from quantscope.importers.name_map import Rule
    from quantscope.results import Study
    from quantscope.trace import Trace


class Format(str, Enum):
    auto = "auto"
    eval_callback = "eval-callback"
    rustorch = "rustorch"
    fingerprints = "fingerprints"
    npz = "npz"
    npy = "npy"
    safetensors = "safetensors"
    csv = "csv"
    trace = "trace"


Files = Annotated[list[Path], typer.Argument(metavar="FILE", help="Logs, tables, arrays, or a folder of dumps.", show_default=False)]
FormatOption = Annotated[Format, typer.Option("--format", help="What the files are; csv: tables, Markdown too.")]
Map = Annotated[
    list[str] | None,
    typer.Option("--map", metavar="NAME=TAP", help="Which arrays are which taps, as in layers.{i}.out=l_out-{i}; repeatable."),
]
Model = Annotated[str | None, typer.Option(metavar="MODEL", help="The file that the engine ran: settles layouts, names the file.")]
Tokens = Annotated[str | None, typer.Option(metavar="ID,ID,...", help="The token ids that were run, where a file does not say.")]
Engine = Annotated[str | None, typer.Option(metavar="NAME", help="Who wrote the files, where they do not say.")]
Call = Annotated[int | None, typer.Option(metavar="N", help="Which forward call of a log, counted from 1.")]
RunOption = Annotated[
    list[Path] | None, typer.Option("--run", metavar="LOG", help="A run that a table was written from: checks its rows; repeatable.")
]
TableOption = Annotated[bool, typer.Option("--table", help="Print the layer tables only, all files side by side.")]
Out = Annotated[
    Path | None, typer.Option("--out", "-o", metavar="FILE", help="Write the trace; of several, each under FILE with its name inserted.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, the rest on stderr.")]


class Item(NamedTuple):
    """One trace that was asked for."""

    name: str
    kind: str
    trace: Trace
    warnings: tuple[str, ...] = ()  # about its numbers; the trace has them as notes
    answers: tuple[Answer, ...] = ()  # what its file says was generated


def import_(
    files: Files,
    kind: FormatOption = Format.auto,
    maps: Map = None,
    model: Model = None,
    tokens: Tokens = None,
    engine: Engine = None,
    call: Call = None,
    runs: RunOption = None,
    table: TableOption = False,
    out: Out = None,
    json: Json = False,
    lang: LangOption = Lang.en,
) -> None:
    """Read what another engine wrote about a forward, as a trace for `quantscope compare`.

    Formats: the log of llama-eval-callback or llama-debug, RusTorch's log and dumps, fingerprint lines, npz, npy and safetensors arrays,
    and tables of statistics (Markdown, CSV).  With statistics the layer tables are printed, all files side by side, and what they support
    and what they leave open.
    """
    from quantscope.findings import told
    from quantscope.findings.traces import study_of
    from quantscope.importers.name_map import parse_rule
    from quantscope.language import language

    _check(out)
    rules = [parse_rule(m) for m in maps or ()]
    ids = None if tokens is None else parse_ids(tokens)
    config, facts = _model(model)
    items, warnings = _read(files, kind.value, rules, config, facts | {"tokens": ids, "engine": engine}, call)
    rows, items = _check_rows(items, runs or ())
    warnings += [w for i in items for w in i.warnings]
    study = study_of([(i.name, i.trace) for i in items])
    if table and study is None:
        raise UsageError(
            "--table: no file has the RMS of a layer's output, expected statistics or whole tensors. Leave --table out to see what there "
            "is."
        )
    written = _write(items, out)
    _complain(warnings)
    with language(lang.value):
        study, suspicions = None if study is None else told(study), _ledger(items, study)
        _show(items, study, suspicions, rows, sys.stderr if json else sys.stdout, table)
        if json:
            from quantscope.cli.output import print_document
            from quantscope.report.imported import described, document

            found = [described(i.name, i.kind, i.trace, str(written[n]) if written else None) for n, i in enumerate(items)]
            print_document(document(found, study, suspicions, rows, warnings))
    if out is not None:
        from quantscope.cli.console import console

        console(sys.stderr).print(f"Wrote {', '.join(str(p) for p in written)}.", markup=False, soft_wrap=True)


def _check(out: Path | None) -> None:
    if out is not None and out.suffix != ".safetensors":
        raise UsageError(f"-o {out}: a trace is a safetensors file, expected a name that ends in .safetensors. Give -o {out}.safetensors.")


def _model(model: str | None) -> tuple[ModelConfig | None, dict[str, Any]]:
    """The sizes of the model that was run, and what a trace says about it."""
    if model is None:
        return None, {}
    from quantscope.arch.config import as_data
    from quantscope.arch.read import read_config
    from quantscope.engines import model_name
    from quantscope.sources.resolve import open_source

    source = open_source(model)
    try:
        config = read_config(source)
        return config, {"model": model_name(model), "model_sha256": source.sha256(), "arch": config.arch, "config": as_data(config)}
    finally:
        source.close()


def _read(
    files: Sequence[Path], kind: str, rules: Sequence[Rule], config: ModelConfig | None, facts: dict[str, Any], call: int | None
) -> tuple[list[Item], list[str]]:
    """The wanted traces of all files, and what must be said about them."""
    from quantscope.importers.axes import check_widths
    from quantscope.importers.base import with_known
    from quantscope.importers.consistency import residual_mismatches
    from quantscope.importers.layouts import Known
    from quantscope.importers.read import read

    ids = facts["tokens"]
    items: list[Item] = []
    warnings: list[str] = []
    for file in files:
        imported = read(file, kind, rules=rules, known=Known(None if ids is None else len(ids), config))
        warnings += imported.warnings
        wanted, said = _wanted(imported, call, file)
        warnings += said
        for name, run in wanted:
            trace = with_known(run.trace, facts)
            trace = trace if config is None else check_widths(trace, config)
            name = _new_name(name, items)
            items.append(
                _noted(Item(name, imported.kind, trace, answers=_answers(file, imported, name, trace)), residual_mismatches(trace))
            )
    return items, warnings


def _answers(file: Path, imported: Imported, name: str, trace: Trace) -> tuple[Answer, ...]:
    """What the file says was generated: of a table every answer that it has, of a log that of this call."""
    from quantscope.importers.answers import answer_of, answers
    from quantscope.importers.base import read_text

    if imported.kind == "table":
        return answers(read_text(file))
    own = answer_of(name, trace)
    return () if own is None else (own,)


def _ledger(items: Sequence[Item], study: Study | None) -> tuple[Hypothesis, ...]:
    """What the layer tables support of what people suspect; nothing without them."""
    from quantscope.diagnose.table_ledger import ledger_of_tables

    if study is None:
        return ()
    return ledger_of_tables(study, list(dict.fromkeys(a for i in items for a in i.answers)))


def _wanted(imported: Imported, call: int | None, file: Path) -> tuple[list[tuple[str, Run]], list[str]]:
    """(name, run): every variant of a table, the one call of a log that is meant."""
    from quantscope.importers.base import choose

    if imported.variants:
        return [(r.name, r) for r in imported.runs], []
    run, said = choose(imported, call, str(file))
    return [(_stem(file), run)], [] if said is None else [said]


def _stem(file: Path) -> str:
    return file.resolve().name.removesuffix(".gz").rpartition(".")[0] or file.resolve().name


def _new_name(name: str, items: Sequence[Item]) -> str:
    """The name, numbered where an earlier trace has it."""
    taken = {i.name for i in items}
    return next(n for k in range(1, len(items) + 2) if (n := name if k == 1 else f"{name} ({k})") not in taken)


def _noted(item: Item, sentences: Sequence[str]) -> Item:
    """The item with warnings, which whoever compares its trace must know, too."""
    from dataclasses import replace

    origin = replace(item.trace.origin, notes=(*item.trace.origin.notes, *sentences))
    warnings = (*item.warnings, *(f"{item.name}: {s}" for s in sentences))
    return item._replace(trace=replace(item.trace, origin=origin), warnings=warnings)


def _check_rows(items: Sequence[Item], files: Sequence[Path]) -> tuple[list[RowOrigin], list[Item]]:
    """Where every row's numbers come from, and the items with a warning for each row that mixes runs."""
    if not files:
        return [], list(items)
    from quantscope.importers.base import Run
    from quantscope.importers.consistency import mixed_warning, origins
    from quantscope.importers.read import read

    runs = []
    for file in files:
        found = read(file).runs
        runs += [Run(file.name if len(found) == 1 else f"{file.name} {r.name}", r.trace) for r in found]
    rows = {i.name: origins(i.name, i.trace, runs) for i in items}
    return [r for own in rows.values() for r in own], [
        _noted(i, [mixed_warning(row, runs) for row in rows[i.name] if row.mixed]) for i in items
    ]


def _write(items: Sequence[Item], out: Path | None) -> list[Path]:
    """The file of every trace, none without ``-o``."""
    if out is None:
        return []
    from quantscope.trace_file import save

    paths = [out] if len(items) == 1 else [out.with_stem(f"{out.stem}-{_safe(i.name)}") for i in items]
    if len(set(paths)) < len(paths):  # names that differ in characters which a file name does not have
        paths = [p.with_stem(f"{p.stem}-{n}") for n, p in enumerate(paths, 1)]
    for item, path in zip(items, paths, strict=True):
        save(item.trace, path)
    return paths


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in name)


def _complain(warnings: Sequence[str]) -> None:
    from quantscope.cli.console import complain

    for warning in warnings:
        complain("Warning", warning)


def _show(
    items: Sequence[Item],
    study: Study | None,
    suspicions: Sequence[Hypothesis],
    rows: Sequence[RowOrigin],
    stream: Any,
    table_only: bool,
) -> None:
    from rich.console import Group
    from rich.text import Text

    from quantscope.cli.console import console
    from quantscope.language import retold, say
    from quantscope.report.imported import layer_tables, ledger_table, origins_table, summary
    from quantscope.report.prose import Prose
    from quantscope.report.text import grid

    out = console(stream)
    parts: list[Any] = []
    if not table_only:
        for item in items:
            parts += [Prose(line) for line in summary(item.name, item.trace)]
            said = {w.partition(": ")[2] for w in item.warnings}
            parts += [Prose(f"  • {retold(note)}", style="dim") for note in item.trace.origin.notes if note not in said]
    if study is not None:
        for t in layer_tables(study):
            parts += grid(t, out.width, say("the document of --json"))
        parts += [Text(), *(Prose(f"• {f.text}") for f in study.findings)]
        parts += grid(ledger_table(suspicions), out.width)
    if rows:
        parts += grid(origins_table(rows), out.width, say("the document of --json"))
    out.print(Group(*parts))
