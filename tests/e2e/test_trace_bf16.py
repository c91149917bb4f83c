"""Transformers in bfloat16 against the reference on the command line: with its own arithmetic as the floor, and without."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.commands import Capture, ran, refused
from tests.models import STORIES

IDS = "1,403,407,261,378"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_run_in_bfloat16_is_judged_by_its_own_arithmetic(capsys: Capture) -> None:
    ran(capsys, "trace", STORIES, "--tokens", IDS, "-o", "ref.safetensors")
    out, _ = ran(capsys, "trace", STORIES, "--tokens", IDS, "--arithmetic", "bf16", "-o", "bf16.safetensors")
    assert ", bfloat16: 83 taps at 5 positions" in out
    ran(capsys, "trace", STORIES, "--tokens", IDS, "--engine", "transformers", "--dtype", "bfloat16", "-o", "test.safetensors")
    judged = ("compare", "ref.safetensors", "test.safetensors", "--model", STORIES, "--json")
    found = json.loads(ran(capsys, *judged, "--predicted", "bf16.safetensors")[0])
    assert (found["first_divergence"], found["floor"]) == (None, "4 times what bfloat16 changes at the same tap")
    assert len(found["taps"]) == 83
    assert "Local replay: all 83 operations are right" in found["answer"]
    alone = json.loads(ran(capsys, *judged)[0])
    assert alone["first_divergence"] is None
    assert "`quantscope trace MODEL --arithmetic bf16` says what this file needs" in alone["floor"]


def test_another_dtype_beside_it_is_refused(capsys: Capture) -> None:
    said = refused(capsys, "trace", STORIES, "--tokens", IDS, "--arithmetic", "bf16", "--dtype", "float64")
    assert "--dtype float64: --arithmetic bf16 says itself what is rounded" in said
