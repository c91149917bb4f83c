"""Channel scales that the model does not notice: what makes a channel divides by s, what reads it multiplies by s.

    W·x = (W·diag(s))·(diag(s)⁻¹·x)                diag(s)⁻¹·x: a norm weight divided by s, or the rows of the matrix before divided by s

Rounding the columns of W·diag(s) makes other errors than rounding those of W: columns whose inputs are large are rounded more finely, and
inputs that were large no longer set the scale of the blocks an engine rounds activations in.

    norm → q, k, v        norm → gate, up
    up → down             down reads silu(gate)·up, which is linear in up
    v → output            s alike in heads that share a head of v

Sources: AWQ (Lin et al. 2023, arXiv:2306.00978), SmoothQuant (Xiao et al. 2022, arXiv:2211.10438), which choose s by the inputs' size
as here.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantscope.arch.config import ModelConfig
from quantscope.weights import ALL_IDS, LazyTensors, OnTop, Weights, top_tensors

# powers of the sizes of inputs and columns that are tried
POWERS = ((0.1, 0.0), (0.25, 0.0), (0.5, 0.0), (0.0, -0.5), (0.25, -0.25), (0.5, -0.5))


class Equalized(OnTop):
    """A WeightProvider: a file's tensors with rows and columns multiplied."""

    def __init__(self, inner: Weights) -> None:
        super().__init__(inner)
        self.file = inner
        self.row_factors: dict[str, Tensor] = {}
        self.column_factors: dict[str, Tensor] = {}

    def changed(self) -> set[str]:
        """The tensors that differ from the file's."""
        return {*self.row_factors, *self.column_factors}

    def shape(self, name: str) -> tuple[int, ...]:
        return self.file.shape(name)

    def band(self, name: str, ids: slice = ALL_IDS) -> Tensor:
        values = self.file.band(name, ids)
        if name in self.row_factors:
            by = self.row_factors[name][ids]
            values = values * (by if values.dim() == 1 else by[:, None])
        return values * self.column_factors[name] if name in self.column_factors else values

    def get(self, name: str) -> Tensor:
        return self.band(name)

    def layer(self, i: int) -> Mapping[str, Tensor]:
        return LazyTensors(self.layer_names(i), self.band, lambda name, n: self.band(name, slice(n, n + 1))[0])

    def top(self, ids: slice = ALL_IDS) -> Mapping[str, Tensor]:
        return top_tensors(self.top_names(), ids, self.band)


def scales(inputs: Tensor, columns: Tensor, powers: tuple[float, float], tap: str, config: ModelConfig) -> Tensor:
    """s = inputs^α · columns^β over its geometric mean, float32 [channels of the tap]; of kqv_out alike in heads that share a head of v.

    inputs: RMS of the tap's channels; columns: RMS of the columns that read them, [in] each.  powers: (α, β).  A channel that is 0 in
    either keeps s = 1.
    """
    dead = (inputs == 0) | (columns == 0)
    log = sum(p * torch.where(dead, 1.0, x.double()).log() for p, x in zip(powers, (inputs, columns), strict=True))
    assert isinstance(log, Tensor)
    if tap == "kqv_out":
        shared = config.n_head_kv, config.n_group, config.head_dim
        log, dead = (x.double().reshape(shared).mean(1, keepdim=True).expand(shared).reshape(-1) for x in (log, dead))
    alive = dead == 0
    return torch.where(alive, log - log[alive].mean(), 0.0).exp().float()


def of_maker(s: Tensor, tap: str, config: ModelConfig) -> Tensor:
    """1/s for the rows of what makes the tap: of kqv_out one for each channel of v."""
    if tap == "kqv_out":
        s = s.reshape(config.n_head_kv, config.n_group, config.head_dim)[:, 0].reshape(-1)
    return 1 / s
