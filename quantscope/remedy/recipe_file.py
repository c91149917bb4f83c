"""Recipes: which tensor gets which type, written down.

    {"version": 1, "base": "Q4_K_M", "types": {"blk.0.attn_v.weight": "Q6_K", "blk\\\\.(1|2)\\\\.ffn_down": "Q5_K"}}
    blk\\.0\\.attn_v=q6_k blk\\.(1|2)\\.ffn_down=q5_k          llama-quantize's --tensor-type-file: names separated by white space

``base`` is the preset of all tensors that no entry names.  In the JSON form a key that is the name of a tensor means this tensor alone;
every other key, and all of llama-quantize's, are regular expressions that are searched in the names.  The first that matches wins.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from quantscope.errors import QuantscopeError, UsageError
from quantscope.qtypes import QuantType, qtype
from quantscope.recipes import Override, parse_override, preset_name
from quantscope.sources.base import show

VERSION = 1


@dataclass(frozen=True)
class Recipe:
    """base: a preset, None where the file gives none.  types: (name or regular expression, type), the first that matches wins."""

    base: str | None = None
    types: tuple[tuple[str, QuantType], ...] = ()
    exact: bool = True  # keys that are tensor names mean these tensors only

    def overrides(self, names: Collection[str]) -> tuple[Override, ...]:
        """The entries as ``recipes`` takes them.  Neighbours that name tensors and agree in the type become one: a recipe may name all."""
        out: list[Override] = []
        entries = [(self.exact and key in names, key, t) for key, t in self.types]
        for (is_name, t), group in groupby(entries, lambda e: (e[0], e[2])):
            keys = [key for _, key, _ in group]
            out += [Override(f"^({'|'.join(map(re.escape, keys))})$", t)] if is_name else [parse_override(f"{k}={t}") for k in keys]
        return tuple(out)

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"version": VERSION, "base": self.base, "types": {key: t.name for key, t in self.types}}


def read_recipe(path: Path) -> Recipe:
    """Either form, told apart by its first character.  UsageError for a file that cannot be read or understood."""
    try:
        text = path.read_text("utf-8")
    except OSError as e:
        raise UsageError(
            f"--recipe {show(path)}: {e.strerror or e}, expected a recipe.json or a --tensor-type-file. Check the path."
        ) from None
    except UnicodeDecodeError:
        raise _wrong(path, "it is no UTF-8 text") from None
    try:
        return _from_json(path, text) if text.lstrip().startswith("{") else _from_lines(path, text)
    except QuantscopeError as e:
        raise e if str(e).startswith("--recipe") else UsageError(f"--recipe {show(path)}: {e}") from None


def _from_json(path: Path, text: str) -> Recipe:
    try:
        data = json.loads(text, object_pairs_hook=lambda pairs: _distinct(path, pairs))
    except (ValueError, RecursionError) as e:
        raise _wrong(path, f"it is no JSON ({e})") from None
    version, base, types = (data.get(key) for key in ("version", "base", "types"))
    if version != VERSION:
        raise _wrong(path, f'"version" is {version!r}, expected {VERSION}')
    if not isinstance(types, dict) or not all(isinstance(t, str) for t in types.values()):
        raise _wrong(path, '"types" is no object of names and types')
    if base is not None and not isinstance(base, str):
        raise _wrong(path, f'"base" is {base!r}, expected the name of a preset')
    entries = tuple((key, qtype(t)) for key, t in types.items())
    for key, t in entries:
        parse_override(f"{key}={t}")  # now, with the file's name, instead of halfway
    return Recipe(base and preset_name(base), entries)


def _distinct(path: Path, pairs: list[tuple[str, Any]]) -> Mapping[str, Any]:
    """A JSON object; a key that occurs twice would lose one of its values without a word."""
    keys = [key for key, _ in pairs]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise _wrong(path, f"{twice!r} occurs twice")
    return dict(pairs)


def _from_lines(path: Path, text: str) -> Recipe:
    entries = tuple(_entries(text))
    if not entries:
        raise _wrong(path, "it is empty")
    return Recipe(None, entries, exact=False)


def _entries(text: str) -> Iterator[tuple[str, QuantType]]:
    for word in text.split():
        override = parse_override(word)
        yield override.pattern, override.qtype


def _wrong(path: Path, problem: str) -> UsageError:
    return UsageError(
        f"--recipe {show(path)}: {problem}. Expected "
        '{"version": 1, "base": "Q4_K_M", "types": {"blk.0.attn_v.weight": "Q6_K"}}, or lines `name=type` as llama-quantize reads them: '
        "correct the file, or make one with `quantscope recipe`."
    )
