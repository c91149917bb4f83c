"""What a weight file is to the rest of the program: metadata plus named raw tensors, read lazily.

Shapes are row-major, as torch writes them: ``[out, in]``, ``[experts, out, in]``; the last axis is the contiguous one and
the one that blocks run along.  GGUF stores the same numbers reversed (``ne[0]`` is the row length).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np

from quantscope.errors import MissingTensorError
from quantscope.qtypes import QuantType

Bytes: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]  # 1-D


@dataclass(frozen=True)
class RawTensor:
    """Name, type and shape of one stored tensor; its bytes come from ``Source.raw``."""

    name: str
    qtype: QuantType
    shape: tuple[int, ...]  # row-major, the last axis is contiguous

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def n_per_row(self) -> int:
        """Elements along the contiguous axis; 1 for a scalar."""
        return self.shape[-1] if self.shape else 1

    @property
    def n_bytes(self) -> int:
        """rows · (n_per_row / block_size) · type_size; BlockError when blocks do not fill a row."""
        n_rows = self.n_elements // self.n_per_row if self.n_elements else 0
        return n_rows * self.qtype.row_bytes(self.n_per_row)


class Source(Protocol):
    """One model on disk: a GGUF file or a Hugging Face folder."""

    @property
    def path(self) -> Path: ...

    @property
    def format(self) -> Literal["gguf", "safetensors"]: ...

    @property
    def metadata(self) -> Mapping[str, Any]:
        """GGUF key-value pairs, or the parsed ``config.json``."""

    @property
    def tensors(self) -> Mapping[str, RawTensor]:
        """Every stored tensor by its name in the file, in file order."""

    @property
    def truncated(self) -> tuple[str, ...]:
        """Tensors whose bytes the file does not (all) hold; empty unless opened with ``allow_truncated``."""

    @property
    def file_bytes(self) -> int: ...

    @property
    def packing(self) -> str | None:
        """How the checkpoint was quantized (``GPTQ``) whose tensors are shown as the values they stand for; None: as they are stored."""

    def raw(self, name: str) -> Bytes:
        """The tensor's bytes as a read-only, memory-mapped uint8 view.

        Raises MissingTensorError when there is no such tensor, TruncatedFileError when the file ends before it does.
        """

    def entries(self, name: str, which: slice) -> Bytes:
        """Some of the entries along the first axis, each the bytes of a row: uint8 [n, bytes].  Errors as of ``raw``."""

    def will_need(self, name: str) -> None:
        """Let the system read the tensor from disk while we do something else."""

    def let_go(self, name: str) -> None:
        """Give the tensor's pages back: they count as this process's memory from the moment they are read."""

    def sha256(self) -> str:
        """Hex digest of the content; reads everything once."""

    def close(self) -> None:
        """Drop the mapping; views handed out before stay valid."""


def entries(source: Source, name: str, which: slice) -> Bytes:
    """``Source.entries`` of one whose tensors lie in the file as they are."""
    return source.raw(name).reshape(source.tensors[name].shape[0], -1)[which]


def missing_tensor(path: Path, name: str, names: Iterable[str]) -> MissingTensorError:
    """The error for a name the file does not hold, with the closest ones it does."""
    near = get_close_matches(name, list(names), n=3, cutoff=0.6)
    hint = f"The closest names are {', '.join(map(repr, near))}. " if near else ""
    return MissingTensorError(
        f"{show(path)}: there is no tensor {name!r}. {hint}The file is of another architecture, or was converted incompletely: "
        f"run `quantscope inspect {show(path)}` to list its tensors."
    )


def printable(text: str) -> str:
    """Text that any terminal can print: bytes that were no UTF-8 as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def show(path: Path) -> str:
    """The path as printable text."""
    return printable(str(path))
