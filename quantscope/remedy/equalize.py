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

# tap → what makes its channels: a norm's weight, or the matrix whose rows they are
MAKERS: dict[str, str] = {"attn_norm": "attn_norm", "ffn_norm": "ffn_norm", "kqv_out": "attn_v", "ffn_swiglu": "ffn_up"}
POWERS = (0.25, 0.5, 0.75)  # of the inputs' size that are tried


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
        return LazyTensors(self.layer_names(i), self.band)

    def top(self, ids: slice = ALL_IDS) -> Mapping[str, Tensor]:
        return top_tensors(self.top_names(), ids, self.band)


def scales(rms: Tensor, power: float, tap: str, config: ModelConfig) -> Tensor:
    """s = (rms/geometric mean)^power, float32 [channels of the tap]; for kqv_out alike in all heads that share a head of v.

    rms: of the tap's channels, [in].  Channels that are always 0 keep s = 1.
    """
    size = rms.double().square()
    if tap == "kqv_out":
        size = (
            size.reshape(config.n_head_kv, config.n_group, config.head_dim).mean(1, keepdim=True).expand(-1, config.n_group, -1).reshape(-1)
        )
    dead = size == 0
    log = 0.5 * torch.where(dead, 1.0, size).log()
    log = log - log[~dead].mean() if not dead.all() else log
    return torch.where(dead, 0.0, power * log).exp().float()


def of_maker(s: Tensor, tap: str, config: ModelConfig) -> Tensor:
    """1/s for the rows of what makes the tap: of kqv_out one for each channel of v."""
    if tap == "kqv_out":
        s = s.reshape(config.n_head_kv, config.n_group, config.head_dim)[:, 0].reshape(-1)
    return 1 / s
