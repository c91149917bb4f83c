"""Models by name from Ollama's local store: ``ollama:NAME[:TAG]``, without running Ollama.

    models/manifests/registry.ollama.ai/library/NAME/TAG      JSON: layers of {mediaType, digest, size}
    models/blobs/sha256-…                                     their content; the model's is a GGUF file

Source: ``ParseName``, ``Manifest`` and ``GetBlobsPath`` of Ollama's types/model and server packages.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quantscope.errors import CorruptFileError, MissingFileError, TruncatedFileError, UsageError
from quantscope.sources.base import show
from quantscope.sources.files import read_json_object
from quantscope.wording import some

PREFIX = "ollama:"
ENV = "OLLAMA_MODELS"
_STORES = ("~/.ollama/models", "/usr/share/ollama/.ollama/models", "/var/lib/ollama/models")  # of a user, of the service
_HOST, _OWNER, _TAG = "registry.ollama.ai", "library", "latest"
_MODEL = "application/vnd.ollama.image.model"
_NAMED = 8  # models of the store that an error lists


def stored(name: str) -> Path:
    """The GGUF file of ``[HOST/][OWNER/]NAME[:TAG]``.

    Raises MissingFileError when there is no store or no such model in it, UsageError for what is no name, CorruptFileError for a damaged
    manifest and TruncatedFileError when the blob has not the size it should.
    """
    store = _store(name)
    *place, last = name.split("/")
    model, _, tag = last.partition(":")
    if len(place) > 2 or not model or any(part in ("", ".", "..") for part in place):
        raise UsageError(f"{PREFIX}{name}: expected {PREFIX}NAME[:TAG], as in {PREFIX}llama3.2:1b, with OWNER/ or HOST/OWNER/ before it.")
    host, owner = (*[_HOST, _OWNER][: 2 - len(place)], *place)
    manifest = store / "manifests" / host / owner / model / (tag or _TAG)
    if not manifest.is_file():
        known = sorted(_names(store))
        raise MissingFileError(
            f"{PREFIX}{name}: no such model in {show(store)}. It has {some(known, _NAMED) or 'none'}: give one of these, or fetch it with "
            f"`ollama pull {name}`."
        )
    return _blob(name, store, read_json_object(manifest), manifest)


def _store(name: str) -> Path:
    given = os.environ.get(ENV)
    places = [Path(given)] if given else [Path(os.path.expanduser(place)) for place in _STORES]
    for place in places:
        if (place / "manifests").is_dir():
            return place
    raise MissingFileError(
        f"{PREFIX}{name}: no models of Ollama in {', '.join(map(show, places))}. Name the folder that has `blobs` and `manifests` in it: "
        f"`{ENV}=/path/to/models quantscope ...`."
    )


def _names(store: Path) -> Iterator[str]:
    """The names of all models, as `ollama list` prints them."""
    for path in (store / "manifests").glob("*/*/*/*"):
        host, owner, model, tag = path.parts[-4:]
        place = "" if (host, owner) == (_HOST, _OWNER) else f"{owner}/" if host == _HOST else f"{host}/{owner}/"
        yield f"{place}{model}:{tag}"


def _blob(name: str, store: Path, manifest: dict[str, Any], path: Path) -> Path:
    """The file of the manifest's model layer."""
    layers = manifest.get("layers")
    models = [x for x in layers if isinstance(x, dict) and x.get("mediaType") == _MODEL] if isinstance(layers, list) else []
    digest = models[0].get("digest") if len(models) == 1 else None
    if not isinstance(digest, str) or not digest.startswith("sha256:") or "/" in digest:
        raise CorruptFileError(
            f"{show(path)}: the manifest has {len(models)} layers of type {_MODEL}, expected one with a SHA-256. The model is not stored "
            f"as one GGUF file, or the store is damaged: fetch it again with `ollama pull {name}`."
        )
    blob = store / "blobs" / digest.replace(":", "-")
    if not blob.is_file():
        raise MissingFileError(
            f"{show(blob)}: no such file, but the manifest of {name} names it. The download was interrupted: `ollama pull {name}`."
        )
    size, expected = blob.stat().st_size, models[0].get("size", blob.stat().st_size)
    if size != expected:
        raise TruncatedFileError(
            f"{show(blob)}: the file has {size:,} bytes, expected {expected:,} as the manifest of {name} says. The download is incomplete: "
            f"fetch it again with `ollama pull {name}`."
        )
    return blob
