"""``quantscope quantize``: a model file in other types, as llama-quantize writes it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantscope.errors import UsageError

if TYPE_CHECKING:
    from quantscope.imatrix import Imatrix
    from quantscope.remedy.export import Written
    from quantscope.remedy.original import Original
    from quantscope.remedy.recipe_file import Recipe
    from quantscope.remedy.types import Choice

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
    json: Json = False,
) -> None:
    """Write a model in other types: the same bytes as llama-quantize for the same preset, or the types of a recipe.

    The file is complete or absent, whatever happens meanwhile.  Its metadata say what it was made from (quantscope.*).
    """
    from quantscope.recipes import parse_override
    from quantscope.remedy.export import check_target
    from quantscope.remedy.original import original
    from quantscope.remedy.types import choose_types
    from quantscope.sources.resolve import open_source

    wanted, overrides = _recipe(type, recipe), [parse_override(t) for t in tensor_type or []]
    made = wanted.document() | _options(tensor_type, pure)
    source = open_source(model)
    try:
        whole = original(source)
        check_target(whole, out)
        weights, bare = (None, ()) if imatrix is None else _importance(imatrix, whole)
        choice = choose_types(whole, wanted, overrides, pure=pure, imatrix=weights is not None)
        choice = replace(choice, notes=(*bare, *choice.notes))
        written = _write(whole, out, choice, weights, made)
        show(whole, made, choice, written, json=json)
    finally:
        source.close()


def _importance(path: Path, model: Original) -> tuple[Imatrix, tuple[str, ...]]:
    """The importance matrix, and what is to be said about it."""
    from quantscope.imatrix import check_imatrix, read_imatrix
    from quantscope.sources.base import show as shown
    from quantscope.wording import count

    imatrix = read_imatrix(path)
    bare = check_imatrix(imatrix, shown(model.source.path), {t.name: t.shape for t in model.tensors.values()})
    if not bare:
        return imatrix, ()
    return imatrix, (f"{shown(path)} has no weights for {count(len(bare), 'tensor')}, encoded without: {', '.join(bare[:3])}.",)


def _write(model: Original, out: Path, choice: Choice, weights: Imatrix | None, made: Mapping[str, Any]) -> Written:
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


def show(model: Original, recipe: Mapping[str, Any], choice: Choice, written: Written, *, json: bool) -> None:
    from quantscope.cli.console import console
    from quantscope.wording import count, fixed, printable, size

    if json:
        from quantscope.cli.output import print_document

        print_document(document(model, recipe, choice, written))
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


def document(model: Original, recipe: Mapping[str, Any], choice: Choice, written: Written) -> dict[str, Any]:
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
        "notes": list(choice.notes),
    }
