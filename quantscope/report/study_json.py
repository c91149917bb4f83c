"""A study as the text of study.json (docs/study-json.md)."""

from __future__ import annotations

import json
from pathlib import Path

from quantscope.errors import CorruptFileError
from quantscope.results import Study


def dump(study: Study) -> str:
    """One JSON object, UTF-8 text, a field a line; no NaN and no Infinity in it (``Study.to_json`` says where they were)."""
    return json.dumps(study.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def load(path: Path) -> Study:
    """The study of a study.json.  Raises CorruptFileError and UnsupportedVersionError with the file's name."""
    try:
        return Study.from_json(json.loads(path.read_text("utf-8")))
    except ValueError as e:  # of JSON, or of UTF-8
        raise CorruptFileError(
            f"{path}: expected JSON as `quantscope study` writes it, found something else: {e}. The file was probably cut short: run the "
            f"study again."
        ) from e
