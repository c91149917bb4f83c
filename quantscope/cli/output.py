"""Results on disk: each file is complete or absent, and a folder that was made for nothing is removed."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from quantscope.errors import UsageError


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
    handle, path = tempfile.mkstemp(prefix=f".{name}.", suffix=".part", dir=folder)
    try:
        with open(handle, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(path, 0o666 & ~umask)  # mkstemp makes files private
    except BaseException:
        os.unlink(path)
        raise
    return Path(path)
