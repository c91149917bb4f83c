"""Results on disk: each file is complete or absent, and a folder that was made for nothing is removed."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantscope.errors import UsageError
from quantscope.new_file import as_any_new, beside


def check_folder(folder: Path) -> None:
    """UsageError now, before minutes of work, when ``folder`` cannot become an output folder.  Nothing is made yet."""
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise UsageError(f"--out {folder}: {existing} is a file, expected a folder or a new name. Give another --out DIR.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"--out {folder}: {existing} is not writable. Give another --out DIR, or change its permissions.")


def write_files(folder: Path, files: Mapping[str, str]) -> list[Path]:
    """Write UTF-8 files into the folder; every one is finished under another name first, and only then are all renamed.

    Lone surrogates, which undecodable tokens may hold, become ``\\udc80`` escapes.  Raises UsageError when the disk or its
    permissions do not allow it; then no file of the folder has changed.
    """
    made = not folder.exists()
    finished: dict[Path, Path] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            finished[folder / name] = _aside(folder, name, text)
        for target, aside in finished.items():
            aside.replace(target)
    except OSError as e:
        raise UsageError(f"--out {folder}: the results could not be written: {e.strerror or e}. Give another --out DIR.") from e
    finally:
        for aside in finished.values():
            aside.unlink(missing_ok=True)
        if made:
            with contextlib.suppress(OSError):  # not empty: the results are in it
                folder.rmdir()
    return list(finished)


def _aside(folder: Path, name: str, text: str) -> Path:
    """The complete text in a new hidden file of the same folder, readable as any new file is."""
    path = beside(folder / name)
    try:
        with open(path, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        as_any_new(path, 0o666)
    except BaseException:
        path.unlink()
        raise
    return path


def print_document(document: Mapping[str, Any]) -> None:
    """What ``--json`` prints: one JSON document on stdout; a number that is not finite, which JSON has no word for, becomes null."""
    import json

    sys.stdout.write(json.dumps(_finite(document), ensure_ascii=False, indent=1, allow_nan=False) + "\n")


def _finite(x: Any) -> Any:
    if isinstance(x, Mapping):
        return {key: _finite(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_finite(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x
