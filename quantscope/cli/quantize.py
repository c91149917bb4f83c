"""``quantscope quantize``: a model file in other types, as llama-quantize writes it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantscope.errors import UsageError

if TYPE_CHECKING:
    from quantscope.imatrix import Imatrix
    from quantscope.remedy.correct import Corrected
    from quantscope.remedy.export import Written
    from quantscope.remedy.original import Original
    from quantscope.remedy.recipe_file import Recipe
    from quantscope.remedy.types import Choice
    from quantscope.sources.base import Source

HELD_BYTES = 2 << 30  # float32 tensors that a correction holds in memory; of larger models each is decoded when it is used
QUANTIZE_VERSION = 1  # of the JSON document

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A GGUF file, best F16, BF16 or F32, or a Hugging Face folder.", show_default=False)
]
Out = Annotated[Path, typer.Argument(metavar="OUT.gguf", help="The file to write.", show_default=False)]
Type = Annotated[str | None, typer.Option("--type", metavar="PRESET", help="A preset of llama-quantize, as in Q4_K_M.", show_default=False)]
RecipeFile = Annotated[
    Path | None,
    typer.Option("--recipe", metavar="FILE", help="A recipe.json, or a --tensor-type-file of llama-quantize.", show_default=False),
]
TensorType = Annotated[
    list[str] | None,
    typer.Option(metavar="REGEX=TYPE", help="Another type for the tensors in whose name it is found; may be repeated.", show_default=False),
]
ImatrixFile = Annotated[
    Path | None,
    typer.Option("--imatrix", metavar="FILE", help="Weigh the columns by an importance matrix of llama-imatrix.", show_default=False),
]
Correct = Annotated[
    str | None,
    typer.Option(
        metavar="rounding|scales|norms|equalize|bias,...",
        help="Correct the outputs on --text: codes and scales, scales alone, norm weights, channel scales, biases. Only biases add bytes.",
        show_default=False,
    ),
]
Text = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="UTF-8 text that corrections are fitted to; a fifth of it judges them; - reads standard input.",
        show_default=False,
    ),
]
Ctx = Annotated[int, typer.Option(metavar="N", min=8, help="Tokens of a chunk of the text.")]
Chunks = Annotated[int | None, typer.Option(metavar="N", min=1, help="Chunks of the text to use.  [default: all]", show_default=False)]
Pure = Annotated[bool, typer.Option("--pure", help="One type for all matrices, without the preset's rules.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


def quantize(
    model: Model,
    out: Out,
    type: Type = None,
    recipe: RecipeFile = None,
    tensor_type: TensorType = None,
    imatrix: ImatrixFile = None,
    pure: Pure = False,
    correct: Correct = None,
    text: Text = None,
    ctx: Ctx = 256,
    chunks: Chunks = None,
    json: Json = False,
) -> None:
    """Write a model in other types: the same bytes as llama-quantize for the same preset, or the types of a recipe.

    With --correct every matrix is corrected for the inputs it will really get, layer by layer, inside its type: what does not bring
    the predictions nearer to the original's, on the text and on a part of it that was not used, stays as llama-quantize --imatrix has it.

    The file is complete or absent, whatever happens meanwhile.  Its metadata say what it was made from (quantscope.*).
    """
    from quantscope.recipes import parse_override
    from quantscope.remedy.export import check_target
    from quantscope.remedy.original import original
    from quantscope.remedy.types import choose_types
    from quantscope.sources.resolve import open_source

    _check_correction(correct, text, imatrix)
    wanted, overrides = _recipe(type, recipe), [parse_override(t) for t in tensor_type or []]
    made = wanted.document() | _options(tensor_type, pure)
    source = open_source(model)
    try:
        whole = original(source)
        check_target(whole, out)
        weights, bare = (None, ()) if imatrix is None else _importance(imatrix, whole)
        choice = choose_types(whole, wanted, overrides, pure=pure, imatrix=weights is not None or text is not None)
        choice = replace(choice, notes=(*bare, *choice.notes))
        corrected = None if text is None else _corrected(source, choice, text, ctx, chunks, parse_methods(correct))
        made |= {} if text is None or corrected is None else {"correct": correct, "text": text.name} | _changed(corrected)
        written = _write(whole, out, choice, weights, made, corrected)
        show(whole, made, choice, written, corrected, json=json)
    finally:
        source.close()


def _check_correction(correct: str | None, text: Path | None, imatrix: Path | None) -> None:
    parse_methods(correct)
    if (correct is None) != (text is None):
        raise UsageError(
            f"--{'text' if correct is None else 'correct'} alone: corrections need `--correct rounding --text FILE`. Give both."
        )
    check_one_importance(correct, imatrix)


def parse_methods(correct: str | None) -> tuple[str, ...]:
    """The corrections in the order in which they are made.  UsageError for one that does not exist."""
    if correct is None:
        return ()
    from quantscope.remedy.correct import METHODS

    given = {word.strip() for word in correct.split(",")}
    unknown = sorted(given - set(METHODS))
    if unknown:
        raise UsageError(f"--correct {correct}: {unknown[0]!r} is no correction, expected some of {', '.join(METHODS)}, joined by commas.")
    return tuple(method for method in METHODS if method in given)


def check_one_importance(correct: str | None, imatrix: Path | None) -> None:
    """UsageError for a correction beside an importance matrix."""
    if correct and imatrix:
        raise UsageError(
            "--correct and --imatrix: a correction measures the importance on its own text, expected one of them. Leave one out."
        )


def _corrected(source: Source, choice: Choice, text: Path, ctx: int, chunks: int | None, methods: tuple[str, ...]) -> Corrected:
    """The corrected tensors, with a progress bar."""
    from quantscope.cli.progress import watching
    from quantscope.remedy.calibration import calibration
    from quantscope.remedy.correct import correct
    from quantscope.weights import Weights

    weights = Weights(source)
    held = sum(weights.source.tensors[weights.stored(name).name].n_elements for name in weights.stored_names()) * 4 <= HELD_BYTES
    weights = Weights(source, keep=held)
    ids, elsewhere = calibration(source, weights.config, text, ctx, chunks)
    n_layer = weights.config.n_layer
    with watching() as monitor:
        monitor.begin("layers", n_layer + 1, (ids.numel() + elsewhere.numel()) * (n_layer + 1))
        done = correct(weights, choice.types, ids, elsewhere, lambda n, what: monitor.step("layers", n, what), methods)
        monitor.step("layers", n_layer + 1, "")
        for note in done.notes:
            monitor.note(note)
    return done


def _changed(c: Corrected) -> dict[str, list[str]]:
    """What was changed beside the codes of its type, for the file's account of its making."""
    found: dict[str, list[str]] = {}
    for row in c.rows:
        if row.kept and row.correction not in ("rounding", "scales"):
            found.setdefault(row.correction, []).append(row.name)
    return found


def _importance(path: Path, model: Original) -> tuple[Imatrix, tuple[str, ...]]:
    """The importance matrix, and what is to be said about it."""
    from quantscope.imatrix import check_imatrix, read_imatrix
    from quantscope.sources.base import show as shown
    from quantscope.wording import count, idle_experts

    imatrix = read_imatrix(path)
    bare = check_imatrix(imatrix, shown(model.source.path), {t.name: t.shape for t in model.tensors.values()})
    idle = idle_experts(imatrix.idle())
    notes = (
        f"{shown(path)} has no weights for {count(len(bare), 'tensor')}, encoded without: {', '.join(bare[:3])}." if bare else "",
        f"{shown(path)} knows nothing of some experts ({idle}), which its text does not reach: all their inputs count alike."
        if idle
        else "",
    )
    return imatrix, tuple(note for note in notes if note)


def _write(
    model: Original, out: Path, choice: Choice, weights: Imatrix | None, made: Mapping[str, Any], corrected: Corrected | None
) -> Written:
    """Say the notes, and write the file with a progress bar."""
    from json import dumps

    from quantscope.cli.progress import watching
    from quantscope.remedy.export import export

    with watching() as monitor:
        for note in choice.notes:
            monitor.note(note)
        monitor.begin("weights", sum(t.n_elements for t in model.tensors.values()), 0)
        monitor.step("weights", 0, "SHA-256 of the source")
        return export(
            model,
            out,
            choice.types,
            choice.file_type,
            **({} if corrected is None else corrected.arrays()),
            importance=weights.of if weights else lambda name: None,
            metadata={"quantscope.recipe": dumps(made, ensure_ascii=False)} | _imatrix_metadata(weights),
            step=lambda done, what: monitor.step("weights", done, what),
        )


def _imatrix_metadata(imatrix: Imatrix | None) -> dict[str, str | int]:
    """The keys that llama-quantize writes for an importance matrix."""
    if imatrix is None:
        return {}
    out: dict[str, str | int] = {"quantize.imatrix.entries_count": len(imatrix.entries)}
    if imatrix.path:
        out["quantize.imatrix.file"] = imatrix.path.name
    if imatrix.datasets:
        out["quantize.imatrix.dataset"] = imatrix.datasets[0]
    if imatrix.n_chunk:
        out["quantize.imatrix.chunks_count"] = imatrix.n_chunk
    return out


def _recipe(type_: str | None, path: Path | None) -> Recipe:
    """What --type and --recipe say together."""
    from quantscope.recipes import preset_name
    from quantscope.remedy.recipe_file import Recipe, read_recipe

    if type_ is None and path is None:
        raise UsageError("neither --type nor --recipe was given, expected one of them, for example `--type Q4_K_M`.")
    given = Recipe() if path is None else read_recipe(path)
    base = given.base if type_ is None else preset_name(type_)
    if given.base not in (None, base):
        raise UsageError(
            f'--type {type_} contradicts the recipe, whose "base" is {given.base}: expected one of them. Leave --type out, or the "base".'
        )
    return Recipe(base, given.types, given.exact)


def _options(tensor_types: list[str] | None, pure: bool) -> dict[str, Any]:
    """What was given beside the recipe."""
    return ({"tensor_type": tensor_types} if tensor_types else {}) | ({"pure": True} if pure else {})


def show(model: Original, recipe: Mapping[str, Any], choice: Choice, written: Written, corrected: Corrected | None, *, json: bool) -> None:
    from quantscope.cli.console import console
    from quantscope.wording import count, fixed, printable, size

    if json:
        from quantscope.cli.output import print_document

        print_document(document(model, recipe, choice, written, corrected))
        return
    rows: dict[str, int] = {}
    for t in written.tensors:
        rows[t.qtype.name] = rows.get(t.qtype.name, 0) + 1
    kinds = ", ".join(f"{name} × {n:,}" for name, n in sorted(rows.items(), key=lambda row: -row[1]))
    out = console(sys.stdout)
    out.print(
        f"{printable(str(written.path))}: {size(written.n_bytes)}, {fixed(written.bpw, 2)} bits per weight, "
        f"{count(len(written.tensors), 'tensor')}: {kinds}.",
        markup=False,
        soft_wrap=True,
    )
    if corrected is not None:
        out.print(_said(corrected), markup=False, soft_wrap=True)


def _said(c: Corrected) -> str:
    """A line for each correction: how often it was kept, by how much the error fell, and where it was not."""
    return "\n".join(_said_of(correction, c) for correction in dict.fromkeys(row.correction for row in c.rows))


def _said_of(correction: str, c: Corrected) -> str:
    from statistics import median

    from quantscope.wording import count, percent, some

    rows = [row for row in c.rows if row.correction == correction]
    kept, left = [row for row in rows if row.kept], [row.name for row in rows if not row.kept]
    rest = f" Not better on both texts, so left as they were: {some(left, 6)}." if left else ""
    if not kept:
        return f"{correction}: helped on both texts nowhere.{rest}"
    gain = median(row.error_elsewhere for row in kept)
    return (
        f"{correction}: kept in {len(kept)} of {count(len(rows), 'place')}: on text that was not used the error of the outputs falls to "
        f"{percent(gain)} of what it was without (median).{rest}"
    )


def document(model: Original, recipe: Mapping[str, Any], choice: Choice, written: Written, corrected: Corrected | None) -> dict[str, Any]:
    """The types, sizes and origin of the new file as plain data."""
    return {
        "version": QUANTIZE_VERSION,
        "file": str(written.path),
        "bytes": written.n_bytes,
        "bpw": written.bpw,
        "file_type": choice.file_type,
        "source": {"file": str(model.source.path), "sha256": model.source.sha256(), "bytes": model.source.file_bytes},
        "recipe": dict(recipe),
        "types": {t.name: t.qtype.name for t in written.tensors},
        "notes": [*choice.notes, *(corrected.notes if corrected else ())],
        "corrections": None if corrected is None else [asdict(row) for row in corrected.rows],
    }
