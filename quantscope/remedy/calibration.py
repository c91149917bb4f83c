"""The text that corrections are fitted to, and the part of it that only judges them.

    chunks 0 … C − n − 1: calibration                chunks C − n … C − 1: elsewhere,  n = max(GATE_CHUNKS, C / 5)

A matrix with n_in inputs is fitted to an n_in × n_in matrix of their products, which as many tokens determine only just.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from quantscope.arch.config import ModelConfig
from quantscope.errors import PromptError
from quantscope.inputs import read_inputs, text_name
from quantscope.remedy.two_models import GATE_CHUNKS
from quantscope.results import StudyOptions
from quantscope.sources.base import Source

LEAST = 2  # calibration tokens for each input of the widest matrix: fewer fit their own noise
ENOUGH = 10  # from here on more text helps little


def calibration(source: Source, config: ModelConfig, path: Path, n_ctx: int, n_chunks: int | None = None) -> tuple[Tensor, Tensor]:
    """(calibration, elsewhere), ids [C,T] each.

    Raises PromptError where the text is too short, saying how much is needed, and what reading it raises.
    """
    text = read_inputs(StudyOptions(models=(str(source.path),), text=path, n_ctx=n_ctx, n_chunks=n_chunks), source, config).text
    assert text is not None
    n_else = max(GATE_CHUNKS, len(text.ids) // 5)
    widest = max(config.n_embd, config.n_ff, config.axis("Q"))
    n, needed = (len(text.ids) - n_else) * n_ctx, LEAST * widest
    if n < needed:
        judging = n_else * n_ctx
        raise PromptError(
            f"{text_name(path)}: {max(n, 0):,} tokens are left to fit corrections to, beside {judging:,} that judge them, expected at "
            f"least {needed:,}: {LEAST} for each of the {widest:,} inputs of the widest matrix. Give a text of {needed + judging:,} tokens "
            f"or more; {ENOUGH * widest:,} are enough."
        )
    return text.ids[:-n_else], text.ids[-n_else:]
