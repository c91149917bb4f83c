"""One process at a time in a folder: an exclusive lock that ends with the process, however it ends.

The lock is the system's, on the open file ``study.lock``, not the existence of that file: after ``kill -9`` nothing is left that would
have to be removed, and the file is never deleted.  Its content says who holds the lock, as JSON: pid, host, command, started.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from quantscope.errors import StudyLockedError
from quantscope.wording import printable

LOCK_NAME = "study.lock"
PATIENCE = 1.0  # [s] with a holder that has not written yet who it is, or is just ending
PAUSE = 0.02  # [s] between two tries

_held: set[int] = set()  # file descriptors of this process


if sys.platform == "win32":
    import msvcrt

    FAR = 1 << 30  # [bytes] the locked byte: nobody else could read the content if it lay there

    def _try_lock(handle: int) -> bool:
        os.lseek(handle, FAR, os.SEEK_SET)
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except PermissionError:
            return False
        return True

else:
    import fcntl

    def _try_lock(handle: int) -> bool:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _leave_to_parent() -> None:
        """A forked child shares its parent's lock, and would keep it when the parent is killed."""
        for handle in _held:
            os.close(handle)
        _held.clear()

    os.register_at_fork(after_in_child=_leave_to_parent)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder's lock, for as long as the context lasts.

    Raises StudyLockedError when another process has it (or this one, already), OSError where the folder allows no lock.
    """
    handle = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o666)  # Python adds O_CLOEXEC: programs we start do not inherit it
    try:
        _acquire(handle, folder)
    except BaseException:
        os.close(handle)
        raise
    _held.add(handle)
    try:
        _write(handle, json.dumps(_ourselves()))
        yield
    finally:
        if handle in _held:  # else this is a forked child
            _held.remove(handle)
            with contextlib.suppress(OSError):
                _write(handle, "")
            os.close(handle)


def _acquire(handle: int, folder: Path) -> None:
    """Lock the file, or raise StudyLockedError as soon as it says who has it, in any case after PATIENCE."""
    until = time.monotonic() + PATIENCE
    while not _try_lock(handle):
        holder = _read(folder / LOCK_NAME)
        if holder or time.monotonic() > until:
            raise StudyLockedError(_who(folder, holder))
        time.sleep(PAUSE)


def _ourselves() -> dict[str, object]:
    started = datetime.now().astimezone().isoformat(timespec="seconds")
    return {"pid": os.getpid(), "host": platform.node(), "command": shlex.join(sys.argv), "started": started}


def _who(folder: Path, holder: dict[str, object]) -> str:
    who = "another process, which has not said who it is,"
    if holder:
        who = "process {pid} on host {host}, since {started} (`{command}`),".format_map({k: printable(str(v)) for k, v in holder.items()})
    return (
        f"{printable(str(folder))}: {who} is at work in this folder, expected nobody: two studies in one folder would mix. "
        f"Wait until it is done or end it, and give the command again; or give another --out DIR."
    )


def _write(handle: int, text: str) -> None:
    os.ftruncate(handle, 0)
    os.lseek(handle, 0, os.SEEK_SET)
    os.write(handle, text.encode("ascii"))


def _read(path: Path) -> dict[str, object]:
    """Who holds the lock; empty when it does not say (yet)."""
    try:
        found = json.loads(path.read_bytes())
        return {key: found[key] for key in ("pid", "host", "command", "started")}
    except (OSError, ValueError, TypeError, KeyError):
        return {}
