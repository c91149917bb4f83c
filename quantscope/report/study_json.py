"""A study as the text of study.json (docs/study-json.md)."""

from __future__ import annotations

import json

from quantscope.results import Study


def dump(study: Study) -> str:
    """One JSON object, UTF-8 text, a field a line; no NaN and no Infinity in it (``Study.to_json`` says where they were)."""
    return json.dumps(study.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
