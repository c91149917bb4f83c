"""Hugging Face checkpoints that are already quantized, read as the float32 values that their packed matrices stand for.

folder = decoded(SafetensorsSource(path))     a Source in which NAME.weight is float32, whatever it is made from
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from quantscope.errors import CorruptFileError, UnsupportedTypeError
from quantscope.qtypes import QTYPES
from quantscope.sources.base import Bytes, RawTensor, Source, entries, missing_tensor, show
from quantscope.sources.files import read_json_object
from quantscope.sources.packed.bitsandbytes import eight_bits, four_bits
from quantscope.sources.packed.integers import awq, gptq, pack_quantized
from quantscope.sources.packed.parts import Packed, Parts
from quantscope.sources.packed.scaled import mxfp4, scaled
from quantscope.sources.safetensors import SafetensorsSource

CONFIG, OLD_CONFIG = "quantization_config", "quantize_config.json"  # a key of config.json; the file that AutoGPTQ wrote before it


@dataclass(frozen=True)
class Method:
    """One value of ``quant_method``: what it is called, and what looks for its packed matrices."""

    what: str
    find: tuple[Callable[[Parts], Iterator[Packed]], ...]


METHODS: Mapping[str, Method] = {
    "gptq": Method("GPTQ", (gptq,)),
    "awq": Method("AWQ", (awq,)),
    "bitsandbytes": Method("bitsandbytes", (four_bits, eight_bits)),
    "fp8": Method("FP8", (scaled,)),
    "fbgemm_fp8": Method("FP8", (scaled,)),
    "compressed-tensors": Method("compressed-tensors", (scaled, pack_quantized)),
    "mxfp4": Method("MXFP4", (mxfp4,)),
}


class DecodedFolder:
    """A folder with its packed matrices as float32; see ``sources.base.Source``.  ``metadata`` is config.json without quantization_config.

    ``file_bytes`` is what is on disk.  The matrix that was decoded last is held until it is let go: its rows are asked for in bands.
    """

    format: Literal["gguf", "safetensors"] = "safetensors"

    def __init__(self, stored: SafetensorsSource, method: Method, settings: Mapping[str, Any]) -> None:
        self.stored, self.path, self.file_bytes = stored, stored.path, stored.file_bytes
        parts = Parts(stored, settings)
        self._last: tuple[str, Bytes] | None = None
        with _fitting(stored.path, "the packed matrices"):
            self._packed = {p.name: p for find in method.find for p in find(parts)}
        self.packing: str | None = method.what if self._packed else None
        hidden = {part for p in self._packed.values() for part in p.parts}
        made = {p.parts[0]: p for p in self._packed.values()}  # each in the place of its first part
        f32 = QTYPES["F32"]
        names = {
            (p.name if (p := made.get(name)) else name): (RawTensor(p.name, f32, p.shape) if p else tensor)
            for name, tensor in stored.tensors.items()
            if name in made or name not in hidden
        }
        self.tensors: Mapping[str, RawTensor] = MappingProxyType(names)

    @cached_property
    def metadata(self) -> Mapping[str, Any]:
        return MappingProxyType({key: value for key, value in self.stored.metadata.items() if key != CONFIG})

    def _parts(self, name: str) -> tuple[str, ...]:
        return self._packed[name].parts if name in self._packed else (name,)

    @property
    def truncated(self) -> tuple[str, ...]:
        lost = set(self.stored.truncated)
        return tuple(name for name in self.tensors if lost.intersection(self._parts(name)))

    def raw(self, name: str) -> Bytes:
        if name not in self.tensors:
            raise missing_tensor(self.path, name, self.tensors)
        if name not in self._packed:
            return self.stored.raw(name)
        if self._last is None or self._last[0] != name:
            self._last = None  # two matrices at a time would be too many
            with _fitting(self.path, f"tensor {name!r}"):
                values = np.ascontiguousarray(self._packed[name].values(), np.float32).reshape(self._packed[name].shape)
            self._last = name, values.reshape(-1).view(np.uint8)
        return self._last[1]

    def entries(self, name: str, which: slice) -> Bytes:
        packed = self._packed.get(name)
        if packed is None or packed.some is None or (self._last is not None and self._last[0] == name):
            return entries(self, name, which)
        with _fitting(self.path, f"tensor {name!r}"):
            values = np.ascontiguousarray(packed.some(which), np.float32)
        return values.reshape(len(values), -1).view(np.uint8)

    def will_need(self, name: str) -> None:
        for part in self._parts(name):
            self.stored.will_need(part)

    def let_go(self, name: str) -> None:
        if self._last is not None and self._last[0] == name:
            self._last = None
        for part in self._parts(name):
            self.stored.let_go(part)

    def sha256(self) -> str:
        return self.stored.sha256()

    def close(self) -> None:
        self.stored.close()


@contextmanager
def _fitting(path: Path, what: str) -> Iterator[None]:
    """CorruptFileError for parts whose sizes, types or indices do not go together."""
    try:
        yield
    except (ValueError, IndexError, TypeError, ArithmeticError) as error:
        raise CorruptFileError(
            f"{show(path)}: the parts of {what} do not fit together ({error}), expected those that quantization_config describes. The "
            f"config belongs to other weights, or a file was damaged: fetch both again and compare their checksums."
        ) from None


def decoded(folder: SafetensorsSource) -> Source:
    """The folder itself, or with its packed matrices decoded where config.json says that it has some.

    Raises UnsupportedTypeError for an unknown way of packing, MissingTensorError and CorruptFileError when parts are missing or disagree.
    """
    settings = _settings(folder)
    if settings is None:
        return folder
    name = settings.get("quant_method", "gptq" if "bits" in settings else None)
    if name not in METHODS:
        raise UnsupportedTypeError(
            f"{show(folder.path / 'config.json')}: quantization_config.quant_method is {name!r}, expected one of {', '.join(METHODS)}. How "
            f"these weights are packed is not known here: take the original F16 or BF16 weights, or a GGUF file of this model; "
            f"`quantscope inspect {show(folder.path)}` still works."
        )
    return DecodedFolder(folder, METHODS[name], settings)


def _settings(folder: SafetensorsSource) -> Mapping[str, Any] | None:
    given = folder.metadata.get(CONFIG)
    if isinstance(given, dict):
        return given
    path = Path(folder.path / OLD_CONFIG)
    packed = any(name.endswith(".qweight") for name in folder.tensors)
    return read_json_object(path) if packed and os.path.isfile(path) else None
