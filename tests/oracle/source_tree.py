"""The llama.cpp sources that llama-cpp-python's source archive carries: vocabularies, schema snapshots, converters.

    llama_cpp_source() / "models" / "ggml-vocab-llama-bpe.gguf"

Fetched once with pip (75 MB) into ``build/llama-cpp-source/<version>``; ``QUANTSCOPE_LLAMA_CPP_SOURCE`` names a tree that is
already there.  A tree that cannot be had fails the test that asked for it: an oracle that was not consulted proves nothing.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENV = "QUANTSCOPE_LLAMA_CPP_SOURCE"
PACKAGE = "llama-cpp-python"
NEEDED = ("models/", "tests/snapshots/", "src/", "gguf-py/", "conversion/", "convert_hf_to_gguf.py")


@cache
def llama_cpp_source() -> Path:
    """The root of the llama.cpp tree of the pinned llama-cpp-python; downloads it on first use."""
    given = os.environ.get(ENV)
    if given:
        return _checked(Path(given), f"{ENV}={given}")
    version = _pinned_version()
    target = ROOT / "build" / "llama-cpp-source" / version
    if not target.is_dir():
        _fetch(version, target)
    return _checked(target, f"{target}, unpacked from the {PACKAGE} {version} source archive,")


def _checked(tree: Path, origin: str) -> Path:
    if not list(tree.glob("models/ggml-vocab-*.gguf")):
        raise AssertionError(f"{origin} holds no models/ggml-vocab-*.gguf; it must be the root of a llama.cpp source tree")
    return tree


def _pinned_version() -> str:
    """The version in constraints.txt, else the installed one."""
    constraints = ROOT / "constraints.txt"
    text = constraints.read_text("utf-8") if constraints.is_file() else ""
    pinned = re.search(r"^llama[-_]cpp[-_]python==([^\s;#]+)", text, re.MULTILINE | re.IGNORECASE)
    return pinned[1] if pinned else importlib.metadata.version(PACKAGE)


def _fetch(version: str, target: Path) -> None:
    """Download, unpack beside the target, rename: an interrupted run leaves nothing that looks complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{version}-", dir=target.parent) as scratch:
        _unpack(_download(version, Path(scratch)), Path(scratch) / "tree")
        try:
            (Path(scratch) / "tree").rename(target)
        except OSError:  # another process was faster
            if not target.is_dir():
                raise


def _download(version: str, folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest", str(folder)]
    done = subprocess.run([*pip, f"{PACKAGE}=={version}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    archives = list(folder.glob("*.tar.gz"))
    if done.returncode or len(archives) != 1:
        raise AssertionError(
            f"the source archive of {PACKAGE} {version} could not be downloaded (pip exit code {done.returncode}), and the oracle tests "
            f"need the llama.cpp files in it. Connect to a package index, or set {ENV} to a llama.cpp source tree.\n{done.stdout}"
        )
    return archives[0]


def _unpack(archive: Path, tree: Path) -> None:
    """Write the NEEDED parts of ``<archive root>/vendor/llama.cpp`` to ``tree``."""
    with tarfile.open(archive) as tar:
        for member in tar:
            _, _, inner = member.name.partition("/vendor/llama.cpp/")
            if inner.startswith(NEEDED):
                member.name = inner
                tar.extract(member, tree, filter="data")
