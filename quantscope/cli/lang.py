"""The option ``--lang`` of every command that prints or writes a report."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer


class Lang(str, Enum):
    en = "en"
    ja = "ja"


LangOption = Annotated[Lang, typer.Option("--lang", help="Language of the report: English or Japanese.")]
