"""What an engine is taken to do: which weights it reads, how it computes, which layers it runs.  A fault is a change of one of these.

Setup(weights, ids)                                         the reference
replace(setup, weights=Edited(setup.weights, ...))          an engine that reads the file otherwise
replace(setup, arithmetic=Altered(setup.arithmetic, ...))   one that computes otherwise
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quantscope.arch.config import ModelConfig
from quantscope.model.arithmetic import EXACT, Arithmetic
from quantscope.weights import ALL_IDS, LazyTensors, OnTop, WeightProvider

EMBEDDING = "token_embd.weight"
Edit = Callable[[str, str, Tensor], Tensor]  # (local name, canonical name, tensor as the file has it) → tensor as the engine takes it


@dataclass(frozen=True)
class Setup:
    """ids int64 [1,T].  n_prompt: tokens of the first batch, those after it are decoded one by one; None: all in one batch.

    times: how often a layer runs, by its index, where that is not once.
    """

    weights: WeightProvider
    ids: Tensor
    arithmetic: Arithmetic = EXACT
    n_prompt: int | None = None
    times: Mapping[int, int] = field(default_factory=dict)

    @property
    def config(self) -> ModelConfig:
        return self.weights.config


class Edited(OnTop):
    """A WeightProvider whose tensors are changed as they are read.

    matrices: of layers and head.  embedding: of the whole embedding matrix [V,E].  renamed: local name → the one whose tensor is read
    instead.  without: local names that are not read.
    """

    def __init__(
        self,
        inner: WeightProvider,
        *,
        matrices: Edit | None = None,
        embedding: Callable[[Tensor], Tensor] | None = None,
        renamed: Mapping[str, str] | None = None,
        without: Callable[[str], bool] = lambda local: False,
    ) -> None:
        super().__init__(inner)
        self._matrices, self._embedding = matrices, embedding
        self._renamed, self._without = renamed or {}, without

    def rows(self, name: str, ids: Tensor) -> Tensor:
        if self._embedding is None:
            return self.inner.rows(name, ids)
        return self._embedding(whole_embedding(self.inner))[ids]

    def layer(self, i: int) -> Mapping[str, Tensor]:
        return self._read(self.inner.layer(i), self.layer_names(i))

    def top(self, ids: slice = ALL_IDS) -> Mapping[str, Tensor]:
        return self._read(self.inner.top(ids), self.top_names())

    def _read(self, tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> Mapping[str, Tensor]:
        def edited(local: str) -> Tensor:
            tensor = tensors[self._renamed.get(local, local)]
            return tensor if self._matrices is None else self._matrices(local, names[local], tensor)

        return LazyTensors({local: local for local in names}, edited)

    def layer_names(self, i: int) -> Mapping[str, str]:
        return self._named(self.inner.layer_names(i))

    def top_names(self) -> Mapping[str, str]:
        return self._named(self.inner.top_names())

    def _named(self, names: Mapping[str, str]) -> dict[str, str]:
        return {local: names[self._renamed.get(local, local)] for local in names if not self._without(local)}


class Held(OnTop):
    """A WeightProvider that holds the layer it has read last, the head and the embedding, for many setups that read them in turn."""

    def __init__(self, inner: WeightProvider) -> None:
        super().__init__(inner)
        self._at: int | None = None
        self._layer: dict[str, Tensor] = {}
        self._rest: dict[str, Tensor] = {}

    def rows(self, name: str, ids: Tensor) -> Tensor:
        key = f"{name} {ids.tolist()}"
        if key not in self._rest:
            self._rest[key] = self.inner.rows(name, ids)
        return self._rest[key]

    def layer(self, i: int) -> Mapping[str, Tensor]:
        if i != self._at:
            self._at, self._layer = i, {}
        return self._held(self.inner.layer(i), self._layer)

    def top(self, ids: slice = ALL_IDS) -> Mapping[str, Tensor]:
        return self._held(self.inner.top(), self._rest)

    def _held(self, tensors: Mapping[str, Tensor], kept: dict[str, Tensor]) -> Mapping[str, Tensor]:
        def read(local: str) -> Tensor:
            if local not in kept:
                kept[local] = tensors[local]
            return kept[local]

        return LazyTensors({local: local for local in tensors}, read)


def reference(weights: WeightProvider, ids: Sequence[int], n_prompt: int | None = None) -> Setup:
    """The setup without a fault, for many that are made of it and read the same weights in turn."""
    return Setup(Held(weights), torch.tensor([list(ids)], dtype=torch.int64), n_prompt=n_prompt)


def whole_embedding(weights: WeightProvider) -> Tensor:
    """token_embd.weight, [V,E]."""
    return weights.rows(EMBEDDING, torch.arange(weights.config.n_vocab))


def file_weights(weights: WeightProvider) -> WeightProvider:
    """The provider at the bottom: the one that reads the file."""
    while isinstance(weights, Edited | Held):
        weights = weights.inner
    return weights
