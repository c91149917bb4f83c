"""GGUF files byte by byte, for the tests of the reader: also those that no writer would write."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
FORMATS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B", U64: "Q", I64: "q", F64: "d"}


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def string(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return u64(len(data)) + data


def kv(key: str | bytes, kind: int, value: object) -> bytes:
    data = string(value) if kind == STRING else struct.pack("<" + FORMATS[kind], value)  # type: ignore[arg-type]
    return string(key) + u32(kind) + data


def array(key: str, kind: int, values: Sequence[object], n: int | None = None) -> bytes:
    """n: the count to claim, if not the true one."""
    data = b"".join(string(v) if kind == STRING else struct.pack("<" + FORMATS[kind], v) for v in values)  # type: ignore[arg-type]
    return string(key) + u32(ARRAY) + u32(kind) + u64(len(values) if n is None else n) + data


@dataclass(frozen=True)
class Info:
    """A tensor's description; ne as in the file, row length first."""

    name: str | bytes = "a"
    ne: Sequence[int] = (32,)
    kind: int = 0
    offset: int = 0
    n_dims: int | None = None

    def encode(self) -> bytes:
        n_dims = len(self.ne) if self.n_dims is None else self.n_dims
        return string(self.name) + u32(n_dims) + b"".join(map(u64, self.ne)) + u32(self.kind) + u64(self.offset)


def header(
    pairs: Sequence[bytes] = (),
    infos: Sequence[Info] = (),
    *,
    version: int = 3,
    n_kv: int | None = None,
    n_tensors: int | None = None,
) -> bytes:
    """Everything before the padding; n_kv, n_tensors: the counts to claim, if not the true ones."""
    counts = u64(len(infos) if n_tensors is None else n_tensors) + u64(len(pairs) if n_kv is None else n_kv)
    return b"GGUF" + u32(version) + counts + b"".join(pairs) + b"".join(i.encode() for i in infos)


def gguf(pairs: Sequence[bytes] = (), infos: Sequence[Info] = (), data: bytes = b"", *, alignment: int = 32, version: int = 3) -> bytes:
    head = header(pairs, infos, version=version)
    return head + bytes(-len(head) % alignment) + data
