"""For the tests of the store: batches, folders that hold some, and processes that are killed while they write."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from quantscope.errors import QuantscopeError, StudyFolderError
from quantscope.store import Record, StudyStore

IDENTITY: dict[str, Any] = {
    "format": 1,
    "quantscope": "0.1.0",
    "models": {"m.gguf": "a" * 64},
    "options": {"--types": ("Q4_0", "Q8_0"), "--prompt": None, "--text": "b" * 64, "--ctx": 512},
    "plan": {"text": [3, 4, 2]},
    "arithmetic": {"torch": "2.9", "threads": 2},
}
PRELUDE = """
import os, sqlite3, subprocess, sys, time
from pathlib import Path
from quantscope.errors import QuantscopeError
from quantscope.store import StudyStore
from tests.unit.stores import IDENTITY, batch

folder = Path(sys.argv[1])

def say(*words):
    print(*words, flush=True)
"""


def batch(index: int) -> Record:
    """100 kB that differ from batch to batch: NaNs of many payloads, infinities, booleans."""
    rng = np.random.default_rng(index)
    return {
        "kl": rng.random((2, 5, 1200)),
        "bits": np.frombuffer(rng.bytes(8 * 64), np.float64).reshape(8, 8),
        "same_top": rng.random((2, 3)) < 0.5,
        "special": np.array([np.nan, -np.nan, np.inf, -np.inf, -0.0]),
    }


def child(script: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PRELUDE + script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).resolve().parents[2])


def kill(process: subprocess.Popen[str]) -> list[str]:
    """SIGKILL; returns what it had printed since it was last read."""
    process.kill()
    rest = process.communicate()[0].split("\n")
    assert process.returncode == -signal.SIGKILL
    return rest


def same(a: Record | None, b: Record | None) -> bool:
    """Names in order, dtypes with their byte order, shapes, layouts and bits."""

    def described(r: Record) -> list[tuple[object, ...]]:
        return [(k, x.dtype.str, x.shape, x.flags.c_contiguous, x.flags.f_contiguous, x.tobytes()) for k, x in r.items()]

    return a is not None and b is not None and described(a) == described(b)


def is_prefix(opened: StudyStore) -> int:
    """How many batches there are; they are the first ones, complete."""
    done = opened.done("text")
    assert done == list(range(len(done)))
    assert all(same(opened.get("text", i), batch(i)) for i in done)
    return len(done)


def refused(kind: type[QuantscopeError], *parts: str, do: Callable[[], object]) -> str:
    """The message of the error of exactly this class, with these parts in it."""
    try:
        do()
    except QuantscopeError as e:
        error = e
    else:
        raise AssertionError(f"{kind.__name__} was not raised")
    text = str(error)
    assert type(error) is kind, text
    assert issubclass(kind, StudyFolderError)
    assert "\n" not in text
    assert all(part in text for part in parts), f"{parts} in: {text}"
    return text


def reopened(folder: Path, identity: dict[str, Any] = IDENTITY) -> StudyStore:
    return StudyStore.open(folder, identity)


def three_batches(folder: Path) -> Path:
    """The folder, with a study in it that was closed after three batches."""
    with reopened(folder) as opened:
        for index in range(3):
            opened.put("text", index, batch(index))
    return folder


def alter(folder: Path, statements: str) -> None:
    """What another program does to the database."""
    db = sqlite3.connect(folder / "study.db")
    db.executescript(statements)
    db.close()


def without_log(connect: Callable[..., sqlite3.Connection]) -> Callable[..., sqlite3.Connection]:
    """sqlite3.connect on a file system without locks, where SQLite refuses WAL."""
    return lambda path, **options: connect(f"{path.absolute().as_uri()}?nolock=1", uri=True, **options)
