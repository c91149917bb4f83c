"""The same rows of token ids with and without a quantized key/value cache: here, and in llama.cpp."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from quantscope.engines.llama_session import LlamaSession
from quantscope.model.arithmetic import EXACT
from quantscope.model.cache import CachedArithmetic, held_by, parse_cache
from quantscope.model.forward import forward
from quantscope.weights import Weights

Rows = list[list[int]]


def ours(weights: Weights, rows: Rows, kv: str | None = None) -> Tensor:
    """Logits [tokens,V] float64; None: keys and values are exact."""
    arithmetic = EXACT if kv is None else CachedArithmetic(parse_cache(kv), turns=not held_by(weights).shared)
    return torch.cat([forward(torch.tensor([row]), weights, arithmetic=arithmetic)[0] for row in rows]).double()


def theirs(path: Path, rows: Rows, kv: str) -> Tensor:
    """The same of llama.cpp; ``q8_0/q4_0``: types of keys and values."""
    keys, _, values = kv.upper().partition("/")
    with LlamaSession(path, n_ctx=len(rows[0]), kv=keys, values=values or None) as llama:
        return torch.from_numpy(np.concatenate([llama.decode(row) for row in rows])).double()


def kl(p: Tensor, q: Tensor) -> float:
    """Mean KL(softmax p ‖ softmax q) over the rows [nats]."""
    a, b = p.log_softmax(-1), q.log_softmax(-1)
    return float((a.exp() * (a - b)).sum(-1).mean())


def nmse(ref: Tensor, test: Tensor) -> float:
    return float((ref - test).square().sum() / ref.square().sum())
