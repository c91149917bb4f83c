"""Japanese: the parts together."""

from __future__ import annotations

from collections.abc import Mapping

from quantscope.strings import parts

STRINGS: Mapping[str, str] = {key: text for part in parts("ja").values() for key, text in part.items()}
