"""What is in a model file, as plain data: tensors, types, bits per weight, metadata.  `quantscope inspect` prints it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantscope.sources.base import RawTensor, Source

PREVIEW = 3  # elements of a metadata array that a summary keeps
GGUF_ONLY = ("version", "alignment", "data_offset")


@dataclass(frozen=True)
class TypeTotal:
    """All tensors of one type together."""

    type: str
    n_tensors: int
    n_elements: int
    n_bytes: int

    @property
    def bpw(self) -> float:
        return bits_per_weight(self.n_bytes, self.n_elements)


@dataclass(frozen=True)
class TensorRow:
    """One tensor; ``intact`` is false when the file ends before the tensor does."""

    name: str
    type: str
    shape: tuple[int, ...]
    n_bytes: int
    intact: bool


@dataclass(frozen=True)
class ArrayPreview:
    """A metadata array, by its length and first elements."""

    n: int
    first: tuple[Any, ...]


@dataclass(frozen=True)
class Summary:
    """``bpw`` counts every stored tensor; ``file_bytes`` is the size on disk, header included."""

    path: str
    format: str
    container: Mapping[str, int]  # GGUF: version, alignment [bytes], data_offset [bytes]
    file_bytes: int
    n_elements: int
    tensor_bytes: int
    bpw: float
    types: tuple[TypeTotal, ...]  # most bytes first
    tensors: tuple[TensorRow, ...]  # file order
    metadata: Mapping[str, Any]  # arrays as ArrayPreview


def bits_per_weight(n_bytes: int, n_elements: int) -> float:
    """8 · n_bytes / n_elements; 0 for no elements."""
    return 8 * n_bytes / n_elements if n_elements else 0.0


def summarize(source: Source) -> Summary:
    """Everything the header says; tensor data is not read."""
    tensors = list(source.tensors.values())
    missing = set(source.truncated)
    types = type_totals(tensors)
    n_elements, n_bytes = sum(t.n_elements for t in types), sum(t.n_bytes for t in types)
    return Summary(
        path=str(source.path),
        format=source.format,
        container={name: getattr(source, name) for name in GGUF_ONLY if hasattr(source, name)},
        file_bytes=source.file_bytes,
        n_elements=n_elements,
        tensor_bytes=n_bytes,
        bpw=bits_per_weight(n_bytes, n_elements),
        types=types,
        tensors=tuple(TensorRow(t.name, t.qtype.name, t.shape, t.n_bytes, t.name not in missing) for t in tensors),
        metadata={key: preview(value) for key, value in source.metadata.items()},
    )


def type_totals(tensors: Sequence[RawTensor]) -> tuple[TypeTotal, ...]:
    """One total per type that occurs, most bytes first."""
    groups: dict[str, list[RawTensor]] = {}
    for t in tensors:
        groups.setdefault(t.qtype.name, []).append(t)
    totals = [TypeTotal(name, len(g), sum(t.n_elements for t in g), sum(t.n_bytes for t in g)) for name, g in groups.items()]
    return tuple(sorted(totals, key=lambda t: (-t.n_bytes, t.type)))


def preview(value: Any) -> Any:
    """A scalar as it is, an array as its length and first elements."""
    if isinstance(value, np.ndarray):
        return ArrayPreview(len(value), tuple(value[:PREVIEW].tolist()))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ArrayPreview(len(value), tuple(value[:PREVIEW]))
    return value
