"""``quantscope sensitivity``: what each matrix in each type would cost, predicted from one pass over a text."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantscope.cli.lang import Lang, LangOption
from quantscope.errors import UnsupportedTypeError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from quantscope.imatrix import Imatrix
    from quantscope.qtypes import QuantType
    from quantscope.remedy.sensitivity import Sensitivity
    from quantscope.weights import Weights

DEFAULT_TYPES = "Q2_K,Q3_K,Q4_K,Q5_K,Q6_K,Q8_0,Q4_0"
DEFAULT_CTX, DEFAULT_CHUNKS = 256, 32

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A GGUF file, best F16, BF16 or F32, or a Hugging Face folder.", show_default=False)
]
Text = Annotated[
    Path, typer.Option(metavar="FILE", help="UTF-8 text that the model is run on; - reads standard input.", show_default=False)
]
Types = Annotated[str, typer.Option(metavar="T,T,...", help="Tensor types to score.")]
Chunks = Annotated[int, typer.Option(metavar="N", help="Use at most the first N chunks of the text.")]
Ctx = Annotated[int, typer.Option(metavar="N", help="Tokens per chunk of the text.")]
ImatrixFile = Annotated[
    Path | None,
    typer.Option("--imatrix", metavar="FILE", help="Quantize with an importance matrix of llama-imatrix.", show_default=False),
]
Out = Annotated[
    Path | None, typer.Option("--out", "-o", metavar="DIR", help="Also write sensitivity.json and sensitivity.md.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, the tables on stderr.")]


def sensitivity(
    model: Model,
    text: Text,
    types: Types = DEFAULT_TYPES,
    chunks: Chunks = DEFAULT_CHUNKS,
    ctx: Ctx = DEFAULT_CTX,
    imatrix: ImatrixFile = None,
    out: Out = None,
    json: Json = False,
    lang: LangOption = Lang.en,
) -> None:
    """Predict how much the KL divergence grows when one matrix alone is stored in a coarser type, for every matrix and type.

    One forward and one backward pass over the text on the original: much less time than trying each of them.
    """
    from quantscope.cli.output import check_folder
    from quantscope.language import language
    from quantscope.sources.resolve import open_source
    from quantscope.weights import Weights

    wanted = parse_types(types)
    if out is not None:
        check_folder(out)
    source = open_source(model)
    try:
        weights = Weights(source)
        ids = _ids(weights, model, text, chunks, ctx)
        matrix = None if imatrix is None else _imatrix(imatrix, weights)
        found = _predict(weights, ids, wanted, matrix)
    finally:
        source.close()
    with language(lang.value):
        show(found, Path(model).name, str(text), None if imatrix is None else str(imatrix), out, json=json)


def parse_types(text: str) -> list[QuantType]:
    """``"Q4_K,Q6_K"``, any case, each once; UnsupportedTypeError for what is no type or is not written here."""
    from quantscope.qtypes import QTYPES
    from quantscope.quants import CODECS, can_encode

    found: dict[str, QuantType] = {}
    for word in filter(None, (w.strip().upper() for w in text.split(","))):
        if word not in QTYPES or not can_encode(QTYPES[word]):
            known = ", ".join(name for name, codec in CODECS.items() if codec.encoder)
            what = "is read here but not written" if word in QTYPES else "is no tensor type"
            raise UnsupportedTypeError(
                f"--types: {word!r} {what}, expected some of {known}. A preset as Q4_K_M mixes several of them: give its types, as in "
                f"`--types Q4_K,Q6_K`."
            )
        found[word] = QTYPES[word]
    if not found:
        raise UsageError(f"--types {text!r}: expected at least one tensor type, for example `--types {DEFAULT_TYPES}`.")
    return list(found.values())


def _ids(weights: Weights, model: str, text: Path, chunks: int, ctx: int) -> Tensor:
    from quantscope.inputs import read_inputs
    from quantscope.results import StudyOptions

    options = StudyOptions(models=(model,), text=text, n_ctx=ctx, n_chunks=chunks)
    given = read_inputs(options, weights.source, weights.config).text
    assert given is not None
    return given.ids


def _imatrix(path: Path, weights: Weights) -> Imatrix:
    from quantscope.imatrix import check_imatrix, read_imatrix
    from quantscope.sources.base import show as shown

    matrix = read_imatrix(path)
    check_imatrix(matrix, shown(weights.source.path), {name: weights.shape(name) for name in weights.names()})
    return matrix


def _predict(weights: Weights, ids: Tensor, types: list[QuantType], imatrix: Imatrix | None) -> Sensitivity:
    from quantscope.cli.progress import watching
    from quantscope.remedy.sensitivity import n_stages, predict

    with watching() as monitor:
        monitor.begin("text", n_stages(weights.config.n_layer), ids.numel())
        return predict(
            weights,
            ids,
            types,
            importance=imatrix.of if imatrix else lambda name: None,
            step=lambda done, what: monitor.step("text", done, what),
        )


def show(found: Sensitivity, model: str, text: str, imatrix: str | None, out: Path | None, *, json: bool) -> None:
    from rich.console import Group
    from rich.text import Text as RichText

    from quantscope.cli.console import console
    from quantscope.report.prose import Prose
    from quantscope.report.sensitivity import answer, document, notes, tables
    from quantscope.report.text import grid

    on = console(sys.stderr if json else sys.stdout)
    full = "sensitivity.md" if out is not None else "--out DIR"
    drawn = [part for table in tables(found) for part in grid(table, on.width, full)]
    said = (Prose(f"• {note}", style="dim") for note in notes(found))
    on.print(Group(Prose(answer(found), style="bold"), *drawn, RichText(), *said))
    data = document(found, model, text, imatrix)
    if out is not None:
        _write(out, found, model, data)
    if json:
        from quantscope.cli.output import print_document

        print_document(data)


def _write(out: Path, found: Sensitivity, model: str, data: dict[str, Any]) -> None:
    from json import dumps

    from quantscope.cli.console import console
    from quantscope.cli.output import write_files
    from quantscope.report.page import html
    from quantscope.report.page.remedies import sensitivity_page
    from quantscope.report.sensitivity import markdown
    from quantscope.wording import printable

    files = {"sensitivity.json": dumps(data, ensure_ascii=False, indent=1) + "\n", "sensitivity.md": markdown(found, model)}
    files["sensitivity.html"] = html(sensitivity_page(found, model))
    for path in write_files(out, files):
        console(sys.stderr).print(f"Wrote {printable(str(path))}.", markup=False, soft_wrap=True)
