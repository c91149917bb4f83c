"""A text in the original and in the corrected model side by side: hidden states a layer at a time, inputs of a product, KL divergence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from quantscope.metrics import kl_nats
from quantscope.model.forward import embed, head, layer, tables
from quantscope.model.taps import EMBD, Tap, stem_of
from quantscope.qtypes import QuantType
from quantscope.quants import decode
from quantscope.quants.codes import Bytes
from quantscope.remedy.equalize import Equalized
from quantscope.remedy.experts import Inputs, Routed
from quantscope.remedy.refit import Sums
from quantscope.weights import ALL_IDS, LazyTensors, OnTop, top_tensors

GATE_CHUNKS = 4  # of each text, whose predictions are compared


class Rounded(OnTop):
    """A WeightProvider: a model's tensors, some of them as the bytes of another type say, some with other values, and new biases."""

    def __init__(self, inner: Equalized, types: Mapping[str, QuantType]) -> None:
        super().__init__(inner)
        self.base, self.types = inner, types
        self.bytes: dict[str, Bytes] = {}
        self.floats: dict[str, Tensor] = {}  # norm weights and biases, float32

    def get(self, name: str, ids: slice = ALL_IDS) -> Tensor:
        if name in self.floats:
            return self.floats[name][ids]
        if name in self.bytes:
            n_rows, *inner = self.base.shape(name)
            rows = self.bytes[name].reshape(n_rows, -1)[ids]  # of a stack each matrix is a row
            return torch.from_numpy(decode(rows.reshape(-1), self.types[name])).reshape(-1, *inner)
        return self.base.band(name, ids)

    def rows(self, name: str, ids: Tensor) -> Tensor:
        return self.get(name)[ids] if name in self.bytes else self.inner.rows(name, ids)

    def layer_names(self, i: int) -> Mapping[str, str]:
        prefix = f"blk.{i}."
        added = {name.removeprefix(prefix): name for name in self.floats if name.startswith(prefix)}
        return {**self.inner.layer_names(i), **added}

    def layer(self, i: int) -> Mapping[str, Tensor]:
        return LazyTensors(self.layer_names(i), self.get, lambda name, n: self.get(name, slice(n, n + 1))[0])

    def top(self, ids: slice = ALL_IDS) -> Mapping[str, Tensor]:
        return top_tensors(self.top_names(), ids, self.get)


class Text:
    """One text in both models: the hidden state before the layer at work, a chunk at a time."""

    def __init__(self, ids: Tensor, original: Equalized, rounded: Rounded) -> None:
        self.original, self.rounded = original, rounded
        self.chunks = torch.split(ids, 1)
        self.before = [embed(chunk, original) for chunk in self.chunks]  # [1,T,E] each
        self.own: list[Tensor] = []
        self.targets = [self._from(0, h, original) for h in self.before[:GATE_CHUNKS]]  # the original's logits

    def start(self) -> None:
        """From the embedding as it will be."""
        self.own = [embed(chunk, self.rounded) for chunk in self.chunks]

    def kl_of_embedding(self) -> float:
        """KL(original ‖ the rounded embedding, all else original) [nats]."""
        made = [self._from(0, embed(chunk, self.rounded), self.original) for chunk in self.chunks[:GATE_CHUNKS]]
        return sum(float(kl_nats(a[0], b[0]).mean()) for a, b in zip(self.targets, made, strict=True)) / len(made)

    def sums(self, i: int, tap: str) -> Sums:
        """Over all inputs that a tap of layer i (n_layer: of the head) has in both models."""
        found: Sums | None = None
        for x, y in zip(self._inputs(i, tap, self.before, self.original), self._inputs(i, tap, self.own, self.rounded), strict=True):
            if found is None:
                found = Sums.of(x, y)
            else:
                found += Sums.of(x, y)
        assert found is not None
        return found

    def _inputs(self, i: int, tap: str, hidden: Sequence[Tensor], w: Equalized | Rounded) -> Iterator[Tensor]:
        """[T,channels] of each chunk.  What layer i − 1 or the embedding has made is the state before layer i."""
        for h in hidden:
            if tap in (EMBD, "l_out"):
                yield h[0]
                continue
            try:
                if i < w.config.n_layer:
                    layer(h, w.layer(i), i, w.config, tables(h, w), _Until(tap))
                else:
                    head(h, w.top(), w.config, _Until(tap))
            except _Seen as seen:
                yield seen.value[0]

    def expert_inputs(self, i: int, stack: str, *, own: bool) -> Inputs:
        """What the experts of a stack of layer i multiply in the corrected model, or in the original."""
        seen = Routed(stack)
        hidden, w = (self.own, self.rounded) if own else (self.before, self.original)
        for h in hidden:
            layer(h, w.layer(i), i, w.config, tables(h, w), m=seen)
        return seen.inputs()

    def advance(self, i: int) -> None:
        """Past layer i."""
        for hidden, w in ((self.before, self.original), (self.own, self.rounded)):
            for k, h in enumerate(hidden):
                hidden[k] = layer(h, w.layer(i), i, w.config, tables(h, w))

    def output(self, i: int) -> Tensor:
        """The original's first chunk after layer i, [1,T,E]: what may not change when the layer is rewritten."""
        h = self.before[0]
        return layer(h, self.original.layer(i), i, self.original.config, tables(h, self.original))

    def kl(self, i: int) -> float:
        """KL(original ‖ corrected up to layer i, original after it), the mean over the gate's chunks [nats]."""
        total = 0.0
        for h, target in zip(self.own, self.targets, strict=False):
            total += float(kl_nats(target[0], self._through(i, h)[0]).mean())
        return total / len(self.targets)

    def _through(self, i: int, h: Tensor) -> Tensor:
        """Logits from the state before layer i: this layer as corrected, the others as in the original."""
        if i == self.original.config.n_layer:
            return head(h, self.rounded.top(), self.original.config)
        h = layer(h, self.rounded.layer(i), i, self.original.config, tables(h, self.original))
        return self._from(i + 1, h, self.original)

    def _from(self, i: int, h: Tensor, w: Equalized) -> Tensor:
        rope = tables(h, w)
        for k in range(i, w.config.n_layer):
            h = layer(h, w.layer(k), k, w.config, rope)
        return head(h, w.top(), w.config)


class _Seen(Exception):  # noqa: N818 - no error: what comes after the tap need not be computed
    def __init__(self, value: Tensor) -> None:
        self.value = value


class _Until(Tap):
    """A tap that ends the forward at one tensor."""

    def __init__(self, stem: str) -> None:
        self._stem = stem

    def wants(self, name: str) -> bool:
        return stem_of(name) == self._stem

    def __call__(self, name: str, x: Tensor, /) -> None:
        if self.wants(name):
            raise _Seen(x)
