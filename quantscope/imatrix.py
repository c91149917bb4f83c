"""llama.cpp's importance matrices: for every matrix the mean square of each of its inputs, read and written.

    of(name) = Σ x² / count      [n_in], the sum over the ``count`` tokens of a calibration text

    GGUF     general.type = "imatrix", imatrix.datasets, imatrix.chunk_count, imatrix.chunk_size;
             <name>.in_sum2: F32 [n_mat, n_in], <name>.counts: F32 [n_mat, 1], n_mat > 1 for stacked experts
    legacy   n_entries:i32, then for each   len:i32  name  n_call:i32  n:i32  values:f32[n] = mean · n_call,
             and at the end, where it is there,   n_chunk:i32  len:i32  dataset                              little-endian

Source: ``common_imatrix_load`` in common/imatrix-loader.cpp, ``save_imatrix`` in tools/imatrix/imatrix.cpp and ``load_imatrix`` in
tools/quantize/quantize.cpp of llama.cpp.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from quantscope.errors import CorruptFileError, MissingFileError, NotAModelError, ShapeError, TruncatedFileError, UsageError
from quantscope.new_file import finished
from quantscope.sources.base import Bytes, show
from quantscope.sources.files import map_file
from quantscope.sources.gguf import MAGIC, GgufSource
from quantscope.wording import count

SUMS, COUNTS = ".in_sum2", ".counts"
TYPE, DATASETS, CHUNK_COUNT, CHUNK_SIZE = "general.type", "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
MAX_NAME = 256  # [bytes] of a tensor's name in a legacy file; ggml's names have 64

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Entry:
    """What went into one matrix: sums float32 [n_mat, n_in] of squares, over ``counts`` [n_mat] tokens (one matrix, or one an expert)."""

    sums: Floats
    counts: tuple[int, ...]

    @property
    def mean(self) -> Floats:
        """float32 [n_mat · n_in], as llama-quantize computes it; 1 for an expert that saw no token."""
        n = np.array(self.counts, np.float32)[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            mean: Floats = np.where(n > 0, self.sums / n, np.float32(1)).reshape(-1)
        return mean


@dataclass(frozen=True)
class Imatrix:
    """An importance matrix.  entries: by the matrix's GGUF name; n_chunk, n_ctx: of the text, 0 where the file does not say."""

    entries: Mapping[str, Entry]
    datasets: tuple[str, ...] = ()
    n_chunk: int = 0
    n_ctx: int = 0
    path: Path | None = None

    def idle(self) -> list[tuple[str, int, int]]:
        """The stacks of experts some of which saw no token: name, how many, of how many."""
        seen = ((name, entry.counts.count(0), len(entry.counts)) for name, entry in sorted(self.entries.items()))
        return [(name, k, n) for name, k, n in seen if k]

    def of(self, tensor_name: str) -> Floats | None:
        """The weights of the columns of a matrix, float32 [n_in] (of stacked experts one after the other); None where there are none."""
        entry = self.entries.get(tensor_name)
        return None if entry is None else entry.mean

    def __str__(self) -> str:
        return "the importance matrix" if self.path is None else show(self.path)


# ---- Reading -------------------------------------------------------------------------------------------------------------


def read_imatrix(path: Path) -> Imatrix:
    """An importance matrix of llama-imatrix, in today's GGUF format or the legacy one, or of ``quantscope imatrix``.

    Raises MissingFileError, NotAModelError for another kind of file, TruncatedFileError and CorruptFileError.
    """
    data = _mapped(path)
    found = _read_gguf(path, data) if bytes(data[:4]) == MAGIC else _read_legacy(path, data)
    for name, entry in found.entries.items():
        bad = ~(np.isfinite(entry.sums) & (entry.sums >= 0))
        if bad.any():
            _corrupt(path, f"the sum of squares of input {int(bad.argmax())} of {name!r} is {entry.sums.flat[int(bad.argmax())]}")
    return found


def _mapped(path: Path) -> Bytes:
    if path.is_file() and path.stat().st_size:
        return map_file(path)
    if path.exists():
        raise _not_one(path, "not a regular file or empty")
    raise MissingFileError(
        f"{show(path)}: no such file, expected an importance matrix. Check the path, or make one with `quantscope imatrix MODEL --text "
        f"TEXT -o {show(path)}`."
    )


def _not_one(path: Path, what: str) -> NotAModelError:
    return NotAModelError(
        f"{show(path)}: {what}, expected an importance matrix as llama-imatrix writes it, GGUF or legacy. Give that file, or make one with "
        f"`quantscope imatrix MODEL --text TEXT -o FILE.gguf`."
    )


def _corrupt(path: Path, problem: str) -> NoReturn:
    raise CorruptFileError(
        f"{show(path)}: {problem}, expected finite sums of squares with their counts. The file was damaged, or the model overflowed on the "
        f"text it was made from: make it again with `quantscope imatrix MODEL --text TEXT -o FILE.gguf`."
    )


def _read_gguf(path: Path, data: Bytes) -> Imatrix:
    source = GgufSource(path, data)
    kind = source.metadata.get(TYPE, "imatrix")
    names = [name.removesuffix(SUMS) for name in source.tensors if name.endswith(SUMS)]
    if kind != "imatrix" or not names:
        what = f"a GGUF file of type {kind!r}" if kind != "imatrix" else f"a GGUF file without a tensor *{SUMS}"
        raise _not_one(path, what)
    if source.truncated:
        raise source.truncation(source.truncated[0])
    entries = {name: _gguf_entry(path, source, name) for name in names}
    meta = source.metadata
    return Imatrix(entries, tuple(meta.get(DATASETS, ())), int(meta.get(CHUNK_COUNT, 0)), int(meta.get(CHUNK_SIZE, 0)), path)


def _gguf_entry(path: Path, source: GgufSource, name: str) -> Entry:
    sums, counts = source.tensors[name + SUMS], source.tensors.get(name + COUNTS)
    if counts is None:
        _corrupt(path, f"tensor {name + SUMS!r} has no {name + COUNTS!r} beside it")
    if {sums.qtype.name, counts.qtype.name} != {"F32"}:
        _corrupt(path, f"{name!r} is stored as {sums.qtype} and {counts.qtype} instead of F32")
    n = source.raw(counts.name).view("<f4").astype(np.float32)  # [n_mat]
    values = source.raw(sums.name).view("<f4").astype(np.float32)
    if values.size % n.size or not (np.isfinite(n) & (n >= 0)).all():
        _corrupt(path, f"{name!r} has {count(values.size, 'sum')} for counts {n.tolist()}")
    return Entry(values.reshape(n.size, -1), tuple(int(x) for x in np.rint(n)))


class _Reader:
    """A position in a legacy file."""

    def __init__(self, path: Path, data: Bytes) -> None:
        self.path, self.data, self.pos = path, data, 0

    def take(self, n_bytes: int, what: str) -> bytes:
        if self.pos + n_bytes > len(self.data):
            raise TruncatedFileError(
                f"{show(self.path)}: {what} at byte {self.pos:,} needs {n_bytes:,} bytes but the file has {len(self.data):,} in all. The "
                f"importance matrix is cut short: copy it again, or make one with `quantscope imatrix MODEL --text TEXT -o FILE.gguf`."
            )
        self.pos += n_bytes
        return bytes(self.data[self.pos - n_bytes : self.pos])

    def i32(self, what: str) -> int:
        return int(struct.unpack("<i", self.take(4, what))[0])


def _read_legacy(path: Path, data: Bytes) -> Imatrix:
    reader = _Reader(path, data)
    n_entries = reader.i32("the number of entries") if len(data) >= 4 else 0
    if not 1 <= n_entries <= len(data) // 13:  # an entry has at least three numbers and one byte of name
        raise _not_one(path, f"it starts with {bytes(data[:8])!r}, neither GGUF's magic nor a number of entries")
    entries = dict(_legacy_entry(reader, i) for i in range(n_entries))
    n_chunk, name = 0, b""
    if reader.pos + 8 <= len(data):
        n_chunk = reader.i32("the number of chunks")
        name = reader.take(max(0, reader.i32("the length of the data set's name")), "the data set's name")
    return Imatrix(entries, (name.decode("utf-8", "replace"),) if name else (), n_chunk, 0, path)


def _legacy_entry(reader: _Reader, i: int) -> tuple[str, Entry]:
    length = reader.i32(f"the length of name {i}")
    if not 1 <= length <= MAX_NAME:
        raise _not_one(reader.path, f"the name of entry {i} has {length:,} bytes")
    name = reader.take(length, f"the name of entry {i}").decode("utf-8", "replace")
    n_call, n = reader.i32(f"the count of {name!r}"), reader.i32(f"the size of {name!r}")
    if n < 1:
        _corrupt(reader.path, f"{name!r} has {n} values")
    values = np.frombuffer(reader.take(4 * n, f"the values of {name!r}"), "<f4").astype(np.float32)
    return name, Entry(values.reshape(1, -1), (max(1, n_call),))  # without a count the values are the means


# ---- Writing -------------------------------------------------------------------------------------------------------------


def check_target(path: Path, read: Collection[Path] = ()) -> None:
    """UsageError now, before minutes of work, when the file cannot be written: no folder, or one of the files that are ``read``."""
    folder = path.absolute().parent
    if not folder.is_dir() or path.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"-o {show(path)}: expected a file in a folder that exists and is writable. Give another `-o FILE.gguf`.")
    for other in read:
        if path.exists() and other.exists() and path.samefile(other):
            raise UsageError(f"-o {show(path)}: this is the input itself, expected a new file. Give another `-o FILE.gguf`.")


def write_imatrix(path: Path, imatrix: Imatrix) -> None:
    """The GGUF format, by names; the file is complete or absent.  UsageError where the disk does not allow it."""
    try:
        with finished(path) as aside:
            _write_gguf(aside, imatrix)
            with open(aside, "rb") as written:
                os.fsync(written.fileno())
    except OSError as e:
        raise UsageError(f"-o {show(path)}: could not be written: {e.strerror or e}. Give another `-o FILE.gguf`.") from e


def _write_gguf(path: Path, imatrix: Imatrix) -> None:
    from gguf import GGUFWriter

    class Writer(GGUFWriter):  # type: ignore[misc]
        def add_architecture(self) -> None:
            """The matrix is of no architecture: llama.cpp writes no such key."""

    writer = Writer(path, "")
    writer.add_type("imatrix")
    writer.add_array(DATASETS, list(imatrix.datasets) or [""])
    writer.add_uint32(CHUNK_COUNT, imatrix.n_chunk)
    writer.add_uint32(CHUNK_SIZE, imatrix.n_ctx)
    for name, entry in sorted(imatrix.entries.items()):
        writer.add_tensor(name + SUMS, entry.sums)
        writer.add_tensor(name + COUNTS, np.array(entry.counts, np.float32)[:, None])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


# ---- Against a model -----------------------------------------------------------------------------------------------------


def check_imatrix(imatrix: Imatrix, model: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    """The matrices of the layers that have no entry (llama-quantize encodes these without weights), for a note.

    shapes: of all tensors of the model, row-major.  Raises ShapeError and UsageError where the matrix is of another model.
    """
    for name, entry in imatrix.entries.items():
        shape = shapes.get(name)
        if shape is not None and entry.sums.size != shape[-1] * _n_mat(shape):
            raise ShapeError(
                f"{imatrix}: {name!r} has {entry.sums.size:,} weights, but in {model} the tensor is {list(shape)} and has "
                f"{shape[-1] * _n_mat(shape):,} inputs. {_OTHER_MODEL}"
            )
    ours = [name for name, shape in shapes.items() if len(shape) > 1 and re.match(r"blk\.\d+\..*\.weight$", name)]
    missing = tuple(name for name in ours if name not in imatrix.entries)
    unknown = [name for name in imatrix.entries if name not in shapes]
    if unknown:
        raise UsageError(f"{imatrix}: it has weights for {_named(unknown)}, which {model} does not have. {_OTHER_MODEL}")
    bare = sorted(_layers(ours) - _layers(imatrix.entries))
    if bare:
        raise UsageError(
            f"{imatrix}: it has no weights for layer {bare[0]} of {model} ({count(len(bare), 'layer')} of {len(_layers(ours))} without "
            f"any). {_OTHER_MODEL}"
        )
    return missing


_OTHER_MODEL = "The importance matrix is of another model: make this one's with `quantscope imatrix MODEL --text TEXT -o FILE.gguf`."


def _n_mat(shape: tuple[int, ...]) -> int:
    return shape[-3] if len(shape) > 2 else 1


def _layers(names: Collection[str]) -> set[int]:
    def numbers() -> Iterator[int]:
        for name in names:
            if found := re.match(r"blk\.(\d+)\.", name):
                yield int(found[1])

    return set(numbers())


def _named(names: list[str]) -> str:
    return f"{names[0]!r}" + (f" and {len(names) - 1:,} more" if len(names) > 1 else "")
