"""What a new file is made from: metadata, tensors under GGUF's names, and their values a band of rows at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from quantscope.quants import Floats, decode
from quantscope.recipes import ModelFacts, facts_from_gguf
from quantscope.remedy.gguf_file import stored_pairs
from quantscope.sources.base import Bytes, RawTensor, Source
from quantscope.sources.gguf import GgufSource
from quantscope.sources.split import SplitGgufSource


class Original(Protocol):
    """A model to quantize."""

    source: Source
    facts: ModelFacts
    alignment: int  # [bytes] of the tensors in the new file
    notes: tuple[str, ...]  # what the new file will lack

    @property
    def tensors(self) -> Mapping[str, RawTensor]:
        """Canonical name → the tensor with the type it keeps where a preset leaves it alone."""

    def pairs(self) -> dict[str, bytes]:
        """The metadata as ``gguf_file`` writes them."""

    def raw(self, name: str, rows: slice) -> Bytes:
        """The bytes of consecutive rows, in the type of ``tensors``; a row is what lies along the last axis."""

    def values(self, name: str, rows: slice) -> Floats:
        """The same rows as float32 [n, row length]."""

    def will_need(self, name: str) -> None: ...

    def let_go(self, name: str) -> None: ...


class GgufOriginal:
    """A GGUF file of any architecture: nothing is asked of it but names, shapes and types that can be decoded."""

    def __init__(self, source: GgufSource | SplitGgufSource) -> None:
        self.source: Source = source
        self.facts = facts_from_gguf(source.metadata)
        self.alignment = source.alignment
        self.notes: tuple[str, ...] = ()
        self._file = source

    @property
    def tensors(self) -> Mapping[str, RawTensor]:
        return self._file.tensors

    def pairs(self) -> dict[str, bytes]:
        return {key: value for key, value in stored_pairs(self._file.first).items() if key in self._file.metadata}

    def raw(self, name: str, rows: slice) -> Bytes:
        t = self.tensors[name]
        row_bytes = t.qtype.row_bytes(t.n_per_row)
        return self._file.raw(name)[rows.start * row_bytes : rows.stop * row_bytes]

    def values(self, name: str, rows: slice) -> Floats:
        t = self.tensors[name]
        return decode(self.raw(name, rows), t.qtype).reshape(-1, t.n_per_row)

    def will_need(self, name: str) -> None:
        self._file.will_need(name)

    def let_go(self, name: str) -> None:
        self._file.let_go(name)


def original(source: Source) -> Original:
    """The source as a model to quantize.  A folder must be of a known architecture, with a tokenizer that can be put into a GGUF file."""
    if isinstance(source, GgufSource | SplitGgufSource):
        return GgufOriginal(source)
    from quantscope.remedy.folder import FolderOriginal  # brings torch and the tokenizers

    return FolderOriginal(source)
