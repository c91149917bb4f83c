"""One file's tensors as other types would store them: encoded once, kept as bytes, decoded at each use.

    images.get(name, Q4_K)  =  decode(encode(tensor))

Decoding is a few percent of a product over a thousand tokens, and the bytes are a seventh of the float32 values: so all variants of a
layer fit in memory where their float32 tensors would not, and each (tensor, type) is encoded once however many variants use it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from quantscope.errors import QuantscopeError
from quantscope.qtypes import QuantType
from quantscope.quants import Floats, decode, encode, torch_codecs
from quantscope.weights import ALL_IDS, LazyTensors, OnTop, Weights, top_tensors

BAND_BYTES = 64 << 20  # [bytes] float32 values that are encoded at a time

Importance = Callable[[str], Floats | None]


class Images:
    """The tensors of one file in any type; what was encoded is kept until ``let_go``.  Safe to use from two threads.

    importance: name → weights of the columns for the encoder, None where there are none.
    """

    def __init__(self, weights: Weights, importance: Importance = lambda name: None) -> None:
        self.weights, self._importance = weights, importance
        self._bytes: dict[tuple[str, QuantType], Tensor] = {}  # uint8, on the weights' device
        self._lock = threading.Lock()

    def get(self, name: str, qtype: QuantType | None, ids: slice = ALL_IDS) -> Tensor:
        """decode(encode(tensor)) in float32, or the rows ``ids`` of it; the tensor itself where ``qtype`` is None."""
        if qtype is None:
            return self.weights.band(name, ids)
        shape = self.weights.shape(name)
        rows = self.encoded(name, qtype).reshape(shape[0], -1)[ids]  # [n, bytes of a row]; a matrix: quantized tensors have 2 axes or more
        return decoded(rows.reshape(-1), qtype).reshape(-1, *shape[1:])

    def rows(self, name: str, ids: Tensor, qtype: QuantType | None) -> Tensor:
        """Rows of a matrix, ids [...] → [...,m]; only those in use are read and encoded, as blocks never cross a row."""
        unique, inverse = torch.unique(ids, return_inverse=True)
        part = self.weights.rows(name, unique)  # [n,m]
        if qtype is not None:
            part = decoded(encoded(part, qtype, name), qtype).reshape(part.shape)
        return part[inverse.to(part.device)]

    def encoded(self, name: str, qtype: QuantType) -> Tensor:
        """The bytes a file of this type holds for the tensor, uint8 [n]; raises as ``encoded`` below."""
        with self._lock:
            key = name, qtype
            if key not in self._bytes:
                self._bytes[key] = self._encode(name, qtype)
            return self._bytes[key]

    def _encode(self, name: str, qtype: QuantType) -> Tensor:
        """A band of rows at a time, so that a large embedding is never whole in float32."""
        n_rows, *inner = self.weights.shape(name)
        per_row = torch.Size(inner).numel()
        step = max(1, BAND_BYTES // (4 * per_row))
        columns = self._importance(name) if qtype.is_quantized else None
        stacked = columns is not None and columns.size > inner[-1]  # of every expert its own, one after the other
        if stacked:
            step = 1
        if n_rows <= step:
            return encoded(self.weights.get(name), qtype, name, columns)
        bands = [slice(a, min(a + step, n_rows)) for a in range(0, n_rows, step)]
        own = columns.reshape(n_rows, -1) if columns is not None and stacked else [columns] * n_rows
        return torch.cat([encoded(self.weights.band(name, band), qtype, name, own[band.start]) for band in bands])

    def let_go(self, wanted: Iterable[tuple[str, QuantType | None]]) -> None:
        """These are done with: forget their bytes, and let the file's pages leave memory."""
        for name, qtype in wanted:
            if qtype is not None:
                self._bytes.pop((name, qtype), None)
            self.weights.let_go([name])


def encoded(x: Tensor, qtype: QuantType, name: str, importance: Floats | None = None) -> Tensor:
    """encode(x): float32 [...,m] → uint8 [n], on the device of x.  Raises BlockError and NonFiniteError, naming the tensor."""
    try:
        if x.is_cuda and qtype.name in torch_codecs.TORCH_TYPES and importance is None:
            return torch_codecs.encode(x, qtype)
        values = x.cpu().numpy()
        return torch.from_numpy(encode(values, qtype, values.shape[-1], importance)).to(x.device)
    except QuantscopeError as e:
        raise type(e)(f"tensor {name!r}: {e}") from e


def decoded(raw: Tensor, qtype: QuantType) -> Tensor:
    """decode(raw): uint8 [n_bytes] → float32 [n], on the device of raw."""
    if raw.is_cuda and qtype.name in torch_codecs.TORCH_TYPES:
        return torch_codecs.decode(raw, qtype)
    return torch.from_numpy(decode(raw.cpu().numpy(), qtype)).to(raw.device)


class Requantized(OnTop):
    """A WeightProvider: the tensors of ``images`` in the types of a recipe, by canonical name; tensors not named stay as they are."""

    def __init__(self, images: Images, types: Mapping[str, QuantType]) -> None:
        super().__init__(images.weights)
        self.images, self.types = images, types

    def rows(self, name: str, ids: Tensor) -> Tensor:
        return self.images.rows(name, ids, self.types.get(name))

    def layer(self, i: int) -> Mapping[str, Tensor]:
        return LazyTensors(self.layer_names(i), self._get, lambda name, n: self._get(name, slice(n, n + 1))[0])

    def top(self, ids: slice = ALL_IDS) -> Mapping[str, Tensor]:
        return top_tensors(self.top_names(), ids, self._get)

    def let_go(self, names: Iterable[str]) -> None:
        self.images.let_go((name, self.types.get(name)) for name in names)

    def _get(self, name: str, ids: slice = ALL_IDS) -> Tensor:
        return self.images.get(name, self.types.get(name), ids)
