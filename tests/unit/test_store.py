"""The store of a study: bits that stay, kill -9 at any moment, and every way a folder can be unusable."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import signal
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantscope import store
from quantscope.errors import (
    StudyDamagedError,
    StudyDiskError,
    StudyFolderError,
    StudyFormatError,
    StudyLockedError,
    StudyMismatchError,
)
from quantscope.store import Record, StudyStore, decode, encode, read_sketch
from tests.unit.stores import IDENTITY, alter, batch, child, is_prefix, kill, refused, reopened, same, three_batches, without_log

DTYPES = ("?", "u1", "i1", "u2", "i4", "i8", "u8", "f2", "f4", "f8", ">f4", "c8", "c16")
posix = pytest.mark.skipif(os.name != "posix", reason="kill -9 and limits of POSIX systems")
WRITE_ON = """
with StudyStore.open(folder, IDENTITY) as opened:
    for index in range(len(opened.done("text")), 10**6):
        opened.put("text", index, batch(index))
        say(index)
"""
NO_LOG = """
from tests.unit.stores import without_log
sqlite3.connect = without_log(sqlite3.connect)
"""
KILLED_AT = """
connect = sqlite3.connect
def traced(*arguments, **options):
    db = connect(*arguments, **options)
    db.set_trace_callback(lambda sql: os.kill(os.getpid(), 9) if sql.startswith(sys.argv[2]) else None)
    return db
sqlite3.connect = traced
"""


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> list[sqlite3.Connection]:
    """Every connection that is made from here on."""
    made: list[sqlite3.Connection] = []
    connect = sqlite3.connect

    def noted(*arguments: Any, **options: Any) -> sqlite3.Connection:
        made.append(connect(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(sqlite3, "connect", noted)
    return made


@pytest.fixture
def nobody() -> Iterator[Callable[[], None]]:
    """Gives up root's right to write everywhere, where the tests run as root."""
    yield lambda: os.seteuid(65534) if os.getuid() == 0 else None
    os.seteuid(os.getuid())


class TestRecords:
    @settings(max_examples=150, deadline=None)
    @given(st.data())
    def test_every_dtype_shape_and_layout(self, data: st.DataObject) -> None:
        record: Record = {}
        for name in data.draw(st.lists(st.text(max_size=8), max_size=4, unique=True)):
            dtype = np.dtype(data.draw(st.sampled_from(DTYPES)))
            shape = tuple(data.draw(st.lists(st.integers(0, 4), max_size=3)))
            raw = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 256, int(np.prod(shape)) * dtype.itemsize, np.uint8)
            array = (raw & 1 if dtype.kind == "b" else raw).view(dtype).reshape(shape)  # any bits: NaNs of every payload
            record[name] = np.asfortranarray(array) if data.draw(st.booleans()) else array
        assert same(decode(encode(record)), record)
        assert encode(record) == encode(decode(encode(record)))

    def test_what_is_read_is_what_was_put(self, folder: Path) -> None:
        with reopened(folder) as opened:
            assert opened.get("text", 0) is None
            opened.put("text", 1, batch(1))
            opened.put("prompt", 0, {})
            assert opened.get("text", 0) is None
        with reopened(folder) as opened:
            assert opened.done("text") == [1]
            assert opened.done("floor") == []
            assert same(opened.get("text", 1), batch(1))
            assert opened.get("prompt", 0) == {}
            kl = (opened.get("text", 1) or {})["kl"]
            kl += 1  # writable

    @pytest.mark.parametrize(
        "array", [np.array([object()]), np.array(["x"]), np.array([b"x"]), np.zeros(1, "M8[s]"), np.zeros(1, [("a", "f4")])]
    )
    def test_only_booleans_and_numbers(self, array: Any) -> None:
        with pytest.raises(TypeError, match="'x' has dtype"):
            encode({"x": array})

    @pytest.mark.parametrize("array", [np.zeros((4, 4))[:, ::2], np.zeros((2, 3, 4)).transpose(0, 2, 1), np.zeros(9)[::2]])
    def test_no_layout_that_would_be_lost(self, array: Any) -> None:
        with pytest.raises(ValueError, match="neither C nor Fortran"):
            encode({"x": array})

    def test_a_stored_record_is_never_replaced(self, finished: Path) -> None:
        other = batch(1)
        other["kl"][0, 0, 0] = np.nextafter(other["kl"][0, 0, 0], 1)
        with reopened(finished) as opened:
            opened.put("text", 1, batch(1))
            refused(
                StudyMismatchError,
                'batch 2 of "text" is stored already',
                "The stored one was kept",
                do=lambda: opened.put("text", 1, other),
            )
            assert is_prefix(opened) == 3

    def test_an_exception_in_between_leaves_nothing_half_done(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with reopened(folder) as opened:
            with monkeypatch.context() as patched:
                patched.setattr(store, "INSERT", store.INSERT.replace("(?, ?, ?, ?)", "(?, ?, ?, ?, ?)"))
                with pytest.raises(StudyFolderError):
                    opened.put("text", 0, batch(0))
                patched.setattr(store, "_checksum", lambda *_: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    opened.put("text", 0, batch(0))
            opened.put("text", 0, batch(0))
            assert is_prefix(opened) == 1


@posix
class TestKill:
    @pytest.mark.parametrize(("journal", "rounds"), [("", 6), (NO_LOG, 3)], ids=["log", "rollback journal"])
    def test_nine_at_random_moments(self, journal: str, rounds: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        if journal:
            monkeypatch.setattr(sqlite3, "connect", without_log(sqlite3.connect))
        rng, known, seen = random.Random(7), 0, 0
        for _ in range(rounds):
            process = child(journal + WRITE_ON, folder)
            assert process.stdout is not None
            told = [process.stdout.readline().strip()]
            time.sleep(rng.uniform(0, 0.08))
            told += [line for line in kill(process) if line]
            known = int(told[-1]) + 1
            with reopened(folder) as opened:
                seen = is_prefix(opened)
            assert seen in (known, known + 1), "a batch that was reported as stored is lost"
        assert seen > 2 * rounds
        with reopened(folder) as opened:
            opened.put("text", seen, batch(seen))
            assert is_prefix(opened) == seen + 1

    @pytest.mark.parametrize("statement", ["PRAGMA journal_mode", "PRAGMA user_version", "CREATE TABLE record", "INSERT", "COMMIT"])
    def test_nine_while_the_database_is_made(self, statement: str, folder: Path) -> None:
        assert child(KILLED_AT + "StudyStore.open(folder, IDENTITY)", folder, statement).wait() == -signal.SIGKILL
        with reopened(folder, {"another": "identity"}) as opened:
            opened.put("text", 0, batch(0))
            assert is_prefix(opened) == 1

    @pytest.mark.parametrize("statement", ["INSERT", "COMMIT"])
    def test_nine_inside_a_transaction(self, statement: str, finished: Path) -> None:
        assert (
            child(KILLED_AT + "StudyStore.open(folder, IDENTITY).put('text', 3, batch(3))", finished, statement).wait() == -signal.SIGKILL
        )
        with reopened(finished) as opened:
            assert is_prefix(opened) == 3
            opened.put("text", 3, batch(3))
            assert is_prefix(opened) == 4

    def test_the_advice_to_delete_the_database_alone_is_safe(self, folder: Path) -> None:
        """SQLite's log of the killed process stays beside it."""
        process = child(WRITE_ON, folder)
        assert process.stdout is not None
        process.stdout.readline()
        kill(process)
        assert (folder / "study.db-wal").stat().st_size > 0
        (folder / "study.db").unlink()
        with reopened(folder, {"another": "identity"}) as opened:
            assert opened.done("text") == []
            opened.put("text", 0, batch(0))
        with reopened(folder, {"another": "identity"}) as opened:
            assert is_prefix(opened) == 1


class TestUnusable:
    @pytest.mark.parametrize("content", [b"not a database at all", b"SQLite format 2\x00" + bytes(5000), b"\x00" * 4096])
    def test_no_database(self, content: bytes, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "study.db").write_bytes(content)
        refused(StudyFormatError, "not a SQLite database", "move the file away", do=lambda: reopened(folder))
        assert (folder / "study.db").read_bytes() == content

    @pytest.mark.parametrize(
        ("statement", "said"),
        [
            ("CREATE TABLE bookmarks (url TEXT)", "another program"),
            ("PRAGMA application_id = 5", "another program"),
            (f"PRAGMA application_id = {store.APPLICATION_ID}; PRAGMA user_version = 2", "version 2 of the study database, expected 1"),
        ],
    )
    def test_database_of_others(self, statement: str, said: str, folder: Path) -> None:
        folder.mkdir(parents=True)
        alter(folder, statement)
        before = (folder / "study.db").read_bytes()
        refused(StudyFormatError, said, "Nothing was changed", do=lambda: reopened(folder))
        assert (folder / "study.db").read_bytes() == before

    def test_another_study_makes_room_only_when_it_is_finished_and_may(self, finished: Path) -> None:
        other = {"another": "identity"}
        replacing = functools.partial(StudyStore.open, finished, other, replace_finished=True)
        refused(StudyMismatchError, "is of another study", do=replacing)  # batches are still missing
        with reopened(finished) as opened:
            opened.finish()
        refused(StudyMismatchError, "is of another study", do=lambda: reopened(finished, other))
        with StudyStore.open(finished, IDENTITY, replace_finished=True) as opened:
            assert is_prefix(opened) == 3  # the same study is no other one
        with replacing() as opened:
            assert opened.done("text") == []
        refused(StudyMismatchError, "is of another study", do=lambda: StudyStore.open(finished, IDENTITY, replace_finished=True))

    def test_an_empty_file_is_a_new_database(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "study.db").touch()
        with reopened(folder) as opened:
            assert is_prefix(opened) == 0

    def test_files_in_the_way(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        (tmp_path / "study" / "study.db").mkdir(parents=True)
        refused(StudyFolderError, "a file is in the way", do=lambda: reopened(tmp_path / "file"))
        refused(StudyFolderError, "a file is in the way", do=lambda: reopened(tmp_path / "file" / "below"))
        refused(StudyDiskError, "unable to open database file", do=lambda: reopened(tmp_path / "study"))

    @pytest.mark.parametrize(
        "damage", ["arrays = zeroblob(length(arrays))", "arrays = substr(arrays, 2)", "arrays = 5", "sha256 = x'00'", "batch = 8"]
    )
    def test_damaged_record(self, damage: str, finished: Path) -> None:
        alter(finished, f"UPDATE record SET {damage} WHERE batch = 1")
        at = 8 if damage == "batch = 8" else 1
        with reopened(finished) as opened:
            text = refused(StudyDamagedError, f'batch {at + 1} of "text" is damaged', "begin anew", do=lambda: opened.get("text", at))
            refused(StudyDamagedError, "is damaged", do=lambda: opened.put("text", at, batch(at)))
            assert same(opened.get("text", 2), batch(2))
        alter(finished, text.split('"')[-2])  # the advice, as given
        with reopened(finished) as opened:
            assert at not in opened.done("text")
            opened.put("text", 1, batch(1))
            assert is_prefix(opened) == 3

    def test_identity_that_cannot_be_read(self, finished: Path) -> None:
        for damage in ("UPDATE identity SET json = '{'", "UPDATE identity SET json = '[1]'", "DELETE FROM identity"):
            alter(finished, damage)
            refused(StudyDamagedError, "what study it is of cannot be read", do=lambda: reopened(finished))

    def test_schema_that_is_no_text(self, finished: Path) -> None:
        path = finished / "study.db"
        path.write_bytes(path.read_bytes().replace(b"CREATE TABLE record", b"CREATE TAB\xc6E record"))
        refused(StudyDamagedError, "its schema cannot be read", do=lambda: reopened(finished))

    def test_the_results_so_far(self, folder: Path) -> None:
        assert read_sketch(folder) is None
        with reopened(folder) as opened:
            opened.sketch("first")
            opened.sketch('{"text": "漢字 \udc80"}')
            refused(StudyLockedError, "is at work in this folder", do=lambda: read_sketch(folder))
        assert read_sketch(folder) == '{"text": "漢字 \\udc80"}'
        with contextlib.closing(sqlite3.connect(folder / "study.db")) as db, db:
            db.execute("UPDATE sketch SET json = x'00'")
        refused(StudyDamagedError, "the results so far cannot be read", do=lambda: read_sketch(folder))
        with reopened(folder) as opened:
            opened.finish()
        assert read_sketch(folder) is None

    def test_a_closed_store_is_a_mistake_of_ours(self, finished: Path) -> None:
        with reopened(finished) as opened:
            pass
        with pytest.raises(sqlite3.ProgrammingError):
            opened.get("text", 0)

    def test_any_damaged_bytes(self, folder: Path, tmp_path: Path) -> None:
        """Every record is then refused or absent, or exactly what was stored; nothing else is ever raised."""
        small: Record = {"x": np.arange(300.0)}
        with reopened(folder) as opened:
            for index in range(3):
                opened.put("text", index, small)
        intact = (folder / "study.db").read_bytes()
        rng, outcomes = random.Random(3), dict.fromkeys(("refused", "absent", "exact"), 0)
        for _ in range(150):
            damaged = bytearray(intact)
            at = rng.randrange(len(damaged))
            damaged[at : at + rng.choice((1, 4, 500))] = rng.randbytes(rng.choice((0, 1, 4, 500)))
            (folder / "study.db").write_bytes(damaged)
            for name in ("study.db-wal", "study.db-journal"):
                (folder / name).unlink(missing_ok=True)
            try:
                with reopened(folder) as opened:
                    for index in range(3):
                        got = opened.get("text", index)
                        assert got is None or same(got, small)
                        outcomes["absent" if got is None else "exact"] += 1
                        opened.put("text", index, small)
            except StudyFolderError:
                outcomes["refused"] += 1
        assert outcomes["refused"] > 30
        assert outcomes["exact"] > 30


class TestDisk:
    def test_durable(self, folder: Path, connections: list[sqlite3.Connection]) -> None:
        with reopened(folder):
            settings = [connections[0].execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")]
        assert settings == ["wal", 2]  # FULL: the log is synced at every commit

    def test_where_a_log_is_refused(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The rollback journal does as well."""
        monkeypatch.setattr(sqlite3, "connect", without_log(sqlite3.connect))
        for n in range(3):
            with reopened(folder) as opened:
                assert is_prefix(opened) == n
                opened.put("text", n, batch(n))
                assert not (folder / "study.db-wal").exists()

    def test_full_and_resumed(self, folder: Path, connections: list[sqlite3.Connection]) -> None:
        with reopened(folder) as opened:
            connections[0].execute("PRAGMA max_page_count = 120")  # 480 kB

            def fill() -> None:
                for index in range(10):
                    opened.put("text", index, batch(index))

            refused(StudyDiskError, "no space is left (database or disk is full)", "df -h", "same command", do=fill)
            n = is_prefix(opened)
            assert 2 <= n < 10
            connections[0].execute("PRAGMA max_page_count = 100000")
            opened.put("text", n, batch(n))
        with reopened(folder) as opened:
            fill()
            assert is_prefix(opened) == 10

    @posix
    def test_system_refuses_to_write_and_resumed(self, folder: Path) -> None:
        script = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, 700_000))
try:
    with StudyStore.open(folder, IDENTITY) as opened:
        for index in range(20):
            opened.put("text", index, batch(index))
            say(index)
except QuantscopeError as e:
    say(type(e).__name__, e)
"""
        *told, error = (child(script, folder).communicate()[0]).strip().split("\n")
        assert error.startswith("StudyDiskError ")
        assert "Every batch finished before is kept" in error
        with reopened(folder) as opened:
            assert is_prefix(opened) == len(told) > 2
            for index in range(len(told), 12):
                opened.put("text", index, batch(index))
            assert is_prefix(opened) == 12

    def test_full_before_the_database_exists(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "write", full)
        refused(StudyDiskError, "no space is left", "No space left on device", do=lambda: reopened(folder))

    @posix
    @pytest.mark.parametrize(
        ("top_mode", "mode", "db_mode", "new"), [(0o555, 0o777, 0o666, True), (0o777, 0o555, 0o666, False), (0o777, 0o777, 0o444, False)]
    )
    def test_read_only(self, top_mode: int, mode: int, db_mode: int, new: bool, nobody: Callable[[], None]) -> None:
        with tempfile.TemporaryDirectory() as name:  # tmp_path is closed to others
            top, study = Path(name), Path(name) / "study"
            three_batches(study)
            try:
                for path, its in ((study / "study.lock", 0o666), (study / "study.db", db_mode), (study, mode), (top, top_mode)):
                    path.chmod(its)
                nobody()
                target = top / "new" if new else study
                refused(StudyDiskError, "cannot be opened for writing", "ls -la", do=lambda: reopened(target).put("text", 3, batch(3)))
            finally:
                os.seteuid(os.getuid())
                top.chmod(0o755)
                study.chmod(0o755)
            with reopened(study) as opened:
                assert is_prefix(opened) == 3
