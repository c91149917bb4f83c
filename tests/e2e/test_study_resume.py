"""A long study as a user runs it: killed at any moment and given again, two at once, a disk that fills, files that change."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from quantscope.cli.main import main
from tests.models import STORIES

DEMO_TEXT = Path(__file__).resolve().parents[2] / "quantscope" / "data" / "demo.txt"
SMALL_BATCHES = """
import resource, sys
from quantscope import plan
plan.BATCH_TOKENS = plan.SLICE_TOKENS = 512
if limit := int(sys.argv.pop(1)):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
from quantscope.cli.main import run
run()
"""
CHUNKS = 20  # of 128 tokens: five batches

pytestmark = pytest.mark.skipif(os.name != "posix", reason="kill -9 and limits of POSIX systems")


def start(folder: Path, model: Path = STORIES, *more: str, file_limit: int = 0) -> subprocess.Popen[str]:
    """``quantscope study`` in a process of its own."""
    command = [sys.executable, "-c", SMALL_BATCHES, str(file_limit), "study", str(model), "--text", str(DEMO_TEXT), "--ctx", "128"]
    command += ["--chunks", str(CHUNKS), "--types", "Q4_0,Q8_0", "--out", str(folder), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and stderr, on one line."""
    _, err = process.communicate(timeout=300)
    return process.returncode, " ".join(err.split())


def results(folder: Path) -> dict[str, Any]:
    """Every number of study.json; the date is of the moment."""
    data: dict[str, Any] = json.loads((folder / "study.json").read_text("utf-8"))
    del data["provenance"]["date"]
    return data


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], float]:
    """The results of a run that nothing disturbs, and the seconds it takes."""
    folder, began = tmp_path_factory.mktemp("undisturbed") / "s", time.monotonic()
    code, err = finished(start(folder))
    assert code == 0, err
    assert "Plan: 5 batches of 4 chunks of 128 tokens" in err
    return results(folder), time.monotonic() - began


def test_killed_again_and_again(undisturbed: tuple[dict[str, Any], float], tmp_path: Path) -> None:
    wanted, seconds = undisturbed
    folder, rng, killed = tmp_path / "s", random.Random(5), 0
    while killed < 4:
        process = start(folder)
        try:
            process.wait(seconds * rng.uniform(0.3, 1.0))
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
    assert killed
    code, err = finished(start(folder))
    assert code == 0, err
    assert results(folder) == wanted


def test_the_second_of_two_is_told_who_works_there(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    first = start(folder)
    for _ in range(600):  # until it holds the folder
        if (folder / "study.lock").exists() and (folder / "study.lock").read_text():
            break
        time.sleep(0.05)
    first.send_signal(signal.SIGSTOP)  # else it may be done before the other one has started
    try:
        code, err = finished(start(folder))
    finally:
        first.send_signal(signal.SIGCONT)
    assert code == 2
    assert f"process {first.pid} on host" in err
    assert "is at work in this folder" in err
    assert finished(first)[0] == 0


def test_a_disk_that_fills(undisturbed: tuple[dict[str, Any], float], tmp_path: Path) -> None:
    """Files may grow to 400 kB, then nothing more can be written: as with a quota that is reached."""
    folder = tmp_path / "s"
    code, err = finished(start(folder, file_limit=400_000))
    assert code == 2, err
    assert re.search(r"StudyDiskError: .*Every batch finished before is kept", err)
    assert "Traceback" not in err
    assert not (folder / "study.json").exists()
    code, err = finished(start(folder))
    assert code == 0, err
    assert re.search(r"Stored already, and not computed again: [1-4] of 5 batches", err)
    assert results(folder) == undisturbed[0]


def test_what_has_changed_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, folder = Path(shutil.copy(STORIES, tmp_path / "m.gguf")), tmp_path / "s"
    command = ["study", str(model), "--text", str(DEMO_TEXT), "--ctx", "128", "--chunks", "2", "--types", "Q8_0", "--out", str(folder)]
    assert main(command) == 0
    before = (folder / "report.md").read_bytes()

    def refused(*arguments: str) -> str:
        capsys.readouterr()
        assert main(list(arguments)) == 2
        return " ".join(capsys.readouterr().err.split())

    assert "--types: Q8_0 → Q4_0" in refused(*command, "--types", "Q4_0")
    content = bytearray(model.read_bytes())
    content[-1] ^= 1
    model.write_bytes(content)
    text = refused(*command)
    assert text.startswith("StudyMismatchError: ")
    assert "m.gguf has changed (SHA-256" in text
    assert (folder / "report.md").read_bytes() == before


def test_a_text_from_standard_input(tmp_path: Path) -> None:
    text = DEMO_TEXT.read_bytes()[:8000]
    (tmp_path / "t.txt").write_bytes(text)
    command = [sys.executable, "-c", "from quantscope.cli.main import run; run()", "study", str(STORIES), "--types", "Q8_0"]
    command += ["--ctx", "64", "--chunks", "6", "--text"]
    piped, again, other, file = (
        subprocess.run([*command, given, "--out", str(tmp_path / out)], input=stdin, capture_output=True, check=False)
        for given, out, stdin in (("-", "a", text), ("-", "a", text), ("-", "a", text[1:]), (str(tmp_path / "t.txt"), "b", b""))
    )
    assert (piped.returncode, again.returncode, file.returncode) == (0, 0, 0), piped.stderr
    assert b"Stored already" in again.stderr  # the same text: the study goes on
    assert other.returncode == 2
    assert b"--text" in other.stderr
    a, b = results(tmp_path / "a"), results(tmp_path / "b")
    assert a["text"].pop("path") == "standard input"
    assert b["text"].pop("path") == str(tmp_path / "t.txt")
    assert a == b
