"""Fixtures of the tests around a study's folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.stores import three_batches


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a study may be kept; neither it nor its parent exists."""
    return tmp_path / "not yet" / "study"


@pytest.fixture
def finished(folder: Path) -> Path:
    """The folder of a study that was closed after three batches."""
    return three_batches(folder)
