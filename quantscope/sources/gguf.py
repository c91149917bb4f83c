"""GGUF v2 and v3 files, memory-mapped and lazy.

    magic "GGUF" | version u32 | n_tensors u64 | n_kv u64                         little-endian throughout
    n_kv  ×  key: string | type: u32 | value
    n_tensors  ×  name: string | n_dims: u32 | ne: u64 × n_dims | type: u32 | offset: u64
    padding to general.alignment (32) | tensor data, each tensor at data start + offset

    string = length u64 | bytes, no terminator          array = element type u32 | count u64 | elements

Opening walks the header once.  Numeric arrays become numpy views; string arrays are stepped over, 0.2 µs a string, and decoded
when first read: a 32,000-token vocabulary costs milliseconds, not the 1.3 s of ``gguf.GGUFReader``.

Source: docs/gguf.md of the ggml repository, ``gguf_init_from_file`` in ggml/src/gguf.cpp.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar, overload

import numpy as np

from quantscope.errors import CorruptFileError, TruncatedFileError, UnsupportedTypeError, UnsupportedVersionError
from quantscope.qtypes import BY_ID, QuantType
from quantscope.sources.base import Bytes, RawTensor, entries, missing_tensor, show
from quantscope.sources.files import advise, map_file, not_a_gguf, sha256_of

T = TypeVar("T")

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4
STRING, ARRAY = 8, 9

# Numeric metadata value types: id → little-endian numpy dtype.  8 is a string, 9 an array.
SCALARS: Mapping[int, np.dtype[Any]] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}

# Tensor type ids that ggml gave up; no current program writes them.
REMOVED_TYPES: Mapping[int, str] = {
    4: "Q4_2",
    5: "Q4_3",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}

_MIN_KV_BYTES = 8 + 4 + 1  # empty key, type, one-byte value
_MIN_TENSOR_BYTES = 8 + 4 + 4 + 8  # empty name, no dimensions, type, offset
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


class StringArray(Sequence[str]):
    """The strings of one metadata array, decoded on first access (undecodable bytes as surrogate escapes)."""

    __slots__ = ("_blob", "_n", "_strings")

    def __init__(self, blob: Bytes, n: int) -> None:
        self._blob: Bytes | None = blob
        self._n = n
        self._strings: list[str] | None = None

    def _decoded(self) -> list[str]:
        if self._strings is None:
            assert self._blob is not None
            self._strings = list(_split_strings(self._blob.tobytes(), self._n))
            self._blob = None
        return self._strings

    def __len__(self) -> int:
        return self._n

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        return self._decoded()[i]

    def __iter__(self) -> Iterator[str]:
        return iter(self._decoded())

    def __repr__(self) -> str:
        return f"StringArray({self._n} strings)"


def _split_strings(blob: bytes, n: int) -> Iterator[str]:
    """The n length-prefixed strings of a blob whose lengths were already walked."""
    unpack, pos = _U64.unpack_from, 0
    for _ in range(n):
        (length,) = unpack(blob, pos)
        pos += 8
        yield blob[pos : (pos := pos + length)].decode("utf-8", "surrogateescape")


class _Cursor:
    """A position in the header, and what to say when the file ends there."""

    def __init__(self, path: Path, data: Bytes) -> None:
        self.path, self.data, self.view = path, data, data.data
        self.end, self.pos = data.size, 0

    def need(self, n_bytes: int, what: str) -> int:
        """Position of the next n_bytes, which the cursor passes; TruncatedFileError when the file ends before."""
        pos = self.pos
        if pos + n_bytes > self.end:
            raise TruncatedFileError(
                f"{show(self.path)}: {what} at byte {pos:,} needs {n_bytes:,} bytes but the file has {self.end:,} in all. The header is "
                f"cut short or damaged, so the download is probably incomplete: compare its size with the published one and fetch it again."
            )
        self.pos = pos + n_bytes
        return pos

    def u32(self, what: str) -> int:
        return int(_U32.unpack_from(self.view, self.need(4, what))[0])

    def u64(self, what: str) -> int:
        return int(_U64.unpack_from(self.view, self.need(8, what))[0])

    def string(self, what: str) -> str:
        length = self.u64(f"the length of {what}")
        pos = self.need(length, what)
        return bytes(self.view[pos : pos + length]).decode("utf-8", "surrogateescape")

    def strings(self, n: int, what: str) -> StringArray:
        """Step over n strings; each takes at least its 8-byte length, so an absurd n fails before the walk."""
        start = pos = self.need(0, what)
        self.need(8 * n, what)
        unpack, view = _U64.unpack_from, self.view
        try:
            for _ in range(n):
                pos += 8 + unpack(view, pos)[0]
        except (struct.error, OverflowError):  # pos ran past the end: need() below says so
            pos = max(pos, self.end + 1)
        self.pos = start
        self.need(pos - start, what)
        return StringArray(self.data[start:pos], n)

    def corrupt(self, problem: str) -> CorruptFileError:
        return CorruptFileError(
            f"{show(self.path)}: {problem}. The header contradicts itself: the file was damaged, or written by a faulty converter. "
            f"Fetch it again and compare its checksum with the published one, or convert the original again."
        )


def _value(cur: _Cursor, key: str) -> Any:
    """One metadata value: int, float, bool, str, numpy view of numbers, or StringArray."""
    what = f"the value of metadata key {key!r}"
    kind = cur.u32(what)
    if kind == STRING:
        return cur.string(what)
    if kind == ARRAY:
        return _array(cur, what)
    dtype = _scalar_dtype(cur, kind, what)
    pos = cur.need(dtype.itemsize, what)
    if dtype.kind == "b":  # any non-zero byte is true
        return bool(cur.data[pos])
    return cur.data[pos : pos + dtype.itemsize].view(dtype)[0].item()


def _array(cur: _Cursor, what: str) -> Any:
    kind = cur.u32(what)
    n = cur.u64(what)
    if kind == STRING:
        return cur.strings(n, what)
    if kind == ARRAY:
        raise cur.corrupt(f"{what} is an array of arrays, expected an array of numbers or strings")
    dtype = _scalar_dtype(cur, kind, what)
    pos = cur.need(n * dtype.itemsize, what)
    raw = cur.data[pos : cur.pos]
    return raw != 0 if dtype.kind == "b" else raw.view(dtype)


def _scalar_dtype(cur: _Cursor, kind: int, what: str) -> np.dtype[Any]:
    try:
        return SCALARS[kind]
    except KeyError:
        raise cur.corrupt(f"{what} has type {kind}, expected 0 to 12") from None


@dataclass(frozen=True)
class _Info:
    tensor: RawTensor
    offset: int  # [bytes] from the start of the tensor data


def _tensor_info(cur: _Cursor, index: int) -> _Info:
    name = cur.string(f"the name of tensor {index}")
    what = f"the description of tensor {name!r}"
    n_dims = cur.u32(what)
    if n_dims > MAX_DIMS:
        raise cur.corrupt(f"tensor {name!r} has {n_dims} dimensions, expected at most {MAX_DIMS}")
    ne = [cur.u64(what) for _ in range(n_dims)]
    if 0 in ne or math.prod(ne) >= 2**63:
        raise cur.corrupt(f"tensor {name!r} has the shape {ne}, expected positive sizes whose product is below 2^63")
    kind, offset = cur.u32(what), cur.u64(what)
    qtype = _qtype(cur, name, kind)
    tensor = RawTensor(name, qtype, tuple(reversed(ne)))
    if tensor.n_per_row % qtype.block_size:
        raise cur.corrupt(f"tensor {name!r} ({qtype}) has rows of {tensor.n_per_row}, expected a multiple of {qtype.block_size}")
    return _Info(tensor, offset)


def _qtype(cur: _Cursor, name: str, kind: int) -> QuantType:
    if kind in BY_ID:
        return BY_ID[kind]
    cause = (
        f"This is {REMOVED_TYPES[kind]}, which ggml has removed: download the file again in a current type"
        if kind in REMOVED_TYPES
        else "The file comes from a newer llama.cpp or a fork with types of its own, or is damaged: "
        "look in its model card for the type and take another quantization of the model"
    )
    raise UnsupportedTypeError(f"{show(cur.path)}: tensor {name!r} has type id {kind}, expected one of {sorted(BY_ID)}. {cause}.")


def _version(cur: _Cursor) -> int:
    """Check magic, byte order and version."""
    if bytes(cur.view[:4]) != MAGIC:
        raise not_a_gguf(cur.path, bytes(cur.view[:64]))
    cur.need(4, "the magic")
    version = cur.u32("the version")
    if version in VERSIONS:
        return version
    path = show(cur.path)
    swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
    if version & 0xFFFF == 0 and swapped in (*VERSIONS, 1):  # a small number in the upper half: the other byte order
        raise UnsupportedVersionError(
            f"{path}: this is a big-endian GGUF v{swapped}, expected little-endian. It was made for s390x or another big-endian "
            f"machine: download the little-endian file, or convert it with `python -m gguf.scripts.gguf_convert_endian {path} little`."
        )
    cause = (
        "GGUF v1 was in use for a few days in August 2023: take a newer file of this model, or convert the original again"
        if version == 1
        else "The file is damaged, or comes from a newer llama.cpp than this program knows: check its checksum, then update quantscope"
    )
    raise UnsupportedVersionError(f"{path}: GGUF version {version}, expected 2 or 3. {cause}.")


def _collect(cur: _Cursor, n: int, min_bytes: int, what: str, read: Callable[[int], tuple[str, T]]) -> dict[str, T]:
    """Read n named entries; a count the file has no room for fails at once, a name that occurs twice too."""
    pos = cur.need(n * min_bytes, f"the list of {n:,} {what}")
    cur.pos = pos
    out: dict[str, T] = {}
    for i in range(n):
        name, item = read(i)
        if name in out:
            raise cur.corrupt(f"{what} hold {name!r} twice, expected distinct names")
        out[name] = item
    return out


class GgufSource:
    """An open GGUF file; see ``sources.base.Source`` for the common part.

    ``version``, ``alignment`` [bytes] and ``data_offset`` [bytes] describe the container, ``offsets`` where each tensor starts
    in the file.
    """

    format: Literal["gguf", "safetensors"] = "gguf"
    packing: str | None = None

    def __init__(self, path: Path, data: Bytes) -> None:
        self.path = path
        self.file_bytes: int = data.size
        self._data: Bytes | None = data
        self._sha256: str | None = None
        cur = _Cursor(path, data)
        self.version = _version(cur)
        n_tensors, n_kv = cur.u64("the number of tensors"), cur.u64("the number of metadata keys")

        def read_kv(i: int) -> tuple[str, Any]:
            key = cur.string(f"metadata key {i}")
            return key, _value(cur, key)

        def read_tensor(i: int) -> tuple[str, _Info]:
            info = _tensor_info(cur, i)
            return info.tensor.name, info

        self.metadata: Mapping[str, Any] = MappingProxyType(_collect(cur, n_kv, _MIN_KV_BYTES, "metadata keys", read_kv))
        self.alignment = _alignment(cur, self.metadata)
        infos = _collect(cur, n_tensors, _MIN_TENSOR_BYTES, "tensors", read_tensor)
        self.data_offset = -(-cur.pos // self.alignment) * self.alignment
        _check_layout(cur, infos, self.alignment)
        self.tensors: Mapping[str, RawTensor] = MappingProxyType({name: info.tensor for name, info in infos.items()})
        self.offsets: Mapping[str, int] = MappingProxyType({name: self.data_offset + i.offset for name, i in infos.items()})

    @property
    def first(self) -> GgufSource:
        """The file that holds the metadata: this one."""
        return self

    def _end(self, name: str) -> int:
        return self.offsets[name] + self.tensors[name].n_bytes

    def _mapped(self) -> Bytes:
        if self._data is None:
            raise ValueError(f"{show(self.path)} is closed")
        return self._data

    @property
    def truncated(self) -> tuple[str, ...]:
        return tuple(name for name in self.tensors if self._end(name) > self.file_bytes)

    def raw(self, name: str) -> Bytes:
        if name not in self.tensors:
            raise missing_tensor(self.path, name, self.tensors)
        if self._end(name) > self.file_bytes:
            raise self.truncation(name)
        return self._mapped()[self.offsets[name] : self._end(name)]

    def entries(self, name: str, which: slice) -> Bytes:
        return entries(self, name, which)

    def will_need(self, name: str) -> None:
        advise(self.raw(name), "MADV_WILLNEED")

    def let_go(self, name: str) -> None:
        advise(self.raw(name), "MADV_DONTNEED")

    def truncation(self, name: str) -> TruncatedFileError:
        """The error for a tensor that ends past the end of the file."""
        return TruncatedFileError(
            f"{show(self.path)}: tensor {name!r} ({self.tensors[name].qtype}) ends at byte {self._end(name):,} but the file has "
            f"{self.file_bytes:,}. The download is probably incomplete: compare its size with the published one, or run "
            f"`quantscope inspect {show(self.path)}` to list the intact tensors."
        )

    def sha256(self) -> str:
        """SHA-256 of the whole file, as ``sha256sum`` and model hubs print it."""
        if self._sha256 is None:
            self._sha256 = sha256_of(self._mapped())
        return self._sha256

    def close(self) -> None:
        self._data = None


def _alignment(cur: _Cursor, metadata: Mapping[str, Any]) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(value, int) or value <= 0 or value & (value - 1) or value >= 2**32:
        raise cur.corrupt(f"general.alignment is {value!r}, expected a power of two")
    return value


def _check_layout(cur: _Cursor, infos: Mapping[str, _Info], alignment: int) -> None:
    """Every tensor starts on the alignment, and no two share a byte."""
    end, previous = 0, ""
    for info in sorted(infos.values(), key=lambda i: i.offset):
        name = info.tensor.name
        if info.offset % alignment:
            raise cur.corrupt(f"tensor {name!r} starts at offset {info.offset:,}, expected a multiple of the alignment {alignment}")
        if info.offset < end:
            raise cur.corrupt(f"tensor {name!r} starts at offset {info.offset:,}, inside {previous!r}, which ends at {end:,}")
        end, previous = info.offset + info.tensor.n_bytes, name


def open_gguf(path: Path, *, allow_truncated: bool = False) -> GgufSource:
    """Open one GGUF file; a part of a split model is opened alone (``split.open_parts`` opens all).

    Raises MissingFileError, NotAModelError, UnsupportedVersionError, CorruptFileError, UnsupportedTypeError and, unless
    ``allow_truncated``, TruncatedFileError when a tensor ends past the end of the file; with it only ``raw`` raises, so that the
    intact tensors can be listed and read.
    """
    source = GgufSource(path, map_file(path))
    if source.truncated and not allow_truncated:
        raise source.truncation(source.truncated[0])
    return source
