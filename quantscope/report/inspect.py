"""A file summary for the terminal and as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from quantscope.language import say
from quantscope.phrases import count, quantity, size
from quantscope.report.prose import Prose
from quantscope.sources.summary import ArrayPreview, Summary, TensorRow
from quantscope.wording import fixed, percent, printable, quoted

INSPECT_VERSION = 1
LONGEST = 100  # characters of a metadata value that are shown


def document(summary: Summary) -> str:
    """The summary as one JSON object; arrays by length and first elements, NaN and infinity as strings."""
    data = {"version": INSPECT_VERSION, **dataclasses.asdict(summary)}
    return json.dumps(_plain(data), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """Plain JSON data; what JSON lacks (NaN, infinity, bytes) as its text."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)


def render(summary: Summary, every_tensor: bool = False) -> RenderableType:
    """Size, types, tensors and metadata; tensors that repeat in every layer take one line unless ``every_tensor``."""
    parts: list[RenderableType] = [Prose(headline(summary), style="bold"), *_damage(summary)]
    parts += [*_heading(say("Types")), _indented(_types(summary))]
    parts += [*_heading(say("Tensors")), _indented(_tensors([[t] for t in summary.tensors] if every_tensor else alike(summary.tensors)))]
    parts += [*_heading(say("Metadata")), _indented(_metadata(summary))]
    return Group(*parts)


def headline(s: Summary) -> str:
    """What the file is, how large, and in how many bits per weight."""
    container = ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in s.container.items())
    kind = "GGUF" if s.format == "gguf" else say("Hugging Face folder")
    return say(
        "{path}: {kind}, {size}, {tensors}, {n} weights, {bpw} bits per weight",
        path=printable(s.path),
        kind=say("{name} ({value})", name=kind, value=container) if container else kind,
        size=size(s.file_bytes),
        tensors=count(len(s.tensors), "tensor"),
        n=quantity(s.n_elements),
        bpw=fixed(s.bpw, 2),
    )


def _damage(s: Summary) -> list[RenderableType]:
    missing = [t.name for t in s.tensors if not t.intact]
    if not missing:
        return []
    named = ", ".join(printable(n) for n in missing[:5]) + (" …" if len(missing) > 5 else "")
    text = say(
        "The file ends too early: {n} of {tensors} are incomplete or missing ({names}).",
        n=len(missing),
        tensors=count(len(s.tensors), "tensor"),
        names=named,
    )
    return [Prose(text, "bold red")]


def _heading(text: str) -> list[RenderableType]:
    return [Text(), Text(text, style="bold cyan")]


def _indented(table: Table) -> RenderableType:
    return Padding(table, (0, 0, 0, 2), expand=False)


def _grid(*columns: str, right: str = "") -> Table:
    """A table without lines; ``right`` has an r for every right-aligned column, anything else for the others."""
    grid = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for i, name in enumerate(columns):
        aligned = right[i : i + 1] == "r"
        grid.add_column(Text(name, style="bold"), justify="right" if aligned else "left", no_wrap=aligned, overflow="fold")
    return grid


def _types(s: Summary) -> Table:
    grid = _grid(say("type"), say("tensors"), say("weights"), say("bytes"), say("of all"), say("bits per weight"), right="lrrrrr")
    for t in s.types:
        share = percent(t.n_bytes / s.tensor_bytes, 3) if s.tensor_bytes else ""
        grid.add_row(t.type, f"{t.n_tensors:,}", f"{t.n_elements:,}", f"{t.n_bytes:,}", share, fixed(t.bpw, 3))
    return grid


def _tensors(groups: list[list[TensorRow]]) -> Table:
    grid = _grid(say("tensor"), say("number"), say("type"), say("shape"), say("bytes"), right="lrllr")
    for group in groups:
        t = group[0]
        name = Text(printable(group_name(group)))
        if not t.intact:
            name.append(say(" (incomplete)"), "red")
        shape = " × ".join(f"{n:,}" for n in t.shape)
        grid.add_row(name, f"{len(group):,}", t.type, shape, f"{sum(x.n_bytes for x in group):,}")
    return grid


_LAYER = re.compile(r"^(.*?\.)(\d+)(\..*)$")  # "blk." "12" ".attn_q.weight"


def alike(tensors: tuple[TensorRow, ...]) -> list[list[TensorRow]]:
    """Tensors of the same name but for the layer, type, shape and state together, in the order of the first of each."""
    groups: dict[tuple[object, ...], list[TensorRow]] = {}
    for t in tensors:
        m = _LAYER.match(t.name)
        key = (m[1], m[3]) if m else (t.name,)
        groups.setdefault((*key, t.type, t.shape, t.intact), []).append(t)
    return list(groups.values())


def group_name(group: list[TensorRow]) -> str:
    """``blk.{0-3,7}.attn_v.weight`` for the layers of a group; the name itself for a single tensor."""
    found = [_LAYER.match(t.name) for t in group]
    layers = sorted(int(m[2]) for m in found if m)
    if len(group) == 1 or found[0] is None:
        return group[0].name
    runs: list[list[int]] = []
    for i in layers:
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return found[0][1] + "{" + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) + "}" + found[0][3]


def _metadata(s: Summary) -> Table:
    grid = _grid(say("key"), say("value"))
    for key, value in s.metadata.items():
        grid.add_row(printable(key), Text(_value(value)))
    return grid


def _value(value: Any) -> str:
    if isinstance(value, ArrayPreview):
        shown = ", ".join(_value(v) for v in value.first)
        first = f"[{shown}{', …' if value.n > len(value.first) else ''}]"
        return say("{value} ({name})", value=first, name=count(value.n, "element"))
    if isinstance(value, str):
        return quoted(value if len(value) <= LONGEST else value[: LONGEST - 1] + "…")
    if isinstance(value, float) and value == np.float32(value):
        return str(np.float32(value))  # GGUF floats are float32: 1e-05, not 9.999999747378752e-06
    if isinstance(value, dict):
        return ", ".join(f"{printable(str(k))}: {_value(v)}" for k, v in value.items())
    return printable(str(value))
