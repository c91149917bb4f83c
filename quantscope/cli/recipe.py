"""``quantscope recipe``: which type each tensor gets for a size, for bits per weight or for a KL divergence."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantscope.cli.lang import Lang, LangOption
from quantscope.cli.quantize import check_one_importance, parse_methods, quantize
from quantscope.cli.sensitivity import parse_types
from quantscope.cli.study import parse_memory
from quantscope.errors import UsageError

if TYPE_CHECKING:
    from quantscope.imatrix import Imatrix
    from quantscope.monitor import Monitor
    from quantscope.qtypes import QuantType
    from quantscope.remedy.candidates import Catalog
    from quantscope.remedy.original import Original
    from quantscope.remedy.recipe import Found, Target
    from quantscope.remedy.recipe_file import Recipe
    from quantscope.weights import Weights

DEFAULT_CTX, DEFAULT_CHUNKS = 256, 160  # with a fifth that judges, enough for matrices with 16,000 inputs
RUN_CHUNKS = 32  # of each text, that predictions and measurements are made on

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A GGUF file, best F16, BF16 or F32, or a Hugging Face folder.", show_default=False)
]
Text = Annotated[
    Path,
    typer.Option(
        metavar="FILE", help="UTF-8 text that the recipe is found on; a fifth of it judges; - reads standard input.", show_default=False
    ),
]
Bpw = Annotated[float | None, typer.Option(metavar="X", help="Bits per weight, over all tensors.", show_default=False)]
Size = Annotated[str | None, typer.Option(metavar="SIZE", help="Size of the file, as in 600M or 4.5G.", show_default=False)]
MaxKl = Annotated[
    float | None, typer.Option("--max-kl", metavar="Y", help="KL divergence in nats per token: the smallest file.", show_default=False)
]
Types = Annotated[
    str | None, typer.Option(metavar="T,T,...", help="Tensor types to choose from.  [default: all that fit]", show_default=False)
]
ImatrixFile = Annotated[
    Path | None,
    typer.Option("--imatrix", metavar="FILE", help="Importance matrix.  [default: computed from the text]", show_default=False),
]
Ctx = Annotated[int, typer.Option(metavar="N", min=8, help="Tokens of a chunk of the text.")]
Chunks = Annotated[int, typer.Option(metavar="N", min=1, help="Use at most the first N chunks of the text.")]
Out = Annotated[Path, typer.Option("-o", "--out", metavar="FILE", help="The recipe; files for llama-quantize are written beside it.")]
Quantized = Annotated[Path | None, typer.Option(metavar="OUT.gguf", help="Also write the quantized model.", show_default=False)]
Correct = Annotated[
    str | None, typer.Option(metavar="rounding", help="Correct the rounding of --quantized, as quantize does.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, the tables on stderr.")]


@dataclass(frozen=True)
class Places:
    """Where the results go."""

    recipe: Path
    quantized: Path | None

    @property
    def lines(self) -> Path:
        return self.recipe.with_name(f"{self.recipe.stem}.tensor-types.txt")

    @property
    def page(self) -> Path:
        return self.recipe.with_suffix(".html")

    @property
    def imatrix(self) -> Path:
        return self.recipe.with_name(f"{self.recipe.stem}.imatrix.gguf")


def recipe(
    model: Model,
    text: Text,
    target_bpw: Bpw = None,
    target_size: Size = None,
    max_kl: MaxKl = None,
    types: Types = None,
    imatrix: ImatrixFile = None,
    ctx: Ctx = DEFAULT_CTX,
    chunks: Chunks = DEFAULT_CHUNKS,
    out: Out = Path("recipe.json"),
    quantized: Quantized = None,
    correct: Correct = None,
    json: Json = False,
    lang: LangOption = Lang.en,
) -> None:
    """Find the types of all tensors that give the lowest KL divergence for a size, or the smallest size for a KL divergence.

    Searched on predictions, decided by measurement on text that nothing was fitted to; the presets of llama-quantize that fit are
    candidates, so the recipe is never worse there than the best of them that was measured.

    Writes recipe.json, which `quantscope quantize --recipe` reads, and beside it a file for `llama-quantize --tensor-type-file` and the
    importance matrix that was used.
    """
    from quantscope.language import language
    from quantscope.remedy.original import original
    from quantscope.sources.resolve import open_source
    from quantscope.weights import Weights

    target = parse_target(target_bpw, target_size, max_kl)
    _check_correction(correct, quantized, imatrix)
    wanted, places = None if types is None else parse_types(types), Places(out, quantized)
    _check_places(places, [Path(model), text, *([imatrix] if imatrix else [])])
    source = open_source(model)
    try:
        whole, weights = original(source), Weights(source)
        _check_target(whole, places)
        found, catalog, weighing = _found(whole, weights, target, wanted, text, ctx, chunks, imatrix)
    finally:
        source.close()
    with language(lang.value):
        made = _write(found, catalog, weighing if imatrix is None else None, places, model)
        show(found, made, model, text, imatrix, places, json=json)
    if quantized is not None:
        with redirect_stdout(sys.stderr) if json else nullcontext():
            if correct is not None:
                quantize(model, quantized, recipe=out, correct=correct, text=text, ctx=ctx, chunks=chunks)
            else:
                quantize(model, quantized, recipe=out, imatrix=imatrix or places.imatrix)


def parse_target(bpw: float | None, size: str | None, kl: float | None) -> Target:
    """Exactly one of them, and a positive number."""
    from quantscope.remedy.recipe import Target

    given = {"--target-bpw": bpw, "--target-size": size, "--max-kl": kl}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise UsageError(
            f"{' and '.join(named) + ' were' if named else 'no target was'} given, expected one of {', '.join(given)}: what the recipe is "
            f"for. Give one, for example `--target-bpw 4.5`."
        )
    for name, value in (("--target-bpw", bpw), ("--max-kl", kl)):
        if value is not None and not 0 < value < float("inf"):
            raise UsageError(f"{name} {value}: expected a number above 0, for example `{name} {4.5 if name == '--target-bpw' else 0.01}`.")
    return Target(None if size is None else parse_size(size), bpw, kl)


def parse_size(given: str) -> int:
    """``600M``, ``4.5G``, ``1.5GiB`` → bytes; without a unit, bytes."""
    try:
        return parse_memory(given)
    except UsageError:
        raise UsageError(
            f"--target-size {given!r} is no size of a file, expected a number and a unit, as in --target-size 600M or 4.5G."
        ) from None


def _check_correction(correct: str | None, quantized: Path | None, imatrix: Path | None) -> None:
    parse_methods(correct)
    if correct and quantized is None:
        raise UsageError("--correct alone: the correction is in the quantized file. Say where with `--quantized OUT.gguf`.")
    check_one_importance(correct, imatrix)


def _check_places(places: Places, read: Sequence[Path]) -> None:
    """UsageError before minutes of work: for outputs without a folder, that are an input, or each other."""
    written = {
        "-o": (places.recipe, places.lines, places.page, places.imatrix),
        "--quantized": (places.quantized,) if places.quantized else (),
    }
    seen: list[Path] = []
    for option, path in ((option, path) for option, paths in written.items() for path in paths):
        folder = path.absolute().parent
        if not folder.is_dir() or path.is_dir():
            raise UsageError(f"{option} {path}: expected a file in a folder that exists. Make the folder first, or give another {option}.")
        if any(path.exists() and other.exists() and path.samefile(other) for other in read):
            raise UsageError(f"{option} {path}: this is an input, expected another file: it would be lost. Give another {option}.")
        if path.absolute() in seen:
            raise UsageError(f"{option} {path}: another result has this name already, expected one of its own. Give another {option}.")
        seen.append(path.absolute())


def _check_target(model: Original, places: Places) -> None:
    """Neither output is a file of the model, which may be a folder."""
    from quantscope.remedy.export import check_target

    for path in (places.recipe, places.lines, places.page, places.imatrix, *([places.quantized] if places.quantized else [])):
        check_target(model, path)


def _found(
    model: Original,
    weights: Weights,
    target: Target,
    wanted: list[QuantType] | None,
    text: Path,
    ctx: int,
    chunks: int,
    imatrix: Path | None,
) -> tuple[Found, Catalog, Imatrix]:
    """Predict, search and measure, with progress bars; also the importance matrix that was used."""
    from quantscope.cli.progress import watching
    from quantscope.remedy.calibration import calibration
    from quantscope.remedy.candidates import Catalog, default_types
    from quantscope.remedy.recipe import check_possible, find, importance_of
    from quantscope.remedy.sensitivity import n_stages, predict

    every = list(dict.fromkeys([*default_types(), *(wanted or [])]))
    check_possible(model, weights, target, wanted or every)
    ids, elsewhere = calibration(model.source, weights.config, text, ctx, chunks)
    given = None if imatrix is None else _importance(imatrix, weights)
    with watching() as monitor:
        weighing = given or importance_of(weights, ids, text.name, _Steps(monitor))
        some, others = ids[:RUN_CHUNKS], elsewhere[:RUN_CHUNKS]
        monitor.begin("predicting", n_stages(weights.config.n_layer), some.numel())
        predicted = predict(weights, some, every, importance=weighing.of, step=lambda done, what: monitor.step("predicting", done, what))
        catalog = Catalog(model, predicted, [t.name for t in wanted or every])
        found = find(catalog, weights, target, (some, others), weighing.of, _Steps(monitor))
    return found, catalog, weighing


def _importance(path: Path, weights: Weights) -> Imatrix:
    """A given importance matrix, of this model."""
    from quantscope.imatrix import check_imatrix, read_imatrix
    from quantscope.sources.base import show as shown

    matrix = read_imatrix(path)
    check_imatrix(matrix, shown(weights.source.path), {name: weights.shape(name) for name in weights.names()})
    return matrix


class _Steps:
    """Shows each measurement as a bar of its own."""

    def __init__(self, monitor: Monitor) -> None:
        self.monitor, self.begun = monitor, set[str]()

    def __call__(self, what: str, done: int, of: int) -> None:
        if what not in self.begun:
            self.begun.add(what)
            self.monitor.begin(what, of, 0)
        self.monitor.step(what, done, "")


def _write(found: Found, catalog: Catalog, imatrix: Imatrix | None, places: Places, model: str) -> Recipe:
    """recipe.json, the lines for llama-quantize and the page, all or none; and the importance matrix, where it was not given."""
    from json import dumps

    from quantscope.cli.output import write_files
    from quantscope.imatrix import write_imatrix
    from quantscope.remedy.recipe import as_recipe, type_lines
    from quantscope.report.page import html
    from quantscope.report.page.remedies import recipe_page

    made = as_recipe(found.chosen, catalog)
    if imatrix is not None:
        write_imatrix(places.imatrix, imatrix)
    texts = {places.recipe.name: dumps(made.document(), ensure_ascii=False, indent=1) + "\n", places.lines.name: type_lines(made)}
    texts[places.page.name] = html(recipe_page(found, Path(model).name))
    write_files(places.recipe.absolute().parent, texts)
    return made


def show(found: Found, made: Recipe, model: str, text: Path, imatrix: Path | None, places: Places, *, json: bool) -> None:
    from rich.console import Group
    from rich.text import Text as RichText

    from quantscope.cli.console import console
    from quantscope.report.prose import Prose
    from quantscope.report.recipe import answer, document, notes, tables
    from quantscope.report.text import grid
    from quantscope.wording import printable

    on = console(sys.stderr if json else sys.stdout)
    drawn = [part for table in tables(found) for part in grid(table, on.width)]
    said = (Prose(f"• {note}", style="dim") for note in notes(found))
    on.print(Group(Prose(answer(found), style="bold"), *drawn, RichText(), *said))
    wrote = console(sys.stderr)
    for path in (places.recipe, places.lines, places.page, *(() if imatrix else (places.imatrix,))):
        wrote.print(f"Wrote {printable(str(path))}.", markup=False, soft_wrap=True)
    if json:
        from quantscope.cli.output import print_document

        print_document(document(found, made, Path(model).name, str(text), None if imatrix is None else str(imatrix)))
