"""A study as the text of study.json (docs/study-json.md)."""

from __future__ import annotations

import json
import re
from pathlib import Path

from quantscope.errors import CorruptFileError
from quantscope.results import Study

_NUMBER = r"(?:-?[\d.eE+-]+|null)"
_STRING = r'"(?:[^"\\\n]|\\.)*"'
_FLAT = re.compile(rf"\[\n\s*((?:{_NUMBER}|{_STRING},\n\s*{_NUMBER})(?:,\n\s*{_NUMBER})*)\n\s*\]")  # no string holds a line break


def dump(study: Study) -> str:
    """One JSON object, UTF-8 text; a field, a list of numbers or a token with its probability a line.

    No NaN and no Infinity in it (``Study.to_json`` says where they were).
    """
    text = json.dumps(study.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
    return _FLAT.sub(lambda m: "[" + re.sub(r",\n\s*", ", ", m.group(1)) + "]", text) + "\n"


def load(path: Path) -> Study:
    """The study of a study.json.  Raises CorruptFileError and UnsupportedVersionError with the file's name."""
    try:
        return Study.from_json(json.loads(path.read_text("utf-8")))
    except ValueError as e:  # of JSON, or of UTF-8
        raise CorruptFileError(
            f"{path}: expected JSON as `quantscope study` writes it, found something else: {e}. The file was probably cut short: run the "
            f"study again."
        ) from e
