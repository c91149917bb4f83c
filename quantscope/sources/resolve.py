"""A path from the command line → an open source."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from quantscope.errors import MissingFileError
from quantscope.sources.base import Source, printable, show
from quantscope.sources.files import raise_os_error
from quantscope.sources.gguf import open_gguf
from quantscope.sources.multimodal import language_model
from quantscope.sources.packed import decoded
from quantscope.sources.safetensors import open_folder
from quantscope.sources.split import n_parts, open_parts
from quantscope.wording import some

NAMED = ("hf:", "ollama:")
_LISTED = 5  # GGUF files of a folder that an error lists


def open_source(path: str | Path, *, allow_truncated: bool = False, as_stored: bool = False) -> Source:
    """Open a GGUF file, a GGUF model in parts by any of them, a folder with ``config.json`` and safetensors weights, or a model by name
    (``hf:OWNER/REPO``, ``ollama:NAME``).

    allow_truncated: open a file whose last tensors are missing; ``Source.truncated`` names them.  as_stored: show the tensors of a
    quantized checkpoint as they are packed; otherwise they are read as the float32 values they stand for.
    Raises a ModelFileError whose text says what to do.
    """
    where = local_path(path)
    if not os.path.isdir(where):  # unlike Path.is_dir, false for every path the system refuses: open_gguf says why
        file = open_gguf(where, allow_truncated=allow_truncated)
        return file if n_parts(file) == 1 else open_parts(file, allow_truncated=allow_truncated)
    try:
        names = os.listdir(where)
    except OSError as error:
        raise_os_error(where, error)
    if "config.json" not in names:
        raise _no_config(where, names)
    folder = open_folder(where, allow_truncated=allow_truncated)
    return folder if as_stored else language_model(decoded(folder))


def is_name(path: str) -> bool:
    """Whether this is a model's name in a hub or a store, and no path."""
    return path.startswith(NAMED) and not os.path.exists(path)


def short_name(model: str) -> str:
    """How a file or folder made from a model is called: the last part of its path or name, without ``.gguf``."""
    if is_name(model):
        return re.sub(r"[^\w.-]+", "-", model.partition(":")[2].rpartition("/")[2]).removesuffix(".gguf")
    path = Path(model).resolve()
    return path.stem if path.suffix == ".gguf" else path.name


def local_path(path: str | Path) -> Path:
    """Where a model is on this machine; one that is named is looked up, and fetched where it is not here yet."""
    text = str(path)
    if is_name(text):
        kind, _, name = text.partition(":")
        return _finder(kind)(name)
    return Path(os.path.expanduser(path))


def _finder(kind: str) -> Callable[[str], Path]:
    """The module is imported when it is needed."""
    if kind == "hf":
        from quantscope.sources.hub import fetched

        return fetched
    from quantscope.sources.ollama import stored

    return stored


def _no_config(folder: Path, names: Sequence[str]) -> MissingFileError:
    found = sorted(name for name in names if name.endswith(".gguf"))
    if found:
        return MissingFileError(
            f"{show(folder)}: a folder without config.json, expected a GGUF file or a Hugging Face folder. It holds GGUF files "
            f"({printable(some(found, _LISTED))}): give one of them, e.g. `{show(folder / found[0])}`."
        )
    return MissingFileError(
        f"{show(folder)}: a folder without config.json, expected a Hugging Face folder with config.json and safetensors weights. "
        f"It is the wrong folder, or was copied without its small files: run `ls {show(folder)}` and fetch config.json beside the weights."
    )
