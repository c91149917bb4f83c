"""A path from the command line → what it holds, the format found out by its content."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from quantscope.errors import ImportFormatError, MissingFileError
from quantscope.fingerprint import parse_line
from quantscope.importers.base import Imported, Run, decoded, read_bytes
from quantscope.importers.callback_log import BEGUN
from quantscope.importers.eval_callback import read_eval_callback
from quantscope.importers.fingerprints import read_fingerprints
from quantscope.importers.layouts import Known
from quantscope.importers.name_map import Rule
from quantscope.importers.rustorch import read_rustorch
from quantscope.importers.table import csv_table, is_table, markdown_tables, read_table
from quantscope.sources.base import show

FORMATS = ("auto", "eval-callback", "rustorch", "fingerprints", "npz", "npy", "safetensors", "csv", "trace")
RUSTORCH_LINE = re.compile(
    r"\[LAYER \d+( OUTPUT)?\]|\[(FINAL NORM|INPUT TOKENS|LOGITS|POSITION|GET_EMB)\b|^\W*Layer \d+\b[^|]*\brms\s*=",
    re.IGNORECASE | re.MULTILINE,
)
ZIP, NPY = b"PK\x03\x04", b"\x93NUMPY"
PROBED = 1 << 20  # [bytes] of a text in which its format shows


def read(path: Path, kind: str = "auto", *, rules: Sequence[Rule] = (), known: Known = Known()) -> Imported:  # noqa: B008
    """Everything a file or folder holds.

    kind: one of FORMATS.  rules, known: for arrays.  Raises MissingFileError, and ImportFormatError where nothing can be read.
    """
    if not path.exists():
        raise MissingFileError(f"{show(path)}: no such file, expected a log, dump or table to import. Check the path.")
    raw = b"" if path.is_dir() else read_bytes(path)
    kind = detect(path, raw) if kind == "auto" else kind
    if rules and kind not in ("npz", "npy", "safetensors"):
        raise ImportFormatError(f"{show(path)}: `--map` names arrays, but this is {kind}. Leave it out, or give npz, npy or safetensors.")
    if kind == "trace":
        return _trace(path)
    if kind in ("npz", "npy", "safetensors"):
        from quantscope.importers.arrays import read_arrays

        return read_arrays(path, rules, known, kind)
    if path.is_dir():
        from quantscope.importers.rustorch_dumps import read_dumps

        return read_dumps(path)
    return _text(decoded(raw), kind, path)


def detect(path: Path, raw: bytes) -> str:
    """The format by content.  Raises ImportFormatError where nothing known is found."""
    if path.is_dir():
        return _of_folder(path)
    if raw.startswith(ZIP):
        return "npz"
    if raw.startswith(NPY):
        return "npy"
    if raw[8:9] == b"{" and int.from_bytes(raw[:8], "little") <= len(raw):
        return "trace" if b"quantscope.trace" in raw[: 8 + int.from_bytes(raw[:8], "little")] else "safetensors"
    text = decoded(raw[:PROBED])
    if BEGUN.search(text):
        return "eval-callback"
    if _has_fingerprints(text):
        return "fingerprints"
    if any(is_table(t) for t in (*markdown_tables(text), csv_table(text))):
        return "csv"
    if RUSTORCH_LINE.search(text):
        return "rustorch"
    raise ImportFormatError(
        f"{show(path)}: found none of the formats that can be imported: the log of llama-eval-callback or RusTorch, fingerprint lines, a "
        f"table with a column `layer`, npz, npy or safetensors arrays. See docs/importing.md for how to write one, or name the format with "
        f"`--format`."
    )


def _has_fingerprints(text: str) -> bool:
    try:
        return any(parse_line(line) is not None for line in text.splitlines() if "qsfp" in line)
    except ImportFormatError:
        return True  # a damaged one: its reader says so


def _of_folder(path: Path) -> str:
    from quantscope.importers.rustorch_dumps import dump_files

    if dump_files(path):
        return "rustorch"
    if next(path.rglob("*.npy"), None) is not None:
        return "npy"
    raise ImportFormatError(
        f"{show(path)}: a folder without anything to import, expected npy files or RusTorch's dumps (rustorch_layer_0.txt ...). Give the "
        f"folder they are in, or a file."
    )


def _text(text: str, kind: str, path: Path) -> Imported:
    file = show(path)
    if kind == "eval-callback":
        return read_eval_callback(text, file)
    if kind == "rustorch":
        return read_rustorch(text, file)
    if kind == "fingerprints":
        traces = read_fingerprints(text, file)
        return Imported(kind, tuple(Run(f"call {i}", t) for i, t in enumerate(traces, 1)))
    return read_table(text, file, default=path.stem)


def _trace(path: Path) -> Imported:
    from quantscope.trace_file import load

    return Imported("trace", (Run("call 1", load(path)),))
