"""``quantscope study``: one model in many quantizations, or several files, layer by layer."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantscope.errors import UsageError

if TYPE_CHECKING:
    from quantscope.results import StudyOptions


class Positions(str, Enum):
    all = "all"
    last = "last"


class Device(str, Enum):
    cpu = "cpu"
    cuda = "cuda"


class Dtype(str, Enum):
    float32 = "float32"
    float64 = "float64"


Models = Annotated[list[str], typer.Argument(metavar="MODEL", help="GGUF files or Hugging Face folders.", show_default=False)]
Types = Annotated[
    str | None,
    typer.Option(
        metavar="T,T,...", help="Quantize one MODEL in memory to these presets or types.  [default: Q4_0,Q4_K_M,Q5_K_M,Q6_K,Q8_0]"
    ),
]
Ref = Annotated[str | None, typer.Option(metavar="MODEL", help="The original that the given files are compared with.")]
Prompt = Annotated[str | None, typer.Option(metavar="TEXT", help="Text to continue.  [default: Once upon a time]", show_default=False)]
Tokens = Annotated[str | None, typer.Option(metavar="ID,ID,...", help="Token ids instead of a prompt.")]
Text = Annotated[Path | None, typer.Option(metavar="FILE", help="UTF-8 text for KL divergence and perplexity.")]
Ctx = Annotated[int | None, typer.Option(metavar="N", help="Tokens per chunk of the text.  [default: 512]")]
Chunks = Annotated[int | None, typer.Option(metavar="N", help="Use only the first N chunks of the text.")]
PositionsOption = Annotated[Positions, typer.Option(help="Positions that the layer statistics cover.")]
DeviceOption = Annotated[Device, typer.Option(help="Where to compute.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Arithmetic of the reference forward.")]
Out = Annotated[Path | None, typer.Option(metavar="DIR", help="Where report.md and study.json go.  [default: quantscope-MODEL]")]
Json = Annotated[bool, typer.Option("--json", help="Print the content of study.json on stdout, the report on stderr.")]


def study(
    models: Models,
    types: Types = None,
    ref: Ref = None,
    prompt: Prompt = None,
    tokens: Tokens = None,
    text: Text = None,
    ctx: Ctx = None,
    chunks: Chunks = None,
    positions: PositionsOption = Positions.all,
    device: DeviceOption = Device.cpu,
    dtype: DtypeOption = Dtype.float32,
    out: Out = None,
    json: Json = False,
) -> None:
    """Run variants of a model side by side and show where and how much they differ.

    One MODEL: it is the original, and the variants are quantized from it in memory (--types).  Several MODELs, or one and --ref: each
    file is a variant as it is.
    """
    from quantscope.results import StudyOptions

    _check(models, types, ref, prompt, tokens, text, ctx, chunks)
    options = StudyOptions(
        models=tuple(models),
        types=_types(types, alone=len(models) == 1 and ref is None),
        ref=ref,
        prompt=prompt,
        tokens=None if tokens is None else parse_ids(tokens),
        text=text,
        n_ctx=ctx or StudyOptions.n_ctx,
        n_chunks=chunks,
        positions=positions.value,
        device=device.value,
        dtype=dtype.value,
    )
    study_and_show(options, out or default_folder(models[0]), json)


def study_and_show(options: StudyOptions, out: Path, json: bool) -> None:
    """Run a study, print it, and write report.md and study.json."""
    from quantscope.cli.console import console, progress_bar
    from quantscope.cli.output import check_folder, write_files
    from quantscope.report.markdown import markdown
    from quantscope.report.study_json import dump
    from quantscope.report.text import render

    check_folder(out)
    from quantscope.study import run_study  # after the checks that need no torch

    _check_device(options.device)
    with progress_bar() as progress:
        done = run_study(options, progress)
    document = dump(done)
    written = write_files(out, {"report.md": markdown(done), "study.json": document})
    human = console(sys.stderr if json else sys.stdout)
    human.print(render(done, human.width, full=str(out / "report.md")))
    if json:
        sys.stdout.write(document)
    console(sys.stderr).print(f"\nWrote {' and '.join(str(p) for p in written)}.", markup=False, soft_wrap=True)


def _check_device(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f"--device cuda: torch {torch.__version__} finds no usable CUDA device, expected one. Either there is no GPU or "
            f"this torch was built without CUDA: run with --device cpu."
        )


def default_folder(model: str) -> Path:
    """``quantscope-NAME`` in the current folder."""
    path = Path(model)
    name = path.resolve().stem if path.suffix == ".gguf" else path.resolve().name
    return Path(f"quantscope-{name}")


def _check(
    models: list[str],
    types: str | None,
    ref: str | None,
    prompt: str | None,
    tokens: str | None,
    text: Path | None,
    ctx: int | None,
    chunks: int | None,
) -> None:
    """UsageError for options that contradict each other."""
    if prompt is not None and tokens is not None:
        raise UsageError("--prompt and --tokens both say what to run, expected one of them. Leave one out.")
    if types is not None and len(models) > 1:
        raise UsageError(
            f"--types quantizes one model in memory, but {len(models)} models were given. Give one MODEL with --types, or several "
            f"without it: each file is then a variant as it is."
        )
    if types is not None and ref is not None:
        raise UsageError(
            "--types quantizes MODEL itself, which is then the original, so --ref has no place beside it. Leave out --ref, or leave "
            "out --types to compare the files as they are."
        )
    for name, value in (("--ctx", ctx), ("--chunks", chunks)):
        if value is not None and text is None:
            raise UsageError(f"{name} cuts a text into chunks, but there is no text. Add --text FILE, or leave {name} out.")
        if value is not None and value < 1:
            raise UsageError(f"{name} {value}: expected at least 1. Leave it out for the default.")


def _types(given: str | None, alone: bool) -> tuple[str, ...]:
    from quantscope.results import DEFAULT_TYPES

    if given is None:
        return DEFAULT_TYPES if alone else ()
    names = tuple(part.strip() for part in given.split(",") if part.strip())
    if not names:
        raise UsageError(f"--types {given!r} names no type, expected for example --types {','.join(DEFAULT_TYPES)}.")
    return names


def parse_ids(given: str) -> tuple[int, ...]:
    """``1,403,407`` → token ids; blanks separate as well as commas."""
    parts = given.replace(",", " ").split()
    for part in parts:
        if not (part.isascii() and part.isdigit()):
            raise UsageError(f"--tokens: {part!r} is no token id, expected numbers ≥ 0 with commas between, as in --tokens 1,403,407.")
    return tuple(int(part) for part in parts)
