"""Files that are complete or absent: written under another name in the same folder, and renamed when they are done."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from quantscope.errors import QuantscopeError


@contextmanager
def finished(path: Path) -> Iterator[Path]:
    """An empty file beside ``path`` to write into; it takes that name when the block ends without an error, and is removed otherwise."""
    aside = beside(path)
    try:
        yield aside
        as_any_new(aside, 0o666)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def written(path: Path, failed: Callable[[str], QuantscopeError]) -> Iterator[BinaryIO]:
    """The file to write, complete or absent afterwards.  failed: makes the error of what the disk says."""
    try:
        with finished(path) as aside, open(aside, "wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
    except OSError as e:
        raise failed(e.strerror or str(e)) from e


def beside(path: Path) -> Path:
    """A new, empty, hidden file in the folder of ``path``, readable by its owner only."""
    handle, aside = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.absolute().parent)
    os.close(handle)
    return Path(aside)


def as_any_new(path: Path, mode: int) -> None:
    """The permissions a new file (0o666) or folder (0o777) has; those that ``tempfile`` makes are private."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(mode & ~umask)
