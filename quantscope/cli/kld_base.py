"""``quantscope kld-base``: a model's log-probabilities on a text, as llama-perplexity's ``--kl-divergence`` reads them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from quantscope.cli.study import Chunks, Ctx, Device, DeviceOption, Dtype, DtypeOption, Memory, check_device, text_options

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A GGUF file or a Hugging Face folder.", show_default=False)]
Text = Annotated[
    Path, typer.Option(metavar="FILE", help="UTF-8 text that the model is run on; - reads standard input.", show_default=False)
]
Base = Annotated[Path, typer.Option("-o", "--out", metavar="BASE", help="The file to write.", show_default=False)]


def kld_base(
    model: Model,
    text: Text,
    out: Base,
    ctx: Ctx = None,
    chunks: Chunks = None,
    memory: Memory = None,
    device: DeviceOption = Device.cpu,
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """Write the base that `llama-perplexity -m OTHER --kl-divergence-base BASE --kl-divergence` compares another file with.

    The same file also stands in for an original here: `quantscope study OTHER --kl-divergence-base BASE --text FILE`.
    """
    from quantscope.cli.console import console
    from quantscope.cli.progress import watching
    from quantscope.wording import count, printable, size

    options = text_options(model, text, ctx, chunks, memory, device, dtype)
    from quantscope.kld_base import check_room, prepare_base, write_base

    check_device(options.device)
    with watching() as monitor:
        job = prepare_base(options)
        check_room(out, job.size)
        n_chunk, n_ctx = job.text.ids.shape
        monitor.note(f"{printable(str(out))} will have {size(job.size)}: {count(n_chunk, 'chunk')} of {n_ctx:,} tokens.")
        monitor.note(f"Plan: {job.plan.sentence(n_ctx)}.")
        monitor.begin("text", job.plan.n_batches * job.n_steps, job.text.ids.numel())
        write_base(out, job, lambda done: monitor.step("text", done, f"step {done % job.n_steps or job.n_steps}/{job.n_steps} of a batch"))
    console(sys.stderr).print(f"Wrote {printable(str(out))}.", markup=False, soft_wrap=True)
