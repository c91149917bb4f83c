"""A study as the text of study.json (docs/study-json.md)."""

from __future__ import annotations

import json
import re
from pathlib import Path

from quantscope.errors import CorruptFileError, MissingFileError
from quantscope.results import Study

NAME = "study.json"
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
    """The study that a study.json holds; path: the file, or the folder of a study.

    Raises MissingFileError, CorruptFileError for what is no study, UnsupportedVersionError.
    """
    file = path / NAME if path.is_dir() else path
    try:
        text = file.read_text("utf-8")
    except OSError as e:
        raise MissingFileError(
            f"{file}: expected the {NAME} of a finished study: {e.strerror or e}. The study was interrupted, or kept in another folder: "
            f"run it again with the same command, or give the DIR that it named."
        ) from e
    except UnicodeDecodeError as e:
        raise CorruptFileError(f"{file}: byte {e.start:,} is not UTF-8, expected the {NAME} of a study. Give the DIR of a study.") from e
    try:
        data = json.loads(text)
    except ValueError as e:
        raise CorruptFileError(f"{file}: expected a JSON object, but {e}. The file was cut short or edited: run the study again.") from e
    return Study.from_json(data)
