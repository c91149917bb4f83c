"""``quantscope trace``: run one engine on some tokens and keep what it shows at every tap."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantscope.cli.study import parse_ids
from quantscope.errors import UsageError

if TYPE_CHECKING:
    from quantscope.engines import Request
    from quantscope.trace import Trace


class EngineName(str, Enum):
    reference = "reference"
    llama_cpp = "llama.cpp"
    transformers = "transformers"


class ArithmeticName(str, Enum):
    exact = "exact"
    ggml = "ggml"
    bf16 = "bf16"


class KV(str, Enum):
    F16 = "F16"
    F32 = "F32"


class DtypeName(str, Enum):
    float32 = "float32"
    float64 = "float64"
    bfloat16 = "bfloat16"


Model = Annotated[str, typer.Argument(metavar="MODEL", help="A GGUF file or a Hugging Face folder.", show_default=False)]
EngineOption = Annotated[EngineName, typer.Option(help="Who runs the model.")]
ArithmeticOption = Annotated[
    ArithmeticName, typer.Option(help="Of the reference: exact, or what ggml's CPU code or Transformers in bfloat16 does to numbers.")
]
Prompt = Annotated[str | None, typer.Option(metavar="TEXT", help="What to run.  [default: Once upon a time]", show_default=False)]
Tokens = Annotated[str | None, typer.Option(metavar="ID,ID,...", help="Token ids instead of a prompt.")]
Taps = Annotated[str | None, typer.Option(metavar="REGEX", help="Keep only the taps whose names it is found in, as in 'l_out|result'.")]
Fingerprint = Annotated[bool, typer.Option("--fingerprint", help="Keep 64 bytes a tap instead of its values.")]
KVOption = Annotated[KV, typer.Option(help="Type of llama.cpp's key/value cache, and of the emulated one.")]
DtypeOption = Annotated[DtypeName, typer.Option(help="Arithmetic of the reference (float32, float64) or Transformers (float32, bfloat16).")]
Threads = Annotated[int | None, typer.Option(metavar="N", min=1, help="Threads of llama.cpp.  [default: all]", show_default=False)]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        metavar="FILE",
        help="The trace; with --fingerprint, a name in .txt makes text lines.  [default: NAME-ENGINE.safetensors]",
    ),
]
NoFloor = Annotated[bool, typer.Option("--no-floor", help="Do not add the floor that ggml's arithmetic sets each tap to an exact trace.")]
Steps = Annotated[bool, typer.Option("--steps", help="Decode token by token over the key/value cache instead of in one batch.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


def trace(
    model: Model,
    engine: EngineOption = EngineName.reference,
    arithmetic: ArithmeticOption = ArithmeticName.exact,
    prompt: Prompt = None,
    tokens: Tokens = None,
    taps: Taps = None,
    fingerprint: Fingerprint = False,
    kv: KVOption = KV.F16,
    dtype: DtypeOption = DtypeName.float32,
    threads: Threads = None,
    steps: Steps = False,
    no_floor: NoFloor = False,
    out: Out = None,
    json: Json = False,
) -> None:
    """Run an engine on some tokens and keep every tap, for `quantscope compare`.

    The engine runs in a process of its own; its own messages appear only when it fails.
    """
    from quantscope.cli.console import console
    from quantscope.engines import Request, check
    from quantscope.inputs import prompt_ids
    from quantscope.sources.resolve import short_name

    text_lines = out is not None and out.suffix == ".txt"
    if text_lines and not fingerprint:
        raise UsageError(
            f"-o {out}: text lines hold fingerprints only, expected --fingerprint with it. Add it, or give a name that "
            f"ends in .safetensors."
        )
    if prompt is not None and tokens is not None:
        raise UsageError("--prompt and --tokens both say what to run, expected one of them. Leave one out.")
    ids = prompt_ids(model, prompt) if tokens is None else parse_ids(tokens)
    request = Request(
        engine.value,
        model,
        tuple(ids),
        arithmetic.value,
        dtype.value,
        kv.value,
        threads,
        taps,
        fingerprint,
        predict=not no_floor,
        steps=steps,
    )
    check(request)
    path = out or Path(f"{short_name(model)}-{engine.value}.safetensors")
    made = _run(request, path, text_lines)
    if json:
        from quantscope.cli.output import print_document

        print_document(_document(made, path))
    else:
        console(sys.stdout).print(_summary(made, path), markup=False, soft_wrap=True)
    console(sys.stderr).print(f"Wrote {path}.", markup=False, soft_wrap=True)


def _run(request: Request, path: Path, text_lines: bool) -> Trace:
    """The trace of the request, written to ``path``."""
    import tempfile

    from quantscope.engines.isolated import run_to_file

    if not text_lines:
        return run_to_file(request, path)
    from quantscope.cli.output import write_files
    from quantscope.fingerprint import run_line, to_line
    from quantscope.trace import Fingerprint as Printed

    with tempfile.TemporaryDirectory() as folder:
        made = run_to_file(request, Path(folder) / "t.safetensors")
    lines = [to_line(tap, p) for tap in made.taps for p in made.all_of(tap, Printed)]
    write_files(path.absolute().parent, {path.name: "\n".join([run_line(made.origin), *lines, ""])})
    return made


def _summary(made: Trace, path: Path) -> str:
    from quantscope.wording import count, size

    o = made.origin
    lines = [
        f"{made.title}, {o.engine_version}, {o.arithmetic}: {count(len(made.taps), 'tap')} at {count(len(o.tokens or ()), 'position')}, "
        f"{size(path.stat().st_size)}."
    ]
    return "\n".join([*lines, *o.notes])


def _document(made: Trace, path: Path) -> dict[str, object]:
    from dataclasses import asdict

    return {"version": 1, "path": str(path), "origin": asdict(made.origin), "taps": list(made.taps)}
