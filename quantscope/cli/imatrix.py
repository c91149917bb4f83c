"""``quantscope imatrix``: the importance matrix of a model on a text, as ``llama-quantize --imatrix`` takes it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantscope.cli.study import Chunks, Ctx, Device, DeviceOption, Memory, check_device, text_options

if TYPE_CHECKING:
    from quantscope.imatrix import Imatrix

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A GGUF file or a Hugging Face folder.", show_default=False)]
Text = Annotated[
    Path, typer.Option(metavar="FILE", help="UTF-8 text that the model is run on; - reads standard input.", show_default=False)
]
Out = Annotated[Path, typer.Option("-o", "--out", metavar="FILE.gguf", help="The file to write.", show_default=False)]
Output = Annotated[bool, typer.Option("--process-output", help="Also the output matrix, which llama-imatrix leaves out by default, too.")]
Json = Annotated[bool, typer.Option("--json", help="Print what was measured, tensor by tensor, as one JSON document on stdout.")]


def imatrix(
    model: Model,
    text: Text,
    out: Out,
    chunks: Chunks = None,
    ctx: Ctx = None,
    process_output: Output = False,
    memory: Memory = None,
    device: DeviceOption = Device.cpu,
    json: Json = False,
) -> None:
    """Write the mean square of every input of every matrix, from an exact run of the model on a text.

    Quantizing with it, here or with `llama-quantize --imatrix FILE.gguf`, keeps the columns precise that the text uses most.
    """
    from quantscope.cli.console import console
    from quantscope.cli.progress import watching
    from quantscope.imatrix import check_target, write_imatrix
    from quantscope.importance import compute_importance, prepare_importance
    from quantscope.wording import count, idle_experts, printable, size

    options = text_options(model, text, ctx, chunks, memory, device)
    check_device(options.device)
    check_target(out, [Path(model), text])
    with watching() as monitor:
        job = prepare_importance(options, process_output=process_output)
        n_chunk, n_ctx = job.text.ids.shape
        monitor.note(f"Plan: {count(n_chunk, 'chunk')} of {n_ctx:,} tokens, about {size(job.plan.planned_bytes)} of memory.")
        monitor.begin("text", job.plan.n_batches * job.n_steps, job.text.ids.numel())
        found = compute_importance(
            job, lambda n: monitor.step("text", n, f"step {n % job.n_steps or job.n_steps}/{job.n_steps} of a batch")
        )
        write_imatrix(out, found)
        if idle := idle_experts(found.idle()):
            monitor.note(
                f"No token reaches some of the experts ({idle}): with this file all their inputs count alike, here and in llama-quantize. "
                f"Use a longer text."
            )
    if json:
        from quantscope.cli.output import print_document

        print_document(document(found, out))
    of = f"{count(len(found.entries), 'matrix', 'matrices')}, {count(found.n_chunk, 'chunk')} of {found.n_ctx:,} tokens"
    console(sys.stderr).print(f"Wrote {printable(str(out))}: {of}.", markup=False, soft_wrap=True)


def document(found: Imatrix, path: Path) -> dict[str, Any]:
    """What ``--json`` prints: sums over the text and, for each matrix, mean and extremes of its inputs' mean squares."""
    tensors = []
    for name in sorted(found.entries):
        mean = found.entries[name].mean
        extremes = {"mean": float(mean.mean()), "smallest": float(mean.min()), "largest": float(mean.max()), "at": int(mean.argmax())}
        tensors.append({"name": name, "n_in": int(mean.size), "n_tokens": max(found.entries[name].counts), **extremes})
    return {
        "version": 1,
        "path": str(path),
        "datasets": list(found.datasets),
        "n_chunk": found.n_chunk,
        "n_ctx": found.n_ctx,
        "tensors": tensors,
    }
