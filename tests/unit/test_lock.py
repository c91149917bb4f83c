"""One process at a time in a folder, and nobody has to clear up after one that was killed."""

from __future__ import annotations

import json
import os
import platform
import signal
import sys
import threading
from pathlib import Path

import pytest

from quantscope import lock, store
from quantscope.errors import StudyDiskError, StudyLockedError, StudyMismatchError
from tests.unit.stores import child, is_prefix, kill, refused, reopened

fcntl = pytest.importorskip("fcntl", reason="locks of POSIX systems")
HOLD = """
with StudyStore.open(folder, IDENTITY) as opened:
    opened.put("text", 0, batch(0))
    {then}
    say("ready")
    time.sleep(60)
"""


class TestLock:
    @pytest.mark.parametrize(
        "then",
        [
            "pass",
            "say(subprocess.Popen(['sleep', '60'], close_fds=False, stdout=subprocess.DEVNULL).pid)",
            "pid = os.fork()\n    if pid == 0:\n        os.close(1), time.sleep(60), os._exit(0)\n    say(pid)",
        ],
        ids=["alone", "started another program", "forked"],
    )
    def test_the_second_waits_for_the_end_of_the_first(self, then: str, folder: Path) -> None:
        process = child(HOLD.format(then=then), folder)
        assert process.stdout is not None
        told = list(iter(lambda: process.stdout.readline().strip(), "ready"))  # type: ignore[union-attr]
        try:
            note = json.loads((folder / "study.lock").read_text())
            assert note == {"pid": process.pid, "host": platform.node(), "command": note["command"], "started": note["started"]}
            assert note["command"] == f"-c '{folder}'"
            who = f"process {process.pid} on host {platform.node()}, since {note['started']} (`{note['command']}`)"
            refused(StudyLockedError, str(folder), who, "Wait until", "--out DIR", do=lambda: reopened(folder))
            assert json.loads((folder / "study.lock").read_text()) == note
            kill(process)
            with reopened(folder) as opened:  # although the other program lives
                assert is_prefix(opened) == 1
        finally:
            process.kill()
            for pid in told:
                os.kill(int(pid), signal.SIGKILL)

    def test_once_in_a_process_too_and_free_after_close(self, folder: Path) -> None:
        first = reopened(folder)
        refused(StudyLockedError, f"process {os.getpid()} ", do=lambda: reopened(folder))
        inode = (folder / "study.lock").stat().st_ino
        first.close()
        first.close()
        assert (folder / "study.lock").read_text() == ""
        with reopened(folder):
            assert (folder / "study.lock").stat().st_ino == inode

    def test_free_after_an_open_that_failed(self, finished: Path) -> None:
        for _ in range(2):
            refused(StudyMismatchError, do=lambda: reopened(finished, {}))
        n_open = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
        refused(StudyMismatchError, do=lambda: reopened(finished, {}))
        assert n_open in (0, len(os.listdir("/proc/self/fd")))

    def test_a_holder_without_a_name(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder.mkdir(parents=True)
        with open(folder / "study.lock", "w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            monkeypatch.setattr(lock, "PATIENCE", 0.05)
            refused(StudyLockedError, "another process, which has not said who it is", do=lambda: reopened(folder))
            monkeypatch.setattr(lock, "PATIENCE", 20)
            timer = threading.Timer(0.1, fcntl.flock, (held, fcntl.LOCK_UN))
            timer.start()
            with reopened(folder):
                timer.join()

    def test_a_deleted_lock_file_does_not_let_two_in(self, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(store, "BUSY", 0.05)
        with reopened(finished) as opened:
            (finished / "study.lock").unlink()
            refused(StudyLockedError, "another program has the database open", do=lambda: reopened(finished))
            assert is_prefix(opened) == 3

    def test_without_locks(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def unsupported(*_: object) -> None:
            raise OSError(37, "No locks available")

        monkeypatch.setattr(fcntl, "flock", unsupported)
        refused(StudyDiskError, "No locks available", "a local disk", do=lambda: reopened(folder))
