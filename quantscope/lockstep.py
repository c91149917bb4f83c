"""N variants of a model through the layers together: one layer's weights in memory at a time, made once for all that share them.

    for each layer i:  for each member: h = layer(h, weights of i)        then the head, a slice of positions at a time

The first member is the reference when there is one: what it shows at a tap is kept while the others pass the same layer, so that
every comparison is made on the spot and no activation is stored for later.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quantscope.arch.config import ModelConfig
from quantscope.errors import QuantscopeError
from quantscope.model.forward import cast, check_ids, embed, head, layer, tables
from quantscope.model.ops import exact_matmul
from quantscope.model.rope import RopeTables
from quantscope.qtypes import QuantType
from quantscope.quants import decode, encode
from quantscope.weights import WeightProvider, Weights

SLICE_BYTES = 256 << 20  # [bytes] logits of all members for one slice of positions


class Images:
    """The tensors of one file as they are, and as other types would store them; each made once, until ``release``."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self._made: dict[tuple[str, QuantType | None], Tensor] = {}

    def get(self, name: str, qtype: QuantType | None) -> Tensor:
        """decode(encode(tensor)) in float32; the tensor itself where ``qtype`` is None."""
        key = name, qtype
        if key not in self._made:
            self._made[key] = self.weights.get(name) if qtype is None else stored_as(self.get(name, None), qtype, name)
        return self._made[key]

    def rows(self, name: str, ids: Tensor, qtype: QuantType | None) -> Tensor:
        """Rows of a matrix, ids [...] → [...,m]; only those in use are read and encoded, as blocks never cross a row."""
        unique, inverse = torch.unique(ids, return_inverse=True)
        part = self.weights.rows(name, unique)  # [n,m]
        return (part if qtype is None else stored_as(part, qtype, name))[inverse.to(part.device)]

    def release(self) -> None:
        """Forget what was made: the layer is done."""
        self._made.clear()


def stored_as(tensor: Tensor, qtype: QuantType, name: str) -> Tensor:
    """What a file of this type holds instead of the tensor: decode(encode(x)), same shape, float32.

    Raises BlockError and NonFiniteError, naming the tensor.
    """
    x = tensor.cpu().numpy()
    try:
        raw = encode(x, qtype, x.shape[-1])
    except QuantscopeError as e:
        raise type(e)(f"tensor {name!r}: {e}") from e
    return torch.from_numpy(decode(raw, qtype)).reshape(tensor.shape).to(tensor.device)


class Requantized:
    """A WeightProvider: the tensors of ``images`` in the types of a recipe, by canonical name; tensors not named stay as they are."""

    def __init__(self, images: Images, types: Mapping[str, QuantType]) -> None:
        self.images, self.types = images, types

    @property
    def config(self) -> ModelConfig:
        return self.images.weights.config

    def rows(self, name: str, ids: Tensor) -> Tensor:
        return self.images.rows(name, ids, self.types.get(name))

    def layer(self, i: int) -> dict[str, Tensor]:
        return self._named(self.images.weights.layer_names(i))

    def top(self) -> dict[str, Tensor]:
        return self._named(self.images.weights.top_names())

    def rope_factors(self) -> Tensor | None:
        return self.images.weights.rope_factors()

    def _named(self, names: Mapping[str, str]) -> dict[str, Tensor]:
        return {local: self.images.get(name, self.types.get(name)) for local, name in names.items()}


@dataclass(frozen=True)
class Member:
    """One set of weights that walks along, and what to forget once its layer is done."""

    name: str
    weights: WeightProvider
    release: Callable[[], None] = lambda: None


class Observer(Protocol):
    """Sees every wanted tap of every member beside the reference's, and the logits of all members side by side."""

    @property
    def taps(self) -> Collection[str]:
        """Names of the wanted taps; the logits come by ``logits``."""

    def tap(self, member: int, name: str, ref: Tensor | None, x: Tensor) -> None:
        """One tap of one member, [B,T,channels]; ``ref`` is the same tap of the reference, None for the reference itself."""

    def logits(self, chunk: int, start: int, members: Sequence[Tensor]) -> None:
        """Logits [n,V] of each member at the positions start … start + n − 1 of one chunk."""


class _MemberTap:
    """The tap of one member: hands wanted tensors to the observer beside the reference's, which it finds in ``refs``."""

    def __init__(self, observer: Observer, member: int, refs: dict[str, Tensor], is_ref: bool) -> None:
        self.observer, self.member, self.refs, self.is_ref = observer, member, refs, is_ref

    def wants(self, name: str) -> bool:
        return name in self.observer.taps

    def __call__(self, name: str, x: Tensor, /) -> None:
        if not self.wants(name):
            return
        self.observer.tap(self.member, name, self.refs.get(name), x)
        if self.is_ref:
            self.refs[name] = x


@torch.no_grad()
def walk(
    ids: Tensor,
    members: Sequence[Member],
    observer: Observer,
    *,
    has_reference: bool,
    dtype: torch.dtype = torch.float32,
    step: Callable[[int], None] = lambda n: None,
) -> None:
    """Run ids [B,T] through all members together; everything of interest goes to the observer.

    has_reference: the first member is the one the others are compared with.  dtype: of weights and activations.
    step: called with the number of stages done (n_layer + 2 in all: embedding, layers, head).
    Raises PromptError for ids the model cannot take.
    """
    config = members[0].weights.config
    check_ids(ids, config)
    with exact_matmul():
        refs: dict[str, Tensor] = {}
        taps = [_MemberTap(observer, m, refs, has_reference and m == 0) for m in range(len(members))]
        hidden = [embed(ids, m.weights, tap, dtype=dtype) for m, tap in zip(members, taps, strict=True)]  # [B,T,E] each
        ropes = [tables(h, m.weights, dtype=dtype) for h, m in zip(hidden, members, strict=True)]
        step(1)
        for i in range(config.n_layer):
            refs.clear()
            _pass_layer(i, hidden, members, ropes, taps, dtype)
            step(i + 2)
        refs.clear()
        _pass_head(hidden, members, taps, observer, dtype)
        step(config.n_layer + 2)


def _pass_layer(
    i: int, hidden: list[Tensor], members: Sequence[Member], ropes: Sequence[RopeTables], taps: Sequence[_MemberTap], dtype: torch.dtype
) -> None:
    """All members through layer i; ``hidden`` is replaced in place."""
    for m, member in enumerate(members):
        w = cast(member.weights.layer(i), dtype)
        hidden[m] = layer(hidden[m], w, i, member.weights.config, ropes[m], taps[m])
    for member in members:
        member.release()


def _pass_head(
    hidden: Sequence[Tensor], members: Sequence[Member], taps: Sequence[_MemberTap], observer: Observer, dtype: torch.dtype
) -> None:
    """Logits of all members, a slice of positions at a time, so that they never are in memory all at once."""
    tops = [cast(m.weights.top(), dtype) for m in members]
    config, (B, T, _) = members[0].weights.config, hidden[0].shape
    n = max(1, SLICE_BYTES // (len(members) * config.n_vocab * hidden[0].element_size()))
    for b in range(B):
        for start in range(0, T, n):
            part = [h[b : b + 1, start : start + n] for h in hidden]  # [1,n,E] each
            logits = [head(h, w, m.weights.config, tap) for h, w, m, tap in zip(part, tops, members, taps, strict=True)]
            observer.logits(b, start, [x[0] for x in logits])
    for member in members:
        member.release()
