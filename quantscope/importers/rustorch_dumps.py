"""A folder of RusTorch's dump files → one run a forward call.

``rustorch_embedding.txt``, ``rustorch_layer_{L}.txt`` (and ``_input``), ``hidden_state_call_{n}.txt`` (after the output norm) hold one
float a line, ``rustorch_logits.txt`` lines of ``id logit``; all of them are of the last token.  A ``*.log`` beside them says which tokens
those were.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from quantscope.errors import ImportFormatError
from quantscope.importers.base import AT_LAST, CHANNEL, NUMBER, Imported, input_tap, non_finite_note, number, read_text
from quantscope.importers.rustorch import read_calls
from quantscope.importers.rustorch_calls import Call, runs_of
from quantscope.sources.base import show
from quantscope.trace import Full

# File name → (tap, forward call); {L} a layer, {n} a call.
Meaning: TypeAlias = Callable[["re.Match[str]"], tuple[str, int]]
NAMES: tuple[tuple[re.Pattern[str], Meaning], ...] = (
    (re.compile(r"rustorch_embedding\.txt"), lambda m: ("embd", 0)),
    (re.compile(r"rustorch_layer_(\d+)_input\.txt"), lambda m: (input_tap(int(m[1])), 0)),
    (re.compile(r"rustorch_layer_(\d+)\.txt"), lambda m: (f"l_out-{int(m[1])}", 0)),
    (re.compile(r"hidden_state_call_(\d+)\.txt"), lambda m: ("result_norm", int(m[1]))),
    (re.compile(r"rustorch_logits\.txt"), lambda m: ("result_output", 0)),
)


def dump_files(folder: Path) -> dict[tuple[str, int], list[Path]]:
    """(tap, call) → its files."""
    found: dict[tuple[str, int], list[Path]] = {}
    for path in sorted(folder.iterdir()):
        for pattern, meaning in NAMES:
            if m := pattern.fullmatch(path.name):
                found.setdefault(meaning(m), []).append(path)
    return found


def read_dumps(folder: Path) -> Imported:
    """All dumps of a folder.  Raises ImportFormatError where there is none, and for a line that is no number."""
    files = dump_files(folder)
    if not files:
        raise ImportFormatError(f"{show(folder)}: expected dumps such as rustorch_layer_0.txt, found none. Check the folder.")
    calls, warnings = _calls_of_logs(folder)
    calls += [Call(follows=i > 0) for i in range(len(calls), 1 + max(n for _, n in files))]
    for (tap, n), paths in files.items():
        for path in paths:
            values = _logits(path) if tap == "result_output" else _floats(path)
            calls[n].add(tap, Full(values[None], AT_LAST))
            if note := non_finite_note(tap, values, CHANNEL):
                calls[n].notes.append(note)
    runs = runs_of([c for c in calls if c.taps or c.logits])
    return Imported("rustorch", tuple(runs), warnings=tuple(f"{show(folder)}: {w}" for w in warnings))


def _calls_of_logs(folder: Path) -> tuple[list[Call], list[str]]:
    logs = sorted(folder.glob("*.log"))
    if len(logs) > 1:
        raise ImportFormatError(f"{show(folder)}: {len(logs)} logs beside the dumps, expected at most one. Keep the one of that run.")
    return read_calls(read_text(logs[0])) if logs else ([], [])


def _lines(path: Path) -> list[str]:
    return [line for line in read_text(path).splitlines() if line.strip()]


def _floats(path: Path) -> Tensor:
    return _tensor(_lines(path), path)


def _logits(path: Path) -> Tensor:
    pairs = [line.split() for line in _lines(path)]
    bad = next((i for i, p in enumerate(pairs) if len(p) != 2 or p[0] != str(i)), None)
    if bad is not None:
        raise ImportFormatError(
            f"{show(path)}, line {bad + 1}: expected `{bad} LOGIT`, found {' '.join(pairs[bad])[:40]!r}. Dump it again."
        )
    return _tensor([p[1] for p in pairs], path)


def _tensor(texts: Sequence[str], path: Path) -> Tensor:
    bad = next((i for i, t in enumerate(texts) if not re.fullmatch(NUMBER, t.strip(), re.IGNORECASE)), None)
    if bad is not None or not texts:
        found = "an empty file" if bad is None else f"{texts[bad][:40]!r} in line {bad + 1}"
        raise ImportFormatError(f"{show(path)}: expected one number a line, found {found}. The dump was cut or is another file.")
    return torch.tensor([number(t) for t in texts], dtype=torch.float64).float()
