"""Catalogues: a module a language, with STRINGS = {English template: its template}, made of parts named after it: ja_study, ja_page ..."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping


def parts(language: str) -> dict[str, Mapping[str, str]]:
    """The STRINGS of every module ``<language>_*`` here, by name."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name.startswith(f"{language}_"))
    return {name: importlib.import_module(f"{__name__}.{name}").STRINGS for name in names}
