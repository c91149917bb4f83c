"""Japanese."""

from __future__ import annotations

from collections.abc import Mapping

STRINGS: Mapping[str, str] = {}
