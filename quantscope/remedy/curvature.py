"""How much the predictions feel a change of the embedding: the curvature of the KL divergence at the rows that the text reads.

    KL ≈ ½ δᵀ F δ,   F = Σ g·gᵀ,   g: gradient of Σₜ log p(yₜ) at one position's row, yₜ drawn from the model's own p

So the rows of the embedding are rounded under F as those of a matrix are under the products of its inputs.
Source: the Fisher information of a softmax, as in ``probe``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantscope.model.forward import embedded, head, layer, tables
from quantscope.remedy.probe import back_through, from_head
from quantscope.weights import Weights


def embedding_curvature(ids: Tensor, w: Weights, seed: int = 0) -> Tensor:
    """F of a text, ids [C,T] → [E,E] float64; one forward and one backward pass, a chunk at a time."""
    draw, config = torch.Generator().manual_seed(seed), w.config
    total = torch.zeros(config.n_embd, config.n_embd, dtype=torch.float64)
    for chunk in torch.split(ids, 1):
        rows = w.rows("token_embd.weight", chunk)  # [1,T,E]
        states = [embedded(rows, w)]
        rope = tables(states[0], w)
        for i in range(config.n_layer):
            states.append(layer(states[-1], w.layer(i), i, config, rope))
        g = from_head(states.pop(), lambda h: head(h, w.top(), config).log_softmax(-1)[0], draw)
        for i in reversed(range(config.n_layer)):
            g, _ = back_through(states.pop(), g, w.layer(i), i, config, rope)
        g = _at_rows(rows, g, w).flatten(0, 1).double()  # [T,E]
        total += g.T @ g
    return total


def _at_rows(rows: Tensor, grad: Tensor, w: Weights) -> Tensor:
    """The gradient at rows of the embedding from that at the hidden state they become, [1,T,E] each."""
    with torch.enable_grad():
        rows = rows.detach().requires_grad_()
        h = embedded(rows, w)
    (at_rows,) = torch.autograd.grad(h, rows, grad)
    return at_rows
