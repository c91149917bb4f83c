"""Hugging Face folders: ``config.json`` beside safetensors weights, in one file or in shards.

    header length u64 | header: JSON {name: {"dtype", "shape", "data_offsets": [begin, end]}} | tensor data, row-major, little-endian

Offsets count from the end of the header.  Each shard is memory-mapped on its own; nothing is read before it is asked for.

Source: the format section of the safetensors README.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from quantscope.errors import CorruptFileError, MissingFileError, TruncatedFileError, UnsupportedTypeError
from quantscope.qtypes import QTYPES, QuantType
from quantscope.sources.base import Bytes, RawTensor, entries, missing_tensor, show
from quantscope.sources.files import advise, map_file, parse_json_object, read_json_object, sha256_of

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt", "generation_config.json")
SMALL = {"U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "U32": 4, "U64": 8}  # [bytes] of what ggml has no type for
DTYPES: Mapping[str, QuantType] = {name: QTYPES[name] for name in ("F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64")} | {
    name: QuantType(name, -1, 1, size) for name, size in SMALL.items()
}
MAX_HEADER = 100_000_000  # [bytes] the limit of the safetensors package


@dataclass(frozen=True)
class _Stored:
    tensor: RawTensor
    shard: str  # file name
    start: int  # [bytes] in the shard


class SafetensorsSource:
    """An open Hugging Face folder; see ``sources.base.Source`` for the common part.

    ``tokenizer_files`` maps the names of the tokenizer's files that exist to their paths.
    """

    format: Literal["gguf", "safetensors"] = "safetensors"
    packing: str | None = None

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.metadata: Mapping[str, Any] = MappingProxyType(read_json_object(folder / "config.json"))
        self.tokenizer_files = {name: folder / name for name in TOKENIZER_FILES if os.path.isfile(folder / name)}
        self._mapped = {name: map_file(folder / name) for name in _shard_names(folder)}
        self._sizes = {name: data.size for name, data in self._mapped.items()}
        self._stored: dict[str, _Stored] = {}
        for name, data in self._mapped.items():
            for item in _read_header(folder / name, data):
                self._add(item)
        self.file_bytes: int = sum(self._sizes.values())
        self.tensors: Mapping[str, RawTensor] = MappingProxyType({name: s.tensor for name, s in self._stored.items()})
        self._sha256: str | None = None

    def _add(self, item: _Stored) -> None:
        name = item.tensor.name
        if name in self._stored:
            raise _corrupt(self.path / item.shard, f"tensor {name!r} is also in {self._stored[name].shard}, expected it once")
        self._stored[name] = item

    def _end(self, name: str) -> int:
        return self._stored[name].start + self.tensors[name].n_bytes

    def _shard(self, name: str) -> Bytes:
        if name not in self._mapped:
            raise ValueError(f"{show(self.path)} is closed")
        return self._mapped[name]

    def _shard_bytes(self, name: str) -> int:
        return self._sizes[self._stored[name].shard]

    @property
    def truncated(self) -> tuple[str, ...]:
        return tuple(name for name in self.tensors if self._end(name) > self._shard_bytes(name))

    def raw(self, name: str) -> Bytes:
        if name not in self.tensors:
            raise missing_tensor(self.path, name, self.tensors)
        if self._end(name) > self._shard_bytes(name):
            raise self.truncation(name)
        stored = self._stored[name]
        return self._shard(stored.shard)[stored.start : self._end(name)]

    def entries(self, name: str, which: slice) -> Bytes:
        return entries(self, name, which)

    def will_need(self, name: str) -> None:
        advise(self.raw(name), "MADV_WILLNEED")

    def let_go(self, name: str) -> None:
        advise(self.raw(name), "MADV_DONTNEED")

    def truncation(self, name: str) -> TruncatedFileError:
        """The error for a tensor that ends past the end of its shard."""
        return TruncatedFileError(
            f"{show(self.path / self._stored[name].shard)}: tensor {name!r} ({self.tensors[name].qtype}) ends at byte {self._end(name):,} "
            f"but the file has {self._shard_bytes(name):,}. The download is probably incomplete: compare its size with the published one, "
            f"or run `quantscope inspect {show(self.path)}` to list the intact tensors."
        )

    def sha256(self) -> str:
        """SHA-256 of the lines ``<sha256 of the file>  <name>`` of config.json and every shard, in name order, as sha256sum prints them."""
        if self._sha256 is None:
            digests = {name: sha256_of(self._shard(name)) for name in self._sizes}
            digests["config.json"] = hashlib.sha256((self.path / "config.json").read_bytes()).hexdigest()
            listing = "".join(f"{digests[name]}  {name}\n" for name in sorted(digests))
            self._sha256 = hashlib.sha256(listing.encode()).hexdigest()
        return self._sha256

    def close(self) -> None:
        self._mapped = {}


def _corrupt(path: Path, problem: str) -> CorruptFileError:
    return CorruptFileError(
        f"{show(path)}: {problem}. The file was damaged or written by a faulty program: fetch it again and compare its checksum "
        f"with the published one."
    )


def _shard_names(folder: Path) -> list[str]:
    """File names of the weights, model.safetensors before the index, as Transformers looks for them."""
    if os.path.exists(folder / SINGLE):
        return [SINGLE]
    if not os.path.exists(folder / INDEX):
        raise _no_weights(folder)
    weight_map = read_json_object(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise _corrupt(folder / INDEX, "'weight_map' is missing, empty or no object of file names, expected {tensor name: file name}")
    names = sorted(set(weight_map.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise _corrupt(folder / INDEX, f"'weight_map' names {outside[0]!r}, expected plain file names in the same folder")
    missing = [name for name in names if not os.path.exists(folder / name)]
    if missing:
        raise MissingFileError(
            f"{show(folder / missing[0])}: no such file, but {INDEX} lists it; {len(missing)} of {len(names)} shards are missing. "
            f"The download is incomplete: fetch the missing shards into {show(folder)}."
        )
    return names


def _no_weights(folder: Path) -> MissingFileError:
    pickled = sorted(p.name for pattern in ("pytorch_model*.bin", "*.pth", "*.pt") for p in folder.glob(pattern))
    other = sorted(p.name for p in folder.glob("*.safetensors"))
    cause = "The weights were not downloaded: fetch the safetensors files into the folder"
    if pickled:
        cause = f"It holds pickled weights ({pickled[0]}): load it with Transformers and save it again with `save_pretrained(folder)`"
    elif other:
        cause = f"It holds {other[0]}, which has another name: fetch the index file too, or rename a single file to {SINGLE}"
    return MissingFileError(f"{show(folder)}: config.json but no weights, expected {SINGLE} or {INDEX}. {cause}.")


def _read_header(path: Path, data: Bytes) -> list[_Stored]:
    """The tensors of one shard, in the order of their bytes."""
    length = int.from_bytes(data[:8].tobytes(), "little") if data.size >= 8 else MAX_HEADER
    if length >= MAX_HEADER or (data.size > 8 and data[8] != ord("{")):
        head = data[:8].tobytes()
        raise _corrupt(path, f"not a safetensors file: it starts with {head!r}, expected the length of a JSON header")
    start = 8 + length
    if start > data.size:
        raise TruncatedFileError(
            f"{show(path)}: the header ends at byte {start:,} but the file has {data.size:,}. The download is probably incomplete: "
            f"compare its size with the published one and fetch it again."
        )
    header = parse_json_object(path, data[8:start].tobytes(), "the header")
    header.pop("__metadata__", None)
    found = sorted((_entry(path, name, entry, start) for name, entry in header.items()), key=lambda s: s.start)
    for before, after in pairwise(found):
        if before.start + before.tensor.n_bytes > after.start:
            raise _corrupt(path, f"tensor {after.tensor.name!r} starts inside {before.tensor.name!r}")
    return found


def _entry(path: Path, name: str, entry: object, data_start: int) -> _Stored:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]}:
            pass
        case _:
            raise _corrupt(path, f"the header entry of tensor {name!r} is {str(entry)[:80]}, expected dtype, shape and data_offsets")
    if dtype not in DTYPES:
        raise UnsupportedTypeError(
            f"{show(path)}: tensor {name!r} has dtype {dtype}, expected one of {', '.join(DTYPES)}. It was written by a "
            f"newer program, or is packed in an unknown way: take the original F16 or BF16 weights, or a GGUF file of this model."
        )
    if not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in shape):
        raise _corrupt(path, f"tensor {name!r} has the shape {shape}, expected positive sizes")
    tensor = RawTensor(name, DTYPES[dtype], tuple(shape))
    if begin < 0 or end - begin != tensor.n_bytes:
        raise _corrupt(path, f"tensor {name!r} has data_offsets {begin} to {end}, expected {tensor.n_bytes} bytes for {dtype} {shape}")
    return _Stored(tensor, path.name, data_start + begin)


def open_folder(folder: Path, *, allow_truncated: bool = False) -> SafetensorsSource:
    """Open a Hugging Face folder.

    Raises MissingFileError (config.json, weights or a shard), CorruptFileError, UnsupportedTypeError and, unless
    ``allow_truncated``, TruncatedFileError when a tensor ends past the end of its shard.
    """
    source = SafetensorsSource(folder)
    if source.truncated and not allow_truncated:
        raise source.truncation(source.truncated[0])
    return source
