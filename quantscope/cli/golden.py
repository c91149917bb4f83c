"""``quantscope golden``: expected values for the tests of an engine, and a trace against them."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from quantscope.cli.study import parse_ids
from quantscope.errors import TraceContentError, UsageError

MAKE = "make"


class MakeByDefault(TyperGroup):
    """``golden MODEL`` is ``golden make MODEL``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = [MAKE, *args]
        return super().parse_args(ctx, args)


golden = typer.Typer(
    cls=MakeByDefault,
    help="Expected values for an engine's own tests: `golden MODEL -o DIR`, and `golden check DIR --trace T`.",
    rich_markup_mode=None,
    no_args_is_help=True,
)


class Tolerance(str, Enum):
    ggml = "ggml"
    exact = "exact"


Model = Annotated[str, typer.Argument(metavar="MODEL", help="A GGUF file or a Hugging Face folder.", show_default=False)]
Out = Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The pack; one that is there is replaced.", show_default=False)]
Prompt = Annotated[str | None, typer.Option(metavar="TEXT", help="Text of the probes.  [default: Once upon a time]", show_default=False)]
Tokens = Annotated[str | None, typer.Option(metavar="ID,ID,...", help="Token ids instead of a text.", show_default=False)]
ToleranceOption = Annotated[
    Tolerance,
    typer.Option("--arithmetic", help="Whose rounding the tolerances allow: ggml's (8-bit activations, F16 cache), or none but float32's."),
]
MaxBytes = Annotated[int, typer.Option(metavar="N", min=1, help="Leave out taps until the values fit into so many bytes.")]
PackFolder = Annotated[Path, typer.Argument(metavar="DIR", help="A golden pack.", show_default=False)]
TraceFile = Annotated[
    Path,
    typer.Option("--trace", metavar="T", help="Of `quantscope trace` or `quantscope import`, on the ids of a probe.", show_default=False),
]
ProbeName = Annotated[
    str | None, typer.Option("--probe", metavar="NAME", help="The probe.  [default: the one with the trace's ids]", show_default=False)
]
All = Annotated[bool, typer.Option("--all", help="Show every tap.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


@golden.command(MAKE, short_help="A pack of a model: `golden MODEL -o DIR` for short.")
def make(
    model: Model,
    out: Out,
    prompt: Prompt = None,
    tokens: Tokens = None,
    arithmetic: ToleranceOption = Tolerance.ggml,
    max_bytes: MaxBytes = 64_000_000,
    json: Json = False,
) -> None:
    """Write the expected values of a model as plain files, with tolerances, a README and a checker in C."""
    if prompt is not None and tokens is not None:
        raise UsageError("--prompt and --tokens both say what to run, expected one of them. Leave one out.")
    from quantscope.cli.console import console
    from quantscope.golden.folder import check_target, write_pack
    from quantscope.golden.make import make_pack

    check_target(out)
    ids = None if tokens is None else parse_ids(tokens)
    pack = make_pack(model, prompt=prompt, tokens=ids, ggml=arithmetic is Tolerance.ggml, max_bytes=max_bytes)
    write_pack(pack, out)
    if json:
        from quantscope.cli.output import print_document

        print_document({"version": 1, "path": str(out), "bytes": pack.n_bytes, "filed": pack.manifest["filed"]})
    from quantscope.wording import count, size

    said = f"{count(len(pack.files), 'file')}, {size(pack.n_bytes)}: {pack.manifest['filed']}. Begin with {out / 'README.md'}."
    console(sys.stderr if json else sys.stdout).print(said, markup=False, soft_wrap=True)


@golden.command(short_help="A trace against a pack, tap by tap.")
def check(folder: PackFolder, trace: TraceFile, probe: ProbeName = None, all_taps: All = False, json: Json = False) -> int:
    """Compare an engine's trace with the probe of the same token ids; exit code 0: within tolerance, 1: a tap is not."""
    from quantscope.cli.compare import show as show
    from quantscope.explain import answer
    from quantscope.golden.check import check as run
    from quantscope.golden.check import choose
    from quantscope.golden.folder import read_pack
    from quantscope.trace_file import load
    from quantscope.wording import count

    test = load(trace)
    chosen = choose(read_pack(folder), test, probe)
    c = run(chosen, test)
    show(c, f"Probe {chosen.name}. {answer(c)}", None, (), all_taps, json)
    if all(row.verdict == "not shown" for row in c.rows):
        raise TraceContentError(
            f"{trace}: statistics are all this trace has of the pack's {count(len(c.rows), 'tap')}; they differ nowhere, but cannot show "
            f"agreement, expected values, samples or fingerprints. Print fingerprints: docs/fingerprints.md has the code."
        )
    return 1 if c.first_divergence is not None else 0
