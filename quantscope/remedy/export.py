"""A model file in other types: what llama-quantize writes, byte for byte, with corrected tensors where there are some.

    for each tensor in llama.cpp's order:  a band of rows → float32 → encode(type) → file

A band is BAND_BYTES of float32 values, so memory does not grow with the model: one tensor's pages of the source and some bands.
The file is written beside its place and renamed when it is whole.

Source: ``llama_model_quantize_impl`` in src/llama-quant.cpp of llama.cpp.
"""

from __future__ import annotations

import io
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from quantscope import __version__
from quantscope.errors import NonFiniteError, QuantscopeError, ShapeError, UsageError
from quantscope.new_file import written
from quantscope.qtypes import QTYPES, QuantType
from quantscope.quants import Floats, can_decode, encode
from quantscope.recipes import TensorShape, layer_order
from quantscope.remedy.gguf_file import padded, padding, string, uint32, write_head
from quantscope.remedy.original import Original
from quantscope.sources.base import Bytes, RawTensor, missing_tensor, show
from quantscope.wording import size

BAND_BYTES = 32 << 20  # [bytes] float32 values that are decoded, checked and encoded at a time
QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION of ggml.h
FILE_TYPE, QUANTIZATION = "general.file_type", "general.quantization_version"
DROPPED = ("split.no", "split.count", "split.tensors.count")  # the new file is whole
NOTHING: Mapping[str, Any] = {}

Importance = Callable[[str], Floats | None]
Step = Callable[[int, str], None]  # (weights done, tensor at work)


@dataclass(frozen=True)
class Written:
    """The new file: its size, and its tensors in file order."""

    path: Path
    n_bytes: int
    tensors: tuple[RawTensor, ...]

    @property
    def bpw(self) -> float:
        """8 · Σ bytes / Σ elements over all tensors."""
        return 8 * sum(t.n_bytes for t in self.tensors) / sum(t.n_elements for t in self.tensors)


@dataclass(frozen=True)
class Corrections:
    """What the new file has in place of, or beside, its source's tensors; see ``export``."""

    replacements: Mapping[str, Any]
    floats: Mapping[str, NDArray[np.float32]]
    extra: Mapping[str, NDArray[np.float32]]


def export(
    model: Original,
    out: Path,
    types: Mapping[str, QuantType],
    file_type: int,
    *,
    replacements: Mapping[str, Any] = NOTHING,
    floats: Mapping[str, NDArray[np.float32]] = NOTHING,
    extra: Mapping[str, NDArray[np.float32]] = NOTHING,
    importance: Importance = lambda name: None,
    metadata: Mapping[str, str | int] = NOTHING,
    step: Step = lambda done, what: None,
) -> Written:
    """Write the model to ``out``, which is complete or untouched.

    types: canonical name → type; tensors that are not named keep theirs.  file_type: ``general.file_type``, as in ``recipes.PRESETS``.
    replacements: name → the tensor's bytes, encoded in its new type (bytes or a uint8 array).  floats: name → float32 values of the
    tensor's shape that are encoded in place of the source's.  extra: name → float32 values of a tensor that the source does not have
    (``blk.0.attn_q.bias``); it stays F32.  All three may be lazy: each tensor is asked for when it is checked, and when it is written.
    importance: name → weights of the columns, [n_in] and of stacked experts one after the other; None where there are none.
    metadata: further keys, beside ``quantscope.version``, ``.source`` and ``.source_sha256``.
    Raises UsageError when ``out`` is the source itself, or its folder or disk do not allow it; NonFiniteError for a NaN or an infinity;
    BlockError, ShapeError, MissingTensorError and UnsupportedTypeError for types and corrections that do not fit.
    """
    check_target(model, out)
    corrections = Corrections(replacements, floats, extra)
    tensors = _new_tensors(model, types, corrections)
    pairs = _pairs(model, file_type, metadata)
    head = io.BytesIO()
    write_head(head, pairs, tensors, model.alignment)
    n_bytes = len(head.getbuffer()) + sum(padded(t.n_bytes, model.alignment) for t in tensors)
    _check_room(out, n_bytes)
    with written(out, partial(_failed, out)) as file:
        file.write(head.getbuffer())
        _write_data(file, model, tensors, corrections, importance, step)
    return Written(out, n_bytes, tuple(tensors))


def check_target(model: Original, out: Path) -> None:
    """UsageError unless ``out`` is a place for a new file, and not the source."""
    if not out.absolute().parent.is_dir() or (out.exists() and not out.is_file()):
        raise UsageError(f"{show(out)}: expected a file in a folder that exists. Make the folder first, or give another OUT.gguf.")
    source = model.source.path
    if out.exists() and any(os.path.samefile(out, p) for p in ([source] if source.is_file() else source.iterdir()) if p.exists()):
        raise UsageError(
            f"{show(out)}: this is the model to quantize itself, expected another file: its weights would be lost. Give another OUT.gguf."
        )


def _new_tensors(model: Original, types: Mapping[str, QuantType], c: Corrections) -> list[RawTensor]:
    """The tensors of the new file in llama.cpp's order, by layer and name.  Checks that the corrections fit them."""
    for name in (*types, *c.replacements, *c.floats):
        if name not in model.tensors:
            raise missing_tensor(model.source.path, name, model.tensors)
    found = {name: RawTensor(name, types.get(name, t.qtype), t.shape) for name, t in model.tensors.items()}
    for name, values in c.extra.items():
        if name in found:
            raise ShapeError(f"tensor {name!r} is in the model already, expected a new name: give its values as `floats` instead.")
        found[name] = RawTensor(name, QTYPES["F32"], values.shape)
    for name, values in c.floats.items():
        if values.shape != found[name].shape:
            raise ShapeError(f"tensor {name!r}: corrected values of shape {list(values.shape)}, expected {list(found[name].shape)}.")
    for name, data in c.replacements.items():
        if memoryview(data).nbytes != found[name].n_bytes:
            t = found[name]
            raise ShapeError(f"tensor {name!r}: {memoryview(data).nbytes:,} bytes, expected {t.n_bytes:,} for {t.qtype} {list(t.shape)}.")
    return sorted(found.values(), key=lambda t: layer_order(TensorShape(t.name, t.shape)))


def _pairs(model: Original, file_type: int, metadata: Mapping[str, str | int]) -> dict[str, bytes]:
    """The source's metadata; what is set anew comes last, as llama.cpp has it."""
    source = model.source
    new = {QUANTIZATION: uint32(QUANTIZATION_VERSION), FILE_TYPE: uint32(file_type)}
    ours = {"version": __version__, "source": source.path.name, "source_sha256": source.sha256()}
    new |= {f"quantscope.{key}": string(value) for key, value in ours.items()}
    new |= {key: string(value) if isinstance(value, str) else uint32(value) for key, value in metadata.items()}
    return {key: value for key, value in model.pairs().items() if key not in new and key not in DROPPED} | new


def _check_room(out: Path, n_bytes: int) -> None:
    free = shutil.disk_usage(out.absolute().parent).free
    if free < n_bytes:
        raise UsageError(
            f"{show(out)}: the file takes {size(n_bytes)}, the disk has {size(free)} free. Give an OUT.gguf on another disk, or a "
            f"smaller type."
        )


def _failed(out: Path, why: str) -> UsageError:
    return UsageError(
        f"{show(out)}: the file could not be written: {why}. Nothing is left of it: make room, or give an OUT.gguf on another disk."
    )


def _write_data(file: BinaryIO, model: Original, tensors: list[RawTensor], c: Corrections, importance: Importance, step: Step) -> None:
    done = 0
    for i, t in enumerate(tensors):
        what = f"{i + 1}/{len(tensors)} {t.name}"
        step(done, what)
        for name in (n.name for n in tensors[i + 1 : i + 2] if n.name in model.tensors):
            model.will_need(name)
        for band in _encoded(model, t, c, importance):
            file.write(band.data)
            done += band.nbytes // t.qtype.type_size * t.qtype.block_size
            step(done, what)
        file.write(bytes(padding(t.n_bytes, model.alignment)))
        if t.name in model.tensors:
            model.let_go(t.name)


def _encoded(model: Original, t: RawTensor, c: Corrections, importance: Importance) -> Iterator[Bytes]:
    """The tensor's bytes in the new file, a band of rows at a time."""
    if t.name in c.replacements:
        yield np.frombuffer(c.replacements[t.name], np.uint8)
        return
    given = c.extra.get(t.name) if t.name in c.extra else c.floats.get(t.name)
    if given is None and t.qtype == model.tensors[t.name].qtype:
        for rows in _bands(t, 1):
            if can_decode(t.qtype):
                _check_finite(model, t.name, model.values(t.name, rows), rows.start)
            yield model.raw(t.name, rows)
        return
    weights = _weights(t, importance)
    n_matrices = 1 if weights is None else len(weights)
    rows_each = t.n_elements // t.n_per_row // n_matrices
    for rows in _bands(t, n_matrices):
        values = model.values(t.name, rows) if given is None else np.ascontiguousarray(given, np.float32).reshape(-1, t.n_per_row)[rows]
        _check_finite(model, t.name, values, rows.start)
        own = None if weights is None else weights[rows.start // rows_each]
        yield _encode(values, t, own)


def _bands(t: RawTensor, n_matrices: int) -> list[slice]:
    """Consecutive rows, few enough for BAND_BYTES of float32 values, that do not cross into the next of the stacked matrices."""
    n_rows = t.n_elements // t.n_per_row // n_matrices
    step = max(1, BAND_BYTES // (4 * t.n_per_row))
    return [slice(m + a, m + min(a + step, n_rows)) for m in range(0, n_matrices * n_rows, n_rows) for a in range(0, n_rows, step)]


def _weights(t: RawTensor, importance: Importance) -> Floats | None:
    """float32 [matrices of the stack, row length]"""
    values = importance(t.name)
    if values is None:
        return None
    if values.size != math.prod(t.shape[:-2]) * t.n_per_row:
        raise ShapeError(
            f"tensor {t.name!r}: {values.size:,} weights of importance, expected {math.prod(t.shape[:-2]) * t.n_per_row:,}, one for each "
            f"input. The importance matrix is of another model: make this one's with `quantscope imatrix MODEL --text TEXT -o FILE.gguf`."
        )
    return np.ascontiguousarray(values, np.float32).reshape(-1, t.n_per_row)


def _encode(values: Floats, t: RawTensor, weights: Floats | None) -> Bytes:
    try:
        return encode(values, t.qtype, t.n_per_row, weights)
    except QuantscopeError as e:
        raise type(e)(f"tensor {t.name!r}: {e}") from e


def _check_finite(model: Original, name: str, values: Floats, first_row: int) -> None:
    finite = np.isfinite(values)
    if finite.all():
        return
    row, column = divmod(int(finite.argmin()), values.shape[-1])
    raise NonFiniteError(
        f"{show(model.source.path)}: tensor {name!r} holds {values[row, column]} in row {first_row + row}, column {column}, expected "
        f"finite numbers. The file is damaged, the training diverged, or the conversion overflowed (BF16 weights written as F16 do): "
        f"convert the original again with `--outtype bf16` or `f32`."
    )
