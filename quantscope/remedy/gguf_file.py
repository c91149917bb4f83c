"""GGUF v3 files, written: the metadata of another file as it is, then tensors in any order of types.

    magic "GGUF" | version u32 | n_tensors u64 | n_kv u64 | n_kv pairs | n_tensors descriptions | padding | data, each tensor padded

A pair keeps the bytes it has in the file it comes from (``stored_pairs``), so its type, an empty array and a string that is no UTF-8
survive.  ``gguf.GGUFWriter`` takes values instead of bytes, and refuses the latter two.

Source: docs/gguf.md of the ggml repository; ``sources.gguf`` reads the same.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import BinaryIO

from quantscope.sources.base import Bytes, RawTensor
from quantscope.sources.files import map_file
from quantscope.sources.gguf import ARRAY, DEFAULT_ALIGNMENT, MAGIC, SCALARS, STRING, GgufSource

VERSION = 3
UINT32 = 4
COUNTS_END = 24  # [bytes] magic, version, n_tensors, n_kv

Pairs = Mapping[str, bytes]  # key → value type and value as a GGUF file holds them, behind the key


def stored_pairs(source: GgufSource) -> dict[str, bytes]:
    """The metadata of an open file, undecoded and in its order.  That the header is sound was checked when it was opened."""
    data = map_file(source.path)
    pos, out = COUNTS_END, {}
    for key in source.metadata:
        start = pos + 8 + len(_encoded(key))
        pos = _value_end(data, start)
        out[key] = data[start:pos].tobytes()
    return out


def _value_end(data: Bytes, pos: int) -> int:
    """Where the value ends whose type is at ``pos``."""

    def u64(at: int) -> int:
        return int.from_bytes(data[at : at + 8].tobytes(), "little")

    kind, pos = int.from_bytes(data[pos : pos + 4].tobytes(), "little"), pos + 4
    if kind == STRING:
        return pos + 8 + u64(pos)
    if kind != ARRAY:
        return pos + SCALARS[kind].itemsize
    kind, n, pos = int.from_bytes(data[pos : pos + 4].tobytes(), "little"), u64(pos + 4), pos + 12
    if kind != STRING:
        return pos + n * SCALARS[kind].itemsize
    for _ in range(n):
        pos += 8 + u64(pos)
    return pos


def string(text: str) -> bytes:
    """A string value: type | length | UTF-8."""
    return struct.pack("<I", STRING) + _with_length(text)


def uint32(value: int) -> bytes:
    """A u32 value: type | value."""
    return struct.pack("<II", UINT32, value)


def write_head(out: BinaryIO, pairs: Pairs, tensors: Sequence[RawTensor], alignment: int = DEFAULT_ALIGNMENT) -> None:
    """Everything before the first tensor's data.  The data of ``tensors`` must follow in this order, each padded to ``alignment``."""
    out.write(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(pairs)))
    for key, value in pairs.items():
        out.write(_with_length(key) + value)
    offset = 0
    for t in tensors:
        ne = tuple(reversed(t.shape))
        out.write(_with_length(t.name) + struct.pack(f"<I{len(ne)}QIQ", len(ne), *ne, t.qtype.id, offset))
        offset += padded(t.n_bytes, alignment)
    out.write(bytes(padding(out.tell(), alignment)))


def padding(n_bytes: int, alignment: int) -> int:
    """Bytes that are missing to the next multiple of ``alignment``."""
    return -n_bytes % alignment


def padded(n_bytes: int, alignment: int) -> int:
    return n_bytes + padding(n_bytes, alignment)


def _with_length(text: str) -> bytes:
    data = _encoded(text)
    return struct.pack("<Q", len(data)) + data


def _encoded(text: str) -> bytes:
    """The bytes that ``sources.gguf`` decoded."""
    return text.encode("utf-8", "surrogateescape")
