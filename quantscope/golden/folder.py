"""A pack on disk: written complete or not at all, read back as data."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantscope.errors import MissingFileError, TraceFormatError, UsageError
from quantscope.golden import KEY, MANIFEST, PRINTS, VERSION
from quantscope.golden.pack import Pack
from quantscope.importers.fingerprints import read_fingerprints
from quantscope.new_file import as_any_new
from quantscope.sources.base import show
from quantscope.trace import Evidence, Full, Origin, Trace


def check_target(folder: Path) -> None:
    """UsageError now, before minutes of work, where ``folder`` cannot become a pack: it is a file, or a folder with something else."""
    if folder.is_dir() and any(folder.iterdir()) and not _is_pack(folder):
        raise UsageError(
            f"-o {show(folder)}: a folder that holds other files, expected a new name, an empty folder or a golden pack, which is "
            f"replaced. Give another `-o DIR`."
        )
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise UsageError(f"-o {show(folder)}: {show(existing)} is a file, expected a folder or a new name. Give another `-o DIR`.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"-o {show(folder)}: {show(existing)} is not writable. Give another `-o DIR`, or change its permissions.")


def write_pack(pack: Pack, folder: Path) -> None:
    """Put the pack in the place of ``folder``; another pack there makes room.  UsageError as ``check_target``, and for a full disk."""
    check_target(folder)
    folder = folder.absolute()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
        try:
            for name, content in pack.files.items():
                (aside / name).parent.mkdir(parents=True, exist_ok=True)
                (aside / name).write_bytes(content)
            as_any_new(aside, 0o777)
            if folder.exists():
                shutil.rmtree(folder)
            aside.rename(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as e:
        raise UsageError(f"-o {show(folder)}: the pack could not be written: {e.strerror or e}. Give another `-o DIR`.") from e


def _is_pack(folder: Path) -> bool:
    try:
        return KEY in json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError, TypeError):
        return False


@dataclass(frozen=True)
class Probe:
    """What a pack expects of one probe: values where they are filed, a fingerprint of every tap; and the tolerance of each tap."""

    name: str
    expected: Trace
    tolerance: Mapping[str, float]


def read_pack(folder: Path) -> list[Probe]:
    """The probes of a pack, in order.  Raises MissingFileError, and TraceFormatError for another folder or a damaged or newer pack."""
    path = folder / MANIFEST
    if not path.is_file():
        raise MissingFileError(
            f"{show(folder)}: expected a golden pack, found no {MANIFEST} there. Make one with `quantscope golden MODEL -o {show(folder)}`."
        )
    try:
        manifest = json.loads(path.read_bytes())
        if manifest[KEY] != VERSION:
            raise ValueError(f"version {manifest[KEY]}, this program knows {VERSION}")
        prints = read_fingerprints((folder / PRINTS).read_text("utf-8"), PRINTS)
        of_ids = {t.origin.tokens: t for t in prints}
        return [_probe(folder, manifest, facts, of_ids[tuple(facts["ids"])]) for facts in manifest["probes"]]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise TraceFormatError(
            f"{show(folder)}: expected a complete golden pack, found something that cannot be read as one ({type(e).__name__}: {e}). It "
            f"was damaged, cut short or edited: make it again with `quantscope golden MODEL -o {show(folder)}`."
        ) from None


def _probe(folder: Path, manifest: Mapping[str, Any], facts: Mapping[str, Any], prints: Trace) -> Probe:
    model = manifest["model"]
    origin = Origin(
        "golden pack",
        manifest["quantscope_version"],
        manifest["values"]["arithmetic"],
        model["name"],
        model["sha256"],
        model["arch"],
        tuple(facts["ids"]),
    )
    taps: dict[str, tuple[Evidence, ...]] = {}
    for tap in facts["taps"]:
        full = (Full(_values(folder / tap["file"], tap["shape"]), tuple(tap["positions"])),) if "file" in tap else ()
        taps[tap["tap"]] = (*full, *prints.taps[tap["tap"]])
    return Probe(facts["name"], Trace(origin, taps), {tap["tap"]: float(tap["tolerance"]) for tap in facts["taps"]})


def _values(path: Path, shape: list[int]) -> Tensor:
    """A float file; ValueError when it has another size."""
    return torch.from_numpy(np.fromfile(path, "<f4").reshape(shape).astype(np.float32))
