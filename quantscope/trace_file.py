"""Traces on disk: one safetensors file (docs/trace-format.md).

Tensors: ``TAP`` whole values, ``TAP@sample`` and ``TAP@index``, ``TAP@stats`` in the order rms, mean, min, max, sum (NaN: not known),
``TAP@fingerprint`` sixteen sums; a second piece of the same kind at one tap has ``#1``, a third ``#2`` behind it.  The metadata key
``quantscope.trace`` holds what is no tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantscope.errors import MissingFileError, TraceFormatError
from quantscope.new_file import finished
from quantscope.sources.base import show
from quantscope.trace import STATS, Evidence, Fingerprint, Full, Origin, Sample, Stats, Trace

VERSION = 1
KEY = "quantscope.trace"


def save(trace: Trace, path: Path) -> None:
    """Write the trace; the file is complete or absent.  Raises TraceFormatError where the disk does not allow it."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    described = []
    for tap, pieces in trace.taps.items():
        seen: dict[type, int] = {}
        for piece in pieces:
            number = seen.setdefault(type(piece), 0)
            seen[type(piece)] += 1
            parts, facts = _taken_apart(piece)
            suffix = f"#{number}" if number else ""
            tensors |= {tap + part + suffix: x.detach().contiguous().cpu().clone() for part, x in parts.items()}
            described.append({"tap": tap, "kind": _KINDS[type(piece)], "suffix": suffix, "positions": piece.positions} | facts)
    origin = asdict(trace.origin)
    origin["positions"] = "all" if trace.origin.positions is None else trace.origin.positions
    header = {KEY: json.dumps({"version": VERSION, **origin, "taps": described})}
    try:
        with finished(path) as aside:
            save_file(tensors, aside, metadata=header)
    except OSError as e:
        raise TraceFormatError(
            f"{show(path)}: the trace could not be written: {e.strerror or e}. Check the folder and the free space, or give another "
            f"`-o FILE`."
        ) from e


def load(path: Path) -> Trace:
    """Read a trace.  Raises MissingFileError, and TraceFormatError for a file that is no trace, damaged, or of a newer version."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise MissingFileError(f"{show(path)}: no such file, expected a trace. Make one with `quantscope trace MODEL -o {show(path)}`.")
    try:
        with safe_open(str(path), framework="pt") as f:
            header = (f.metadata() or {}).get(KEY)
            if header is None:
                raise TraceFormatError(
                    f"{show(path)}: a safetensors file without the metadata {KEY!r}, expected a trace. If it holds tensors of another "
                    f"engine, read it with `quantscope import {show(path)} -o T.safetensors`."
                )
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
        return _trace_of(json.loads(header), tensors)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as e:
        raise TraceFormatError(
            f"{show(path)}: expected a trace of quantscope, found something that cannot be read as one ({e}). It is another file, or was "
            f"damaged or cut short: make it again with `quantscope trace`, or read a log with `quantscope import`."
        ) from None


def _trace_of(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Trace:
    if facts["version"] != VERSION:
        raise TraceFormatError(
            f"a trace of version {facts['version']}, expected {VERSION}. Use the quantscope that wrote it, or a newer one."
        )
    known = {name: facts[name] for name in Origin.__dataclass_fields__ if name in facts}
    known |= {name: None if known[name] is None else tuple(known[name]) for name in ("tokens", "notes")}
    known["positions"] = None if known["positions"] == "all" else tuple(known["positions"])
    taps: dict[str, tuple[Evidence, ...]] = {}
    for piece in facts["taps"]:
        taps[piece["tap"]] = (*taps.get(piece["tap"], ()), _put_together(piece, tensors))
    return Trace(Origin(**known), taps)


_KINDS: dict[type, str] = {Full: "full", Sample: "sample", Stats: "stats", Fingerprint: "fingerprint"}


def _taken_apart(piece: Evidence) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Its tensors by suffix, and what goes into the header."""
    if isinstance(piece, Full):
        return {"": piece.values}, {}
    if isinstance(piece, Sample):
        return {"@sample": piece.values, "@index": piece.index}, {"shape": piece.shape, "digits": piece.digits}
    if isinstance(piece, Stats):
        values = [piece.values.get(name, math.nan) for name in STATS]
        return {"@stats": torch.tensor(values, dtype=torch.float64)}, {"digits": dict(piece.digits)}
    return {"@fingerprint": piece.sums}, {"n": piece.n, "rms": piece.rms, "peak": piece.peak, "at": piece.at}


def _put_together(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Evidence:
    tap, suffix, kind = facts["tap"], facts["suffix"], facts["kind"]
    positions = None if facts["positions"] is None else tuple(facts["positions"])
    if kind == "full":
        return Full(tensors[tap + suffix], positions)
    if kind == "sample":
        return Sample(tensors[f"{tap}@sample{suffix}"], tensors[f"{tap}@index{suffix}"], tuple(facts["shape"]), positions, facts["digits"])
    if kind == "stats":
        return Stats(dict(_known(tensors[f"{tap}@stats{suffix}"])), positions, facts["digits"])
    if kind == "fingerprint":
        return Fingerprint(tensors[f"{tap}@fingerprint{suffix}"], facts["n"], facts["rms"], facts["peak"], facts["at"], positions)
    raise ValueError(f"evidence of the kind {kind!r}")


def _known(values: Tensor) -> Iterator[tuple[str, float]]:
    return ((name, x) for name, x in zip(STATS, values.tolist(), strict=True) if not math.isnan(x))
