"""What the packings of Hugging Face checkpoints share: reading a matrix's parts, and small integers out of 32-bit words."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from quantscope.errors import CorruptFileError, MissingTensorError, UnsupportedTypeError
from quantscope.sources.base import RawTensor, show
from quantscope.sources.safetensors import SafetensorsSource

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]

# dtype in the file → numpy's; floats that numpy does not have are made from their codes
INTEGERS = {"U8": "u1", "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}
FLOATS = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}


@dataclass(frozen=True)
class Packed:
    """One matrix that is stored as several tensors: how it is called unpacked, and how its values come about."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]  # names of the tensors it is made of, all in the file
    values: Callable[[], Floats]  # float32, in this shape
    some: Callable[[slice], Floats] | None = None  # the same of some entries of the first axis, where they can be unpacked alone


class Parts:
    """The tensors of a folder as arrays, and the ``quantization_config`` that says how they are packed."""

    def __init__(self, source: SafetensorsSource, settings: Mapping[str, Any]) -> None:
        self._source, self.settings = source, settings
        self.tensors: Mapping[str, RawTensor] = source.tensors

    def ending(self, suffix: str) -> list[str]:
        """What comes before the suffix, of every tensor whose name ends so."""
        return [name.removesuffix(suffix) for name in self.tensors if name.endswith(suffix)]

    def need(self, *names: str) -> None:
        """MissingTensorError for the first that the folder lacks."""
        for name in names:
            if name not in self.tensors:
                raise MissingTensorError(
                    f"{show(self._source.path)}: there is no tensor {name!r}, which belongs to a packed matrix. The checkpoint was saved "
                    f"incompletely, or is packed in another way than its quantization_config says: fetch it again."
                )

    def shape(self, name: str) -> tuple[int, ...]:
        self.need(name)
        return self.tensors[name].shape

    def array(self, name: str) -> Array:
        """Integers as they are stored, any float as float32."""
        self.need(name)
        tensor, raw = self.tensors[name], self._source.raw(name)
        kind = tensor.qtype.name
        if kind in INTEGERS:
            values: Array = raw.view(INTEGERS[kind])
        elif kind in FLOATS:
            values = raw.view(FLOATS[kind]).astype(np.float32)
        elif kind == "BF16":
            values = (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            values = small_floats(kind)[raw]
        return values.reshape(tensor.shape)

    def setting(self, key: str, allowed: Sequence[object], default: object = None) -> Any:
        """An entry of quantization_config; UnsupportedTypeError for a value that is not understood."""
        value = self.settings.get(key, default)
        if value not in allowed:
            raise UnsupportedTypeError(
                f"{show(self._source.path / 'config.json')}: quantization_config.{key} is {value!r}, expected "
                f"{' or '.join(map(repr, allowed))}. This way of packing is not known here: take the original F16 or BF16 weights, or a "
                f"GGUF file of this model."
            )
        return value

    def wrong(self, name: str, expected: str) -> CorruptFileError:
        """The error for a part that does not fit the others."""
        return CorruptFileError(
            f"{show(self._source.path)}: tensor {name!r} has the shape {list(self.shape(name))}, expected {expected} from the other parts "
            f"of the same matrix and quantization_config. The config belongs to other weights, or the file was damaged: fetch both again."
        )

    @property
    def path(self) -> Path:
        return self._source.path


@cache
def small_floats(kind: str) -> Floats:
    """Code → value of an 8-bit float, [256] float32: sign, exponent, mantissa; of F8_E8M0 a power of two.

    Source: OCP 8-bit Floating Point Specification (E4M3 has no infinities, its largest code is NaN); OCP Microscaling Formats (E8M0).
    """
    codes = np.arange(256)
    if kind == "F8_E8M0":
        return np.where(codes == 255, np.nan, np.ldexp(1.0, codes - 127)).astype(np.float32)
    e_bits, m_bits = {"F8_E4M3": (4, 3), "F8_E5M2": (5, 2)}[kind]
    bias, top = 2 ** (e_bits - 1) - 1, 2**e_bits - 1
    exponent, mantissa = codes >> m_bits & top, codes & (2**m_bits - 1)
    normal = np.ldexp(1 + mantissa / 2**m_bits, exponent - bias)
    values = np.where(exponent == 0, np.ldexp(mantissa / 2**m_bits, 1 - bias), normal)
    if kind == "F8_E5M2":
        values = np.where(exponent == top, np.where(mantissa == 0, np.inf, np.nan), values)
    else:
        values = np.where((exponent == top) & (mantissa == 2**m_bits - 1), np.nan, values)
    return np.where(codes >> 7, -values, values).astype(np.float32)


def unpacked(words: Array, bits: int) -> Array:
    """Unsigned integers of ``bits`` bits from 32-bit words along axis 0, the lowest bits first: [n,m] → [n·32/bits,m] uint8.

    3-bit integers run on from one word into the next, 32 of them in three words.
    """
    together = math.lcm(bits, 32) // 32  # words that hold whole integers
    groups = np.ascontiguousarray(words).view(np.uint32).reshape(-1, together, words.shape[1])
    out = np.empty((len(groups), together * 32 // bits, words.shape[1]), np.uint8)
    for j in range(out.shape[1]):
        word, shift = divmod(bits * j, 32)
        values = groups[:, word] >> np.uint32(shift)
        if shift + bits > 32:
            values = values | groups[:, word + 1] << np.uint32(32 - shift)
        out[:, j] = values & np.uint32(2**bits - 1)
    return out.reshape(-1, words.shape[1])
