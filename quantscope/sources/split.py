"""A GGUF model in several files, as `llama-gguf-split` writes them: ``NAME-00001-of-00003.gguf`` … ``NAME-00003-of-00003.gguf``.

The first part has the whole metadata.  Every part has its own header with the tensors that are in it, and the keys ``split.no``
(from 0), ``split.count`` and ``split.tensors.count`` (of all parts together).

Source: tools/gguf-split/gguf-split.cpp and ``llama_split_path`` of llama.cpp.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from quantscope.errors import CorruptFileError, MissingFileError
from quantscope.sources.base import Bytes, RawTensor, entries, missing_tensor, show
from quantscope.sources.gguf import GgufSource, open_gguf
from quantscope.wording import some

_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_KEYS = ("split.no", "split.count", "split.tensors.count")
_NAMED = 3  # missing parts that an error lists


class SplitGgufSource:
    """All parts as one; see ``sources.base.Source``.  ``path`` is the first part, ``metadata`` its own without the keys of the split."""

    format: Literal["gguf", "safetensors"] = "gguf"
    packing: str | None = None

    def __init__(self, parts: Sequence[GgufSource]) -> None:
        self.parts, self.first, self.path = tuple(parts), parts[0], parts[0].path
        self.version, self.alignment = self.first.version, self.first.alignment
        self.file_bytes: int = sum(part.file_bytes for part in parts)
        self.metadata: Mapping[str, Any] = MappingProxyType({k: v for k, v in self.first.metadata.items() if k not in _KEYS})
        self._part: dict[str, GgufSource] = {}
        for part in parts:
            for name in part.tensors:
                if name in self._part:
                    raise _contradiction(part.path, f"tensor {name!r} is also in {self._part[name].path.name}, expected it once")
                self._part[name] = part
        self.tensors: Mapping[str, RawTensor] = MappingProxyType({name: part.tensors[name] for name, part in self._part.items()})
        expected = self.first.metadata.get("split.tensors.count", len(self.tensors))
        if expected != len(self.tensors):
            raise _contradiction(self.path, f"the parts hold {len(self.tensors)} tensors, expected {expected} (split.tensors.count)")
        self._sha256: str | None = None

    @property
    def truncated(self) -> tuple[str, ...]:
        return tuple(name for part in self.parts for name in part.truncated)

    def raw(self, name: str) -> Bytes:
        if name not in self._part:
            raise missing_tensor(self.path, name, self.tensors)
        return self._part[name].raw(name)

    def entries(self, name: str, which: slice) -> Bytes:
        return entries(self, name, which)

    def will_need(self, name: str) -> None:
        self._part[name].will_need(name)

    def let_go(self, name: str) -> None:
        self._part[name].let_go(name)

    def sha256(self) -> str:
        """SHA-256 of the lines ``<sha256 of the part>  <name>`` in order, as sha256sum prints them."""
        if self._sha256 is None:
            listing = "".join(f"{part.sha256()}  {part.path.name}\n" for part in self.parts)
            self._sha256 = hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()
        return self._sha256

    def close(self) -> None:
        for part in self.parts:
            part.close()


def n_parts(source: GgufSource) -> int:
    """How many files the model is in; 1 for a whole one."""
    n = source.metadata.get("split.count", 0)
    return n if isinstance(n, int) and n > 1 else 1


def part_names(name: str) -> list[str]:
    """The names of all parts of a split model from that of one; empty for a name of another form."""
    match = _NAME.fullmatch(name)
    return [f"{match['stem']}-{i:05d}-of-{match['count']}.gguf" for i in range(1, int(match["count"]) + 1)] if match else []


def open_parts(part: GgufSource, *, allow_truncated: bool = False) -> SplitGgufSource:
    """The whole model that ``part`` is one of; the others are looked for beside it.

    Raises MissingFileError naming the parts that are not there, and CorruptFileError when they do not belong together.
    """
    n, names = n_parts(part), part_names(part.path.name)
    if len(names) != n:
        raise MissingFileError(
            f"{show(part.path)}: this is part {part.metadata.get('split.no', 0) + 1} of {n} of a split model, and the others are found by "
            f"name: expected NAME-00001-of-{n:05d}.gguf and so on. Give the parts the names they were published with."
        )
    paths = [part.path.with_name(name) for name in names]
    missing = [path.name for path in paths if not os.path.exists(path)]
    if missing:
        raise MissingFileError(
            f"{show(part.path)}: {len(missing)} of the model's {n} parts missing in {show(part.path.parent)}: {some(missing, _NAMED)}. "
            f"Fetch them into the same folder; llama.cpp needs all of them too."
        )
    parts = [part if path == part.path else open_gguf(path, allow_truncated=allow_truncated) for path in paths]
    for i, other in enumerate(parts):
        found = other.metadata.get("split.no"), n_parts(other)
        if found != (i, n):
            raise _contradiction(other.path, f"split.no and split.count are {found[0]} and {found[1]}, expected {i} and {n} as in its name")
    return SplitGgufSource(parts)


def _contradiction(path: Path, problem: str) -> CorruptFileError:
    return CorruptFileError(
        f"{show(path)}: {problem}. The parts are not of one model, or one was damaged: fetch them again from one place and compare "
        f"their checksums."
    )
