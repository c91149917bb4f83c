"""The ``quantscope`` command: its subcommands, and what happens to errors.

Subcommand modules hold signatures and import what they need inside the function, so that ``--help`` stays under 0.3 s.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from quantscope import __version__
from quantscope.cli.compare import compare
from quantscope.cli.console import complain
from quantscope.cli.demo import demo
from quantscope.cli.diagnose import diagnose
from quantscope.cli.golden import golden
from quantscope.cli.imatrix import imatrix
from quantscope.cli.import_ import import_
from quantscope.cli.inspect import inspect
from quantscope.cli.kld_base import kld_base
from quantscope.cli.quantize import quantize
from quantscope.cli.recipe import recipe
from quantscope.cli.report import report
from quantscope.cli.sensitivity import sensitivity
from quantscope.cli.study import study
from quantscope.cli.tables import tables
from quantscope.cli.trace import trace
from quantscope.cli.weights import weights
from quantscope.errors import QuantscopeError, UsageError

INTERNAL_ERROR, INTERRUPTED, BROKEN_PIPE = 3, 130, 141
CLICK_USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]  # of the click that typer uses: it may bring its own copy

app = typer.Typer(
    name="quantscope",
    help=(
        "Says why a quantized language model's output differs: the quantization, the engine, the file or the prompt; layer by layer.\n\n"
        "Begin with `quantscope demo`, which runs the whole analysis on a bundled trained model."
    ),
    epilog="Exit codes: 0 done, 1 difference found, 2 bad usage or input, 3 internal error.",
    rich_markup_mode=None,  # importing rich's markdown would double the time of --help
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.command(short_help="The whole analysis of a bundled trained model.")(demo)
app.command(short_help="One model in many quantizations, layer by layer.")(study)
app.command(short_help="A finished study again: a page, Markdown or JSON.")(report)
app.command(short_help="A study's tables as CSV or Parquet files.")(tables)
app.command(short_help="What one engine shows at every tap.")(trace)
app.command("import", short_help="A trace of another engine's log, dump or table.")(import_)
app.command(short_help="Two traces tap by tap, and where they part.")(compare)
app.command(short_help="The quantization, the engine, the file or the prompt?")(diagnose)
app.command(short_help="Two files tensor by tensor, beyond their types.")(weights)
app.add_typer(golden, name="golden", short_help="Expected values for an engine's own tests.")
app.command(short_help="Which inputs of each matrix count, for llama-quantize.")(imatrix)
app.command(short_help="What each matrix in each type would cost, predicted.")(sensitivity)
app.command(short_help="Which type each tensor gets, for a size or a KL.")(recipe)
app.command(short_help="A model file in other types, as llama-quantize writes it.")(quantize)
app.command("kld-base", short_help="The file that llama-perplexity compares quantizations with.")(kld_base)
app.command(short_help="Tensors, types, bits per weight and metadata.")(inspect)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"quantscope {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: Sequence[str]) -> int:
    """Run one command line; returns the exit code and never raises."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a character shows its escape instead
    try:
        code = app(args=list(arguments), prog_name="quantscope", standalone_mode=False)
        sys.stdout.flush()
        if code == INTERRUPTED:  # typer makes this of a KeyboardInterrupt, and says nothing
            return _interrupted()
        return code if isinstance(code, int) else 0
    except QuantscopeError as e:
        complain(type(e).__name__, str(e))
        return e.exit_code
    except CLICK_USAGE_ERROR as e:
        complain(UsageError.__name__, _usage(e))
        return UsageError.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except (BrokenPipeError, SystemExit):  # into which typer turns a closed pipe, and nothing else here
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains again when it flushes at exit
        return BROKEN_PIPE
    except Exception:
        import traceback

        traceback.print_exc()
        complain(
            "internal error",
            "this is a mistake in quantscope, not in your input. Please report it with the lines above, the command you ran and the "
            "output of `quantscope --version`.",
        )
        return INTERNAL_ERROR


def _interrupted() -> int:
    complain(
        "Interrupted",
        "no report was written. A study of a text keeps its finished batches: give the same command again to go on, or see what there is "
        "with `quantscope report DIR`.",
    )
    return INTERRUPTED


def _usage(error: Exception) -> str:
    """click's message and the command that shows what is possible."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "quantscope"
    message = str(error.format_message()) if hasattr(error, "format_message") else str(error)
    return f"{message if message.endswith(('.', '?')) else message + '.'} Run `{command} --help` for what it takes."


def run() -> None:
    """Entry point of the console script."""
    sys.exit(main(sys.argv[1:]))
