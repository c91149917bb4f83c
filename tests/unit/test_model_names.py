"""Models by name: which file a name means, and what is wrong with a store that cannot be read."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest

from quantscope.errors import CorruptFileError, MissingExtraError, MissingFileError, TruncatedFileError, UsageError
from quantscope.sources.resolve import is_name, open_source, short_name
from tests.models import STORIES

MODEL = "application/vnd.ollama.image.model"
NAMES = {"stories": "registry.ollama.ai/library/stories/latest", "stories:q4": "registry.ollama.ai/library/stories/q4"}
NAMES |= {"me/mine:1b": "registry.ollama.ai/me/mine/1b", "hf.co/acme/tiny-GGUF:Q4_K_M": "hf.co/acme/tiny-GGUF/Q4_K_M"}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One model under every name, with the layers that Ollama writes beside it."""
    digest = hashlib.sha256(STORIES.read_bytes()).hexdigest()
    (tmp_path / "blobs").mkdir()
    shutil.copy(STORIES, tmp_path / "blobs" / f"sha256-{digest}")
    layers = [
        {"mediaType": "application/vnd.ollama.image.license", "digest": "sha256:00", "size": 1},
        {"mediaType": MODEL, "digest": f"sha256:{digest}", "size": STORIES.stat().st_size},
    ]
    for place in NAMES.values():
        path = tmp_path / "manifests" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_a_model_by_its_name(name: str, store: Path) -> None:
    source = open_source(f"ollama:{name}")
    assert (source.path.parent, source.sha256()) == (store / "blobs", hashlib.sha256(STORIES.read_bytes()).hexdigest())


def test_names_and_paths(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [short_name(name) for name in ("ollama:me/mine:1b", "hf:acme/tiny/tiny-Q4_0.gguf", "hf:acme/tiny@main", str(STORIES))] == [
        "mine-1b",
        "tiny-Q4_0",
        "tiny-main",
        STORIES.stem,
    ]
    monkeypatch.chdir(tmp_path)
    assert is_name("ollama:file")
    shutil.copy(STORIES, "ollama:file")  # a file of that name is a file
    assert not is_name("ollama:file")
    assert open_source("ollama:file").tensors


def test_what_is_not_there(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = r"hf\.co/acme/tiny-GGUF:Q4_K_M, me/mine:1b, stories:latest, stories:q4"
    with pytest.raises(MissingFileError, match=rf"ollama:llama3: no such model in .*It has {listed}.*`ollama pull llama3`"):
        open_source("ollama:llama3")
    with pytest.raises(UsageError, match=r"expected ollama:NAME\[:TAG\]"):
        open_source("ollama:../../etc/passwd")
    monkeypatch.setenv("OLLAMA_MODELS", str(store / "blobs"))
    with pytest.raises(MissingFileError, match=r"no models of Ollama in .*blobs.*OLLAMA_MODELS="):
        open_source("ollama:stories")


def test_a_damaged_store(store: Path) -> None:
    blob = next((store / "blobs").iterdir())
    blob.write_bytes(STORIES.read_bytes()[:-100])
    with pytest.raises(TruncatedFileError, match=r"bytes, expected 1,\d+,\d+ as the manifest of stories says.*ollama pull"):
        open_source("ollama:stories")
    blob.unlink()
    with pytest.raises(MissingFileError, match="the manifest of stories names it"):
        open_source("ollama:stories")
    manifest = store / "manifests" / NAMES["stories"]
    manifest.write_text("{}")
    with pytest.raises(CorruptFileError, match="the manifest has 0 layers"):
        open_source("ollama:stories")
    manifest.write_text("no JSON")
    with pytest.raises(CorruptFileError, match="no JSON"):
        open_source("ollama:stories")


def test_a_hub_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'quantscope\[hub\]'"):
        open_source("hf:acme/not-installed")
