"""Greedy continuation, one token at a time over a key/value cache."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from quantscope.model.forward import KVCache, forward
from quantscope.weights import WeightProvider


def generate(
    ids: Sequence[int], weights: WeightProvider, n: int, *, stop: Collection[int] = (), dtype: torch.dtype = torch.float32
) -> list[int]:
    """Up to n token ids, each the arg max of the logits after all before it (the lowest id on ties).

    Ends early after a token of ``stop`` (which is included) or when the context is full.  Each token walks through all layers:
    give weights that keep their tensors (``Weights(..., keep=True)``).  Raises PromptError as ``forward`` does.
    """
    cache, new = KVCache(), list(ids)
    out: list[int] = []
    while len(out) < n and (not out or cache.n_past + len(new) <= weights.config.n_ctx):
        logits = forward(torch.tensor([new], dtype=torch.int64), weights, dtype=dtype, cache=cache)  # [1,T,V]
        new = [int(logits[0, -1].argmax())]
        out += new
        if new[0] in stop:
            break
    return out
