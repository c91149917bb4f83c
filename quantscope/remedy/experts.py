"""Correcting the matrices of experts: each for the inputs that its own tokens bring, in the already corrected model.

    Eₑ(Ŵ) = Σᵢ rᵢᵀ Hₑ rᵢ,   r = Wₑ − Ŵₑ row by row,   Hₑ = Σ x̂·x̂ᵀ over the tokens that the corrected model sends to expert e

Rounding as of every other matrix (rounding.py), toward Wₑ itself: the two models may send a token to different experts, so an expert's
inputs in one have no counterpart in the other.  An expert's matrix is corrected where E falls on both texts; of few tokens little can be
learnt, and one that no token reaches stays as llama-quantize has it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quantscope.model.arithmetic import Arithmetic
from quantscope.qtypes import QuantType
from quantscope.quants import encode
from quantscope.quants.codes import Bytes
from quantscope.remedy.rounding import output_error

# local names of the stacks, those that read the same inputs together, in the order of the graph
STACKS = (("ffn_gate_exps", "ffn_up_exps", "ffn_gate_up_exps"), ("ffn_down_exps",))

Inputs = Mapping[int, Tensor]  # expert → [n,in], what its tokens bring; experts without tokens are missing
Improve = Callable[[Tensor, Bytes, Tensor, QuantType], Bytes]  # (W, plain bytes, H, type) → bytes


class Routed(Arithmetic):
    """The exact operations; keeps what each expert of one stack multiplies."""

    def __init__(self, stack: str) -> None:
        self._stack, self._rows = stack, dict[int, list[Tensor]]()

    def expert_linear(self, x: Tensor, w: Mapping[str, Tensor], name: str, e: int) -> Tensor:
        if name == self._stack:
            self._rows.setdefault(e, []).append(x)
        return super().expert_linear(x, w, name, e)

    def inputs(self) -> Inputs:
        return {e: torch.cat(rows) for e, rows in self._rows.items()}


@dataclass(frozen=True)
class Stack:
    """Bytes of a stack [n_expert, bytes of a matrix], and the error Σ Eₑ on each text."""

    raw: Bytes
    errors: tuple[float, ...]


def importance_of(inputs: Inputs, n_expert: int, n_in: int) -> Tensor:
    """Mean square of every input, float32 [n_expert,in]; 1 for an expert without tokens, as llama-quantize takes it."""
    found = torch.ones(n_expert, n_in)
    for e, x in inputs.items():
        found[e] = x.double().square().mean(0).float()
    return found


def plain_stack(matrix: Callable[[int], Tensor], importance: Tensor, qtype: QuantType) -> Bytes:
    """A stack as llama-quantize --imatrix rounds it, uint8 [n_expert, bytes of a matrix].  matrix: expert → [out,in]."""
    return np.stack([encode(matrix(e).numpy(), qtype, len(own), own.numpy()) for e, own in enumerate(importance)])


def corrected_stack(
    matrix: Callable[[int], Tensor], raw: Bytes, texts: Sequence[Inputs], qtype: QuantType, improve: Improve
) -> tuple[Stack, Stack]:
    """(plain, corrected).  texts: the inputs on the text to fit to, and on the other one."""
    new, before, after = raw.copy(), [0.0] * len(texts), [0.0] * len(texts)
    for e in texts[0]:
        w, grams = matrix(e), [_gram(inputs[e]) for inputs in texts if e in inputs]
        old = [output_error(w, raw[e], gram, qtype) for gram in grams]
        tried = improve(w.double(), raw[e], grams[0], qtype)
        now = [output_error(w, tried, gram, qtype) for gram in grams]
        better = len(grams) == len(texts) and all(a < b for a, b in zip(now, old, strict=True))
        if better:
            new[e] = tried
        for k, (a, b) in enumerate(zip(now if better else old, old, strict=True)):
            after[k] += a
            before[k] += b
    return Stack(raw, tuple(before)), Stack(new, tuple(after))


def _gram(x: Tensor) -> Tensor:
    x = x.double()
    return x.T @ x
