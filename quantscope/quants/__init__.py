"""Bytes ↔ float32 for every ggml tensor type; the same bytes and the same bits as ggml itself.

    decode(raw, qtype)                  uint8[n_bytes]      →  float32[n]
    encode(x, qtype, n_per_row)         float32[..., n_per_row]  →  uint8[n_bytes]
    encode(x, qtype, n_per_row, importance)      the same with a weight per column, as llama-quantize --imatrix

A codec is a pair of *kernels* that work on whole blocks, write into an array they are given and know nothing else:

    decode_q4_0(blocks: uint8[n_blocks, type_size], out: float32[n_blocks, block_size])
    encode_q4_0(x: float32[n_blocks, block_size], out: uint8[n_blocks, type_size])

and, where a weight per column changes the bytes, a third one that also takes ``importance: float32[blocks_per_row, block_size]``.
A kernel uses one thread and releases the GIL (``@numba.njit(nogil=True, cache=True)``, no ``prange``, no fastmath); this module
hands each thread its share of the blocks.  So there is one thread pool, a kernel compiles fast, and the result cannot depend on the
number of threads.  Kernels are named here as text and imported at their first use: reading Q4_0 never loads the encoders.

A new type is one row in ``qtypes.py``, one row in ``CODECS``, one kernel and its oracle test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantscope.errors import BlockError, NonFiniteError, ShapeError, UnsupportedTypeError
from quantscope.qtypes import QuantType
from quantscope.quants.threads import set_threads, share_out, thread_count

__all__ = ["CODECS", "Codec", "can_decode", "can_encode", "decode", "encode", "set_threads", "thread_count"]

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Kernel = Callable[..., Any]


@cache
def _kernel(name: str) -> Kernel:
    """The function ``"module:function"`` of this package, imported now."""
    module, function = name.split(":")
    kernel: Kernel = getattr(import_module(f"{__name__}.{module}"), function)
    return kernel


@dataclass(frozen=True)
class Codec:
    """The kernels of a type as ``"module:function"``: no encoder where we only read it, no weighted one where weights change nothing."""

    decoder: str
    encoder: str | None = None
    weighted: str | None = None

    def decode(self, blocks: Bytes, out: Floats) -> None:
        """blocks: uint8[n_blocks, type_size], out: float32[n_blocks, block_size]; one thread."""
        _kernel(self.decoder)(blocks, out)

    def encode(self, x: Floats, out: Bytes) -> None:
        """x: finite float32[n_blocks, block_size], out: uint8[n_blocks, type_size]; one thread."""
        assert self.encoder is not None  # encode() below has refused such a type
        _kernel(self.encoder)(x, out)

    def encode_rows(self, x: Floats, importance: Floats, out: Bytes) -> None:
        """As ``encode``, with importance: float32[blocks_per_row, block_size]; x, out: whole rows of blocks."""
        assert self.weighted is not None  # encode() below has taken the other kernel
        _kernel(self.weighted)(x, importance, out)


def _check_finite(x: Floats) -> None:
    """FloatingPointError where an element is not finite."""
    if not _kernel("kernel:all_finite")(x.reshape(-1).view(np.uint32)):
        raise FloatingPointError


# fmt: off
CODECS: dict[str, Codec] = {
    "F32":     Codec("legacy:decode_f32",      "legacy:encode_f32"),
    "F16":     Codec("legacy:decode_f16",      "legacy:encode_f16"),
    "BF16":    Codec("legacy:decode_bf16",     "legacy:encode_bf16"),
    "Q4_0":    Codec("legacy:decode_q4_0",     "legacy:encode_q4_0",  "weighted:encode_q4_0"),
    "Q4_1":    Codec("legacy:decode_q4_1",     "legacy:encode_q4_1",  "weighted:encode_q4_1"),
    "Q5_0":    Codec("legacy:decode_q5_0",     "legacy:encode_q5_0",  "weighted:encode_q5_0"),
    "Q5_1":    Codec("legacy:decode_q5_1",     "legacy:encode_q5_1",  "weighted:encode_q5_1"),
    "Q8_0":    Codec("legacy:decode_q8_0",     "legacy:encode_q8_0"),
    "Q2_K":    Codec("k_quants:decode_q2_k",   "k_search:encode_q2_k", "weighted:encode_q2_k"),
    "Q3_K":    Codec("k_quants:decode_q3_k",   "k_search:encode_q3_k", "weighted:encode_q3_k"),
    "Q4_K":    Codec("k_quants:decode_q4_k",   "k_search:encode_q4_k", "weighted:encode_q4_k"),
    "Q5_K":    Codec("k_quants:decode_q5_k",   "k_search:encode_q5_k", "weighted:encode_q5_k"),
    "Q6_K":    Codec("k_quants:decode_q6_k",   "k_search:encode_q6_k", "weighted:encode_q6_k"),
    "Q8_1":    Codec("rare:decode_q8_1"),
    "Q8_K":    Codec("rare:decode_q8_k"),
    "IQ1_S":   Codec("i_quants:decode_iq1_s"),
    "IQ1_M":   Codec("i_quants:decode_iq1_m"),
    "IQ2_XXS": Codec("i_quants:decode_iq2_xxs"),
    "IQ2_XS":  Codec("i_quants:decode_iq2_xs"),
    "IQ2_S":   Codec("i_quants:decode_iq2_s"),
    "IQ3_XXS": Codec("i_quants:decode_iq3_xxs"),
    "IQ3_S":   Codec("i_quants:decode_iq3_s"),
    "IQ4_NL":  Codec("i_quants:decode_iq4_nl"),
    "IQ4_XS":  Codec("i_quants:decode_iq4_xs"),
    "TQ1_0":   Codec("rare:decode_tq1_0"),
    "TQ2_0":   Codec("rare:decode_tq2_0"),
    "MXFP4":   Codec("rare:decode_mxfp4"),
    "NVFP4":   Codec("rare:decode_nvfp4"),
    "Q1_0":    Codec("rare:decode_q1_0"),
    "Q2_0":    Codec("rare:decode_q2_0"),
}
# fmt: on


def can_decode(qtype: QuantType) -> bool:
    return qtype.name in CODECS


def can_encode(qtype: QuantType) -> bool:
    return qtype.name in CODECS and CODECS[qtype.name].encoder is not None


def decode(raw: Bytes, qtype: QuantType, out: Floats | None = None) -> Floats:
    """The float32 values stored in ``raw``, bit-identical to ggml's ``to_float``.

    raw: uint8[n_blocks · type_size], contiguous, may be read-only (a memory map); out: float32[n_blocks · block_size] to write into, so
    that a loop over layers allocates once.  Returns ``out`` or a new array.
    Raises UnsupportedTypeError (integers and F64 hold no weights), BlockError when the bytes are no whole number of blocks,
    ShapeError when ``out`` does not fit.  Source: ``dequantize_row_*`` in ggml-quants.c.
    """
    codec = _codec(qtype, "decode", list(CODECS))
    if raw.dtype != np.uint8 or raw.ndim != 1 or not raw.flags.c_contiguous or raw.size % qtype.type_size:
        raise BlockError(
            f"{raw.dtype}{list(raw.shape)} cannot be decoded as {qtype}: expected contiguous uint8[n], n a multiple of {qtype.type_size} "
            f"bytes (one block of {qtype.block_size} elements). The tensor is probably cut short or of another type; `quantscope inspect "
            f"FILE` lists the type and size of every tensor."
        )
    n_blocks = raw.size // qtype.type_size
    n = n_blocks * qtype.block_size
    if out is None:
        out = np.empty(n, np.float32)
    elif out.dtype != np.float32 or out.shape != (n,) or not (out.flags.c_contiguous and out.flags.writeable):
        raise ShapeError(
            f"cannot decode {qtype} into {out.dtype}{list(out.shape)}: expected a contiguous, writeable float32[{n}], as {raw.size} bytes "
            f"hold {n} elements. Pass an `out` of that size, or none."
        )
    share_out(codec.decode, _read_only(raw).reshape(n_blocks, qtype.type_size), out.reshape(n_blocks, qtype.block_size))
    return out


def encode(x: Floats, qtype: QuantType, n_per_row: int, importance: Floats | None = None) -> Bytes:
    """The bytes that ``ggml_quantize_chunk`` makes of ``x``, identical to the last bit.

    x: float32[..., n_per_row]; blocks do not cross rows.  importance: float32[n_per_row], one weight ≥ 0 per column: the mean square of
    the input that multiplies it, as ``--imatrix`` brings it; the types without a search (Q8_0, floats) ignore it.
    Returns uint8[x.size / block_size · type_size].
    Raises UnsupportedTypeError where the type is only read, BlockError when ``n_per_row`` is no multiple of the block,
    ShapeError when the last axis, or ``importance``, is not ``n_per_row`` long, NonFiniteError naming the first NaN or infinity.
    Source: ``quantize_row_*_ref`` in ggml-quants.c, with importance ``quantize_row_*_impl``.
    """
    codec = _codec(qtype, "encode", [name for name, c in CODECS.items() if c.encoder])
    row_bytes = qtype.row_bytes(n_per_row)
    if x.dtype != np.float32 or x.ndim == 0 or x.shape[-1] != n_per_row:
        raise ShapeError(
            f"{x.dtype}{list(x.shape)} cannot be encoded as rows of {n_per_row}: expected float32[..., {n_per_row}]. Check that the tensor "
            f"is row-major, [out, in], and convert it with `x.astype(numpy.float32)`."
        )
    if importance is not None:
        _check_importance(importance, n_per_row)
    if n_per_row == 0:
        return np.empty(0, np.uint8)
    x = np.ascontiguousarray(x)
    out = np.empty(x.size // n_per_row * row_bytes, np.uint8)
    try:
        if importance is None or codec.weighted is None:
            _encode_blocks(codec, qtype, x, out)
        else:
            _encode_rows(codec, qtype, x.reshape(-1, n_per_row), importance, out.reshape(-1, row_bytes))
    except FloatingPointError:
        raise _non_finite(x, qtype) from None
    return out


def _encode_blocks(codec: Codec, qtype: QuantType, x: Floats, out: Bytes) -> None:
    def share(x: Floats, out: Bytes) -> None:
        _check_finite(x)
        codec.encode(x, out)

    share_out(share, _read_only(x.reshape(-1, qtype.block_size)), out.reshape(-1, qtype.type_size))


def _encode_rows(codec: Codec, qtype: QuantType, x: Floats, importance: Floats, out: Bytes) -> None:
    """x: float32[n_rows, n_per_row], out: uint8[n_rows, row_bytes]: a thread gets whole rows, as weights belong to columns."""
    columns = _read_only(np.ascontiguousarray(importance).reshape(-1, qtype.block_size))

    def share(x: Floats, out: Bytes) -> None:
        _check_finite(x)
        codec.encode_rows(x.reshape(-1, qtype.block_size), columns, out.reshape(-1, qtype.type_size))

    share_out(share, _read_only(x), out)


def _check_importance(importance: Floats, n_per_row: int) -> None:
    if importance.dtype != np.float32 or importance.shape != (n_per_row,):
        raise ShapeError(
            f"importance {importance.dtype}{list(importance.shape)} cannot weigh the columns of rows of {n_per_row}: expected "
            f"float32[{n_per_row}], one number per input. It is probably of another model: compute it with `quantscope imatrix MODEL`."
        )
    bad = ~(np.isfinite(importance) & (importance >= 0))
    if bad.any():
        at = int(np.argmax(bad))
        raise NonFiniteError(
            f"importance [{at}] of {n_per_row} is {importance[at]}: expected finite numbers ≥ 0 (mean squares), found {int(bad.sum())} "
            f"others. The model overflowed on the calibration text, or the file is damaged: compute it with `quantscope imatrix MODEL`."
        )


def _non_finite(x: Floats, qtype: QuantType) -> NonFiniteError:
    """The error that names the first NaN or infinity in ``x``."""
    finite = np.isfinite(x)
    index = np.unravel_index(int(np.argmin(finite)), x.shape)
    at = "][".join(str(int(i)) for i in index)
    return NonFiniteError(
        f"element [{at}] of {list(x.shape)} is {x[index]}: expected finite numbers to encode as {qtype}, found {int(np.sum(~finite))} of "
        f"{x.size} that are not. The file is damaged, or the model diverged in training, or overflowed when it was converted to F16: "
        f"`quantscope inspect FILE` lists its tensors; compare the file with the published one."
    )


def _codec(qtype: QuantType, verb: str, known: list[str]) -> Codec:
    if qtype.name not in known:
        raise UnsupportedTypeError(f"cannot {verb} {qtype}: expected one of {', '.join(known)}. Choose another type or convert the file.")
    return CODECS[qtype.name]


def _read_only(array: NDArray[Any]) -> NDArray[Any]:
    """A read-only view: memory maps are read-only, and numba compiles a kernel again for each kind of array it meets."""
    view = array.view()
    view.flags.writeable = False
    return view
