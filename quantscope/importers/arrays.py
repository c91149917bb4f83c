"""Arrays that an engine saved (npz, a folder of npy, safetensors) → a trace of whole tensors."""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantscope.errors import ImportFormatError, MissingFileError
from quantscope.importers.axes import ORDER_MATTERS
from quantscope.importers.base import AT_LAST, UNKNOWN_ENGINE, Draft, Imported, Run, non_finite_note
from quantscope.importers.layouts import Known, align, shown
from quantscope.importers.name_map import Rule, taps_of, unmapped_note
from quantscope.language import english, mark
from quantscope.sources.base import show
from quantscope.trace import Full, Origin
from quantscope.wording import listed

ORDER_NOTE = mark(
    "Whether the channels of a head of q and k stand as in GGUF (interleaved) or in two halves (Hugging Face) is not visible in arrays: "
    "they are taken as they are."
)


@dataclass(frozen=True)
class Arrays:
    """Names with their shapes, and how to read one."""

    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Tensor]


def read_arrays(path: Path, rules: Sequence[Rule], known: Known, kind: str) -> Imported:
    """The arrays of a file or folder that are taps, or that a rule makes taps, as float32 [P,channels] or [H,P,S].

    Raises ImportFormatError for a file that cannot be read, names that are no taps, and layouts that fit in no way or in several.
    """
    file = show(path)
    arrays = OPEN[kind](path)
    found = taps_of(arrays.shapes, rules, file)
    layouts, n = align({tap: arrays.shapes[name] for tap, name in found.items()}, known, file)
    draft = Draft(n=n)
    for tap, name in found.items():
        values = layouts[tap].apply(arrays.read(name)).contiguous()
        single = layouts[tap].n_positions == 1 and n != 1
        draft.add(tap, Full(values, (AT_LAST if n is None else (n - 1,)) if single else None))
        if note := non_finite_note(tap, values):
            draft.notes.append(note)
    draft.notes.append(_layout_note([layouts[tap].form for tap in found]))
    if any(tap.partition("-")[0] in ORDER_MATTERS for tap in found):
        draft.notes.append(ORDER_NOTE)
    if note := unmapped_note(arrays.shapes, found):
        draft.notes.append(note)
    return Imported(kind, (Run("call 1", draft.trace(Origin(UNKNOWN_ENGINE))),))


def _layout_note(forms: Sequence[str]) -> str:
    counted = Counter(forms).most_common()
    found = listed(f"{shown(form)} in {n}" for form, n in counted)
    return english("Layouts found: {layouts} of {n} arrays.", layouts=found, n=len(forms))


def open_npz(path: Path) -> Arrays:
    """The arrays of an npz file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: np.asarray(file[name]) for name in file.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as e:
        raise _unreadable(path, "numpy's npz", e) from None
    return Arrays({name: a.shape for name, a in arrays.items()}, lambda name: _tensor(arrays[name], path, name))


def open_npy(path: Path) -> Arrays:
    """A npy file, or the npy files of a folder and its subfolders, each named by its path without the ending."""
    files = (
        {path.stem: path} if path.is_file() else {p.relative_to(path).with_suffix("").as_posix(): p for p in sorted(path.rglob("*.npy"))}
    )
    arrays: dict[str, Any] = {}
    for name, file in files.items():
        try:
            arrays[name] = np.load(file, allow_pickle=False, mmap_mode="r")
        except (OSError, ValueError, EOFError) as e:
            raise _unreadable(file, "numpy's npy", e) from None
    return Arrays({name: a.shape for name, a in arrays.items()}, lambda name: _tensor(arrays[name], path, name))


def open_safetensors(path: Path) -> Arrays:
    """The tensors of a safetensors file."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise MissingFileError(f"{show(path)}: no such file, expected arrays to import. Check the path.")

    def read(name: str) -> Tensor:
        with safe_open(str(path), framework="pt") as f:
            x: Tensor = f.get_tensor(name)
        return x.float()

    try:
        with safe_open(str(path), framework="pt") as f:
            shapes = {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as e:
        raise _unreadable(path, "safetensors", e) from None
    return Arrays(shapes, read)


OPEN: dict[str, Callable[[Path], Arrays]] = {"npz": open_npz, "npy": open_npy, "safetensors": open_safetensors}


def _tensor(array: Any, path: Path, name: str) -> Tensor:
    if array.dtype.kind not in "fiub":
        raise ImportFormatError(
            f"{show(path)}: {name} is an array of {array.dtype}, expected real numbers. numpy has no bfloat16: save float32, or use "
            f"safetensors."
        )
    return torch.from_numpy(np.array(array, np.float32))


def _unreadable(path: Path, what: str, error: Exception) -> ImportFormatError:
    return ImportFormatError(
        f"{show(path)}: expected {what} format, found something that cannot be read as that ({error}). It was cut short or is another kind "
        f"of file; object arrays are not read: save plain float32 arrays."
    )
