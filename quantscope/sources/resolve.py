"""A path from the command line → an open source."""

from __future__ import annotations

from pathlib import Path

from quantscope.errors import MissingFileError
from quantscope.sources.base import Source, show
from quantscope.sources.gguf import open_gguf
from quantscope.sources.safetensors import open_folder

_NAMED = 5  # GGUF files of a folder that an error lists


def open_source(path: str | Path, *, allow_truncated: bool = False) -> Source:
    """Open a GGUF file, or a folder with ``config.json`` and safetensors weights.

    allow_truncated: open a file whose last tensors are missing; ``Source.truncated`` names them.
    Raises a ModelFileError whose text says what to do.
    """
    where = Path(path).expanduser()
    if not where.is_dir():
        return open_gguf(where, allow_truncated=allow_truncated)
    if not (where / "config.json").exists():
        raise _no_config(where)
    return open_folder(where, allow_truncated=allow_truncated)


def _no_config(folder: Path) -> MissingFileError:
    found = sorted(folder.glob("*.gguf"))
    if found:
        names = ", ".join(p.name for p in found[:_NAMED]) + (f" and {len(found) - _NAMED} more" if len(found) > _NAMED else "")
        return MissingFileError(
            f"{show(folder)}: a folder without config.json, expected a GGUF file or a Hugging Face folder. It holds GGUF files "
            f"({names.encode('utf-8', 'backslashreplace').decode()}): give one of them, e.g. `{show(found[0])}`."
        )
    return MissingFileError(
        f"{show(folder)}: a folder without config.json, expected a Hugging Face folder with config.json and safetensors weights. "
        f"It is the wrong folder, or was copied without its small files: run `ls {show(folder)}` and fetch config.json beside the weights."
    )
