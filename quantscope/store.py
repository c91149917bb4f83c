"""A study's finished batches on disk: ``DIR/study.db``, one transaction each, so that a killed study loses only the batch it was at.

    identity   json, finished                         what must be the same for a study to be continued; whether all of it is there
    record     stage, batch → sha256, arrays
    sketch     json                                   compressed: the results so far, for a report of a study that was interrupted

A record is a dict of arrays; its bytes are a line of JSON with their names and then the arrays as .npy streams.  SQLite keeps its
write-ahead log beside the database (``study.db-wal``) until the study is closed or opened again: the two files belong together.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import shlex
import sqlite3
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from quantscope.errors import (
    StudyDamagedError,
    StudyDiskError,
    StudyFolderError,
    StudyFormatError,
    StudyLockedError,
    StudyMismatchError,
)
from quantscope.lock import LOCK_NAME, locked
from quantscope.mismatch import differences
from quantscope.wording import printable, quoted

Record: TypeAlias = dict[str, NDArray[Any]]

NAME = "study.db"
APPLICATION_ID = 0x71736370  # "qscp", in the header of every database of ours
DATABASE_VERSION = 1  # of the tables below
SCHEMA = (
    "CREATE TABLE identity (json TEXT NOT NULL, finished INTEGER NOT NULL)",
    "CREATE TABLE record (stage TEXT NOT NULL, batch INTEGER NOT NULL, sha256 BLOB NOT NULL, arrays BLOB NOT NULL, "
    "PRIMARY KEY (stage, batch))",
)
SKETCH = "CREATE TABLE IF NOT EXISTS sketch (json BLOB NOT NULL)"  # added within version 1: who does not know it can do without
SELECT = "SELECT sha256, arrays FROM record WHERE stage = ? AND batch = ?"
INSERT = "INSERT INTO record (stage, batch, sha256, arrays) VALUES (?, ?, ?, ?)"
BUSY = 1.0  # [s] to wait for another program that reads the database
DIFFERENCES = 6  # that are listed before "and N more"


class StudyStore:
    """The records of one study, by stage ("text") and number of the batch.

    For the thread and process that opened it.  Every method raises StudyDiskError when the disk is full, not writable or failing, and
    StudyDamagedError for a database whose content has changed since it was written.
    """

    def __init__(self, path: Path, db: sqlite3.Connection, opened: contextlib.ExitStack) -> None:
        self._path, self._db, self._opened = path, db, opened

    @classmethod
    def open(cls, folder: Path, identity: Mapping[str, Any], *, replace_finished: bool = False) -> StudyStore:
        """The store of the study with this identity (nested, JSON-able); folder and database are made when absent.

        replace_finished: another study that is there and finished makes room for this one.
        Raises StudyLockedError while another process works in the folder, StudyMismatchError when it holds another study,
        StudyFormatError when study.db is no study of a version known here, StudyFolderError when ``folder`` is a file.
        """
        path = folder / NAME
        with _explained(path), contextlib.ExitStack() as opened:
            folder.mkdir(parents=True, exist_ok=True)
            opened.enter_context(locked(folder))
            _check_writable(path)
            db = opened.enter_context(contextlib.closing(sqlite3.connect(path, timeout=BUSY, isolation_level=None)))
            _prepare(db, path, json.loads(json.dumps(dict(identity))), replace_finished)
            return cls(path, db, opened.pop_all())

    def get(self, stage: str, index: int) -> Record | None:
        """The stored record, bit for bit, or None."""
        with _explained(self._path):
            data = self._bytes(stage, index)
        return None if data is None else decode(data)

    def put(self, stage: str, index: int, record: Mapping[str, NDArray[Any]]) -> None:
        """Store a record; it is on the disk when this returns.  One that is there already stays as it is.

        Raises StudyMismatchError when that one has other bits.
        """
        data = encode(record)
        with _explained(self._path), _transaction(self._db):
            there = self._bytes(stage, index)
            if there is None:
                self._db.execute(INSERT, (stage, index, _checksum(stage, index, data), data))
            elif there != data:
                raise StudyMismatchError(
                    f"{_shown(self._path)}: {_batch(stage, index)} is stored already and has come out with other bits, expected the "
                    f"same. The machine, a library or the number of threads is probably another one. The stored one was kept: give "
                    f"another --out DIR, or delete {_shown(self._path)} to begin anew."
                )

    def done(self, stage: str) -> list[int]:
        """Numbers of the stored batches of a stage, in rising order."""
        with _explained(self._path):
            rows = self._db.execute("SELECT batch FROM record WHERE stage = ? ORDER BY batch", (stage,)).fetchall()
        return [int(index) for (index,) in rows]

    def sketch(self, results: str) -> None:
        """Keep the results so far in place of those before: for people, never to go on from."""
        data = zlib.compress(results.encode("utf-8", "backslashreplace"))
        with _explained(self._path), _transaction(self._db):
            self._db.execute(SKETCH)
            self._db.execute("DELETE FROM sketch")
            self._db.execute("INSERT INTO sketch VALUES (?)", (data,))

    def finish(self) -> None:
        """Every record the study needs is there."""
        with _explained(self._path), _transaction(self._db):
            self._db.execute("DROP TABLE IF EXISTS sketch")
            self._db.execute("UPDATE identity SET finished = 1")

    def close(self) -> None:
        """Give the folder free.  Closing twice does nothing."""
        self._opened.close()

    def __enter__(self) -> StudyStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _bytes(self, stage: str, index: int) -> bytes | None:
        """A record's bytes as they were stored, or None."""
        row = self._db.execute(SELECT, (stage, index)).fetchone()
        if row is None:
            return None
        checksum, data = row
        if not isinstance(data, bytes) or checksum != _checksum(stage, index, data):
            name, remove = _shown(self._path), f"DELETE FROM record WHERE stage = '{stage}' AND batch = {index}"
            raise StudyDamagedError(
                f"{name}: {_batch(stage, index)} is damaged, expected the content whose SHA-256 was stored with it. The disk or a "
                f'copy of the folder has changed it. To compute this batch again, run `sqlite3 {shlex.quote(name)} "{remove}"` and the '
                f"same command; or delete {name} to begin anew."
            )
        return data


def read_sketch(folder: Path) -> str | None:
    """The results so far of an unfinished study, as JSON; None where the folder holds none.

    Raises StudyLockedError while a process works in the folder, StudyDamagedError and StudyDiskError as StudyStore does.
    """
    path = folder / NAME
    if not path.exists():
        return None
    with _explained(path), locked(folder), contextlib.closing(sqlite3.connect(path, timeout=BUSY)) as db:
        if not db.execute("SELECT count(*) FROM sqlite_master WHERE name = 'sketch'").fetchone()[0]:
            return None
        row = db.execute("SELECT json FROM sketch").fetchone()
    try:
        return None if row is None else zlib.decompress(row[0]).decode("utf-8")
    except (zlib.error, UnicodeDecodeError, TypeError) as e:
        raise StudyDamagedError(_damaged(path, "the results so far cannot be read")) from e


# ---------------------------------------------------------------- the bytes of a record


def encode(record: Mapping[str, NDArray[Any]]) -> bytes:
    """``["taps", "kl"]\\n`` and the arrays as .npy streams: names and their order, dtypes, shapes, bits, and C or Fortran layout.

    Raises TypeError for arrays of anything but booleans and numbers, ValueError for arrays with gaps or permuted axes: they would come
    back in another layout, and a sum over another layout has other last bits.
    """
    out = io.BytesIO()
    out.write(json.dumps(list(record)).encode("ascii") + b"\n")
    for name, array in record.items():
        if array.dtype.kind not in "biufc":
            raise TypeError(f"array {name!r} has dtype {array.dtype}, expected booleans or numbers")
        if not array.flags.forc:
            raise ValueError(f"array {name!r} is contiguous in neither C nor Fortran order: store np.ascontiguousarray of it")
        np.lib.format.write_array(out, array, allow_pickle=False)
    return out.getvalue()


def decode(data: bytes) -> Record:
    """The inverse of ``encode``; the arrays are new and writable."""
    stream = io.BytesIO(data)
    names = json.loads(stream.readline())
    return {name: np.lib.format.read_array(stream, allow_pickle=False) for name in names}


def _checksum(stage: str, index: int, data: bytes) -> bytes:
    """SHA-256 of a record with its key, so that a record under another key is noticed as well."""
    return hashlib.sha256(json.dumps([stage, index]).encode("ascii") + data).digest()


def _batch(stage: str, index: int) -> str:
    return f"batch {index + 1} of {quoted(stage)}"


# ---------------------------------------------------------------- opening the database


def _check_writable(path: Path) -> None:
    """PermissionError for a database that cannot be written: SQLite would speak of an I/O error."""
    if path.exists() and not os.access(path, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _prepare(db: sqlite3.Connection, path: Path, identity: dict[str, Any], replace_finished: bool) -> None:
    """Check what the database is before anything in it is changed; make the tables and write the identity in a new one."""
    db.execute("PRAGMA locking_mode = EXCLUSIVE")  # guards a folder whose lock file was deleted; needs no memory shared between processes
    db.execute("PRAGMA synchronous = FULL")
    is_new = _is_new(db, path)
    found, finished = ([], False) if is_new else _other_identity(db, path, identity)
    if found and not (finished and replace_finished):
        raise _mismatch(path, found)
    db.execute("PRAGMA journal_mode = WAL")  # where that is refused, the rollback journal stays: as safe, with more to sync
    if is_new:
        with _transaction(db):
            for statement in (f"PRAGMA application_id = {APPLICATION_ID}", f"PRAGMA user_version = {DATABASE_VERSION}", *SCHEMA):
                db.execute(statement)
            db.execute("INSERT INTO identity VALUES (?, 0)", (json.dumps(identity),))
    elif found:
        with _transaction(db):
            db.execute("DELETE FROM record")
            db.execute("DROP TABLE IF EXISTS sketch")
            db.execute("UPDATE identity SET json = ?, finished = 0", (json.dumps(identity),))


def _is_new(db: sqlite3.Connection, path: Path) -> bool:
    """Whether nothing is in the database yet.  Raises StudyFormatError when it is another program's, or of another version."""
    application_id, version, n_tables = (
        db.execute(query).fetchone()[0] for query in ("PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM sqlite_master")
    )
    if (application_id, version, n_tables) == (0, 0, 0):
        return True
    if application_id != APPLICATION_ID:
        raise StudyFormatError(
            f"{_shown(path)}: a SQLite database of another program, expected that of a study. Nothing was changed: give another --out DIR."
        )
    if version != DATABASE_VERSION:
        raise StudyFormatError(
            f"{_shown(path)}: version {version} of the study database, expected {DATABASE_VERSION}. It was written by a later quantscope: "
            f"install that one, or give another --out DIR. Nothing was changed."
        )
    return False


def _other_identity(db: sqlite3.Connection, path: Path, identity: dict[str, Any]) -> tuple[list[str], bool]:
    """Where the study in the database differs from this one, and whether it is finished."""
    try:
        ((stored, finished),) = db.execute("SELECT json, finished FROM identity").fetchall()
        return differences(json.loads(stored), identity), bool(finished)
    except (TypeError, ValueError, AttributeError) as e:
        raise StudyDamagedError(_damaged(path, "what study it is of cannot be read")) from e


def _mismatch(path: Path, found: list[str]) -> StudyMismatchError:
    more = f"; and {len(found) - DIFFERENCES} more" if len(found) > DIFFERENCES else ""
    return StudyMismatchError(
        f"{_shown(path)} is of another study, expected the one of this command. There → given now: "
        f"{'; '.join(found[:DIFFERENCES])}{more}. Nothing was changed: give another --out DIR, or the former options and "
        f"files, or delete {_shown(path)} to begin anew."
    )


@contextlib.contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    """All or nothing, whatever ends it."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:  # SQLite has rolled back by itself after some errors
            db.execute("ROLLBACK")
        raise


# ---------------------------------------------------------------- what can go wrong with a disk


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Errors of the system and of SQLite as ours; a mistake in the use of SQLite stays what it is."""
    try:
        yield
    except OSError as e:
        raise _system_error(path, e) from e
    except sqlite3.ProgrammingError:
        raise
    except sqlite3.DatabaseError as e:
        raise _database_error(path, printable(str(e))) from e
    except UnicodeDecodeError as e:  # Python decodes SQLite's messages strictly, and they quote a damaged schema
        raise StudyDamagedError(_damaged(path, "its schema cannot be read")) from e


def _system_error(path: Path, error: OSError) -> StudyFolderError:
    """The folder or its lock file could not be made."""
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
        return StudyDiskError(_full(path, str(error)))
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StudyDiskError(_not_writable(path, str(error)))
    if isinstance(error, (FileExistsError, NotADirectoryError)):
        return StudyFolderError(f"{_shown(path.parent)}: a file is in the way, expected a folder or a new name. Give another --out DIR.")
    return StudyDiskError(_failing(path, str(error)))


def _database_error(path: Path, message: str) -> StudyFolderError:
    """By SQLite's words: Python gives its error codes from 3.11 on only."""
    if "is full" in message:
        return StudyDiskError(_full(path, message))
    if "readonly" in message or "unable to open" in message:
        return StudyDiskError(_not_writable(path, message))
    if "I/O error" in message:
        return StudyDiskError(_failing(path, message))
    if "locked" in message:
        return StudyLockedError(
            f"{_shown(path)}: another program has the database open ({message}), expected nobody. Close it (a database viewer, or a "
            f"quantscope whose {LOCK_NAME} was deleted) and give the same command again, or give another --out DIR."
        )
    if "not a database" in message:
        return StudyFormatError(
            f"{_shown(path)}: not a SQLite database, expected that of a study. It is another file of that name, or its beginning was "
            f"overwritten. Nothing was changed: give another --out DIR, or move the file away to begin anew."
        )
    return StudyDamagedError(_damaged(path, message))


def _full(path: Path, message: str) -> str:
    return (
        f"{_shown(path)}: no space is left ({message}), expected room for the next batch. Every batch finished before is kept: free some "
        f"space, see `df -h {_shown(path.parent)}`, and give the same command again to go on from there."
    )


def _not_writable(path: Path, message: str) -> str:
    return (
        f"{_shown(path)}: cannot be opened for writing ({message}), expected a writable folder and database. They belong to another "
        f"user or lie on a read-only file system: see `ls -la {_shown(path.parent)}`, or give another --out DIR."
    )


def _failing(path: Path, message: str) -> str:
    return (
        f"{_shown(path)}: the system failed to read or write it ({message}), expected a working disk. The file system is failing or allows "
        f"no locks, or the limit of file sizes (`ulimit -f`) is reached. Every batch finished before is kept: give the same command again "
        f"when that is mended, or --out DIR on a local disk."
    )


def _damaged(path: Path, message: str) -> str:
    return (
        f"{_shown(path)}: the database is damaged ({message}), expected it as it was written. The disk or a copy has changed it, or it was "
        f"moved without {NAME}-wal. Delete {_shown(path)} to begin anew, or give another --out DIR."
    )


def _shown(path: Path) -> str:
    return printable(str(path))
