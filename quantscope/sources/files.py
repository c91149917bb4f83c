"""Opening files: every way it can fail, each as one paragraph."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np

from quantscope.errors import CorruptFileError, MissingFileError, ModelFileError, NotAModelError
from quantscope.sources.base import Bytes, show

HASH_BYTES = 8 << 20  # a multiple of every page size

# What people open by mistake: first bytes → (what it is, what to do).
_SIGNATURES: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer, not the model itself", "Run `git lfs pull` in its repository"),
    (b"<!DOCTYPE", "an HTML page", "The download link led to a web page: use the direct download link of the file"),
    (b"<!doctype", "an HTML page", "The download link led to a web page: use the direct download link of the file"),
    (b"<html", "an HTML page", "The download link led to a web page: use the direct download link of the file"),
    (b"PK\x03\x04", "a zip archive or a PyTorch checkpoint", "Convert the model with llama.cpp's convert_hf_to_gguf.py, or unpack it"),
    (b"\x80\x02", "a pickled PyTorch checkpoint", "Convert the model with llama.cpp's convert_hf_to_gguf.py"),
    (b"lmgg", "a GGML file from before GGUF (2023)", "Take a GGUF of this model: no current engine reads the older format"),
    (b"fmgg", "a GGMF file from before GGUF (2023)", "Take a GGUF of this model: no current engine reads the older format"),
    (b"tjgg", "a GGJT file from before GGUF (2023)", "Take a GGUF of this model: no current engine reads the older format"),
    (b"FUGG", "a GGUF with its magic byte-swapped", "The file was damaged or converted wrongly: fetch it again"),
    (b"\x1f\x8b", "gzip-compressed", "Unpack it with gunzip"),
)


def map_file(path: Path) -> Bytes:
    """The file's bytes, read-only and memory-mapped; MissingFileError, NotAModelError or ModelFileError when that is impossible."""
    try:
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode):  # opening a pipe would wait for a writer
            raise NotAModelError(f"{show(path)}: not a regular file, expected a GGUF file. Give the path of a file on disk.")
        if info.st_size == 0:
            raise NotAModelError(
                f"{show(path)}: the file is empty, expected a model. The download failed before the first byte, or the disk was full: "
                f"check the free space with `df -h` and fetch the file again."
            )
        return np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
    except (OSError, ValueError) as error:
        raise_os_error(path, error)


def advise(part: Bytes, advice: Literal["MADV_WILLNEED", "MADV_DONTNEED"]) -> None:
    """Tell the system what is going to happen to the pages that lie wholly inside ``part``, a view of ``map_file``'s bytes.

    A hint: the bytes read the same afterwards, and where the system knows no such advice nothing happens.
    """
    whole = part
    while isinstance(whole.base, np.ndarray):
        whole = whole.base
    mapped = whole.base
    if not isinstance(mapped, mmap.mmap) or not hasattr(mmap, advice):
        return
    start = part.ctypes.data - whole.ctypes.data
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    length = start + part.nbytes - first
    if length > 0:
        mapped.madvise(getattr(mmap, advice), first, length)


def sha256_of(mapped: Bytes) -> str:
    """Hex digest of ``map_file``'s bytes; their pages are given back on the way: hashing does not fill the memory with the file."""
    digest = hashlib.sha256()
    for first in range(0, len(mapped), HASH_BYTES):
        part = mapped[first : first + HASH_BYTES]
        digest.update(part.data)
        advise(part, "MADV_DONTNEED")
    return digest.hexdigest()


def raise_os_error(path: Path, error: OSError | ValueError) -> NoReturn:
    """Turn what the operating system said into one of our errors."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        folder = path.parent
        cause = (
            f"Its folder exists but holds no such name: run `ls {show(folder)}`"
            if os.path.isdir(folder)
            else f"Its folder {show(folder)} does not exist either: check the path, relative paths start at {show(Path.cwd())}"
        )
        raise MissingFileError(f"{show(path)}: no such file, expected a GGUF file or a Hugging Face folder. {cause}.") from None
    if isinstance(error, PermissionError):
        raise ModelFileError(
            f"{show(path)}: permission denied, expected a readable file. It belongs to another user or was created unreadable: "
            f"run `ls -l {show(path)}` and give yourself read access."
        ) from None
    raise ModelFileError(
        f"{show(path)}: cannot be read ({error}). The disk, the network mount or the path itself is at fault: "
        f"try `head -c 4 {show(path)}`, then copy the file to a local disk."
    ) from None


def not_a_gguf(path: Path, head: bytes) -> NotAModelError:
    """The error for a file without the magic, saying what it is instead where that can be told."""
    for magic, what, remedy in _SIGNATURES:
        if head.startswith(magic):
            return NotAModelError(f"{show(path)}: this is {what}, expected a GGUF file, which starts with b'GGUF'. {remedy}.")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32:
        return NotAModelError(
            f"{show(path)}: this is a safetensors file, expected a GGUF file or a folder. The weights alone do not say how to run "
            f"the model: give the folder that also holds config.json, here perhaps `{show(path.parent)}`."
        )
    return NotAModelError(
        f"{show(path)}: not a GGUF file: it starts with {head[:4]!r}, expected b'GGUF'. It is another kind of file or its beginning is "
        f"damaged: run `file {show(path)}`, and give a GGUF file or a Hugging Face folder (config.json and safetensors)."
    )


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file whose top level is an object; MissingFileError, ModelFileError or CorruptFileError otherwise."""
    try:
        text = path.read_bytes()
    except (OSError, ValueError) as error:
        raise_os_error(path, error)
    return parse_json_object(path, text, "the file")


def parse_json_object(path: Path, text: bytes, what: str) -> dict[str, Any]:
    """Parse bytes as a JSON object; CorruptFileError naming the position otherwise."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(
            f"{show(path)}: {what} is no JSON ({error}). It was damaged or cut short: fetch it again and compare its checksum."
        ) from None
    if not isinstance(value, Mapping):
        raise CorruptFileError(f"{show(path)}: {what} holds a JSON {type(value).__name__}, expected an object. Fetch the file again.")
    return dict(value)
