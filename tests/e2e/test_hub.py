"""Models by name from a hub: a local server with the Hub's API, asked by the real huggingface_hub in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from tests.hf_models import make_hf
from tests.models import STORIES, make_gguf

pytestmark = pytest.mark.long
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """Repositories by name, and how the server behaves."""

    repos: dict[str, dict[str, bytes]]
    url: str = ""
    cut: int | None = None  # byte of a large file at which the connection breaks
    damaged: str | None = None  # a file whose bytes come wrong
    gated: bool = False
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, Range

    def sha256(self, repo: str, name: str) -> str:
        return hashlib.sha256(self.repos[repo][name]).hexdigest()


def large(name: str) -> bool:
    return name.endswith((".gguf", ".safetensors"))


def handler_of(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def log_message(self, *_: object) -> None:
            """Quiet."""

        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append((self.command, path, self.headers.get("Range")))
            parts = path.strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                self.describe("/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main")
            elif "/resolve/" in path:
                self.content("/".join(parts[:2]), "/".join(parts[4:]))
            else:
                self.send_error(404)

        def describe(self, repo: str, revision: str) -> None:
            refusals = {"GatedRepo": hub.gated, "RepoNotFound": repo not in hub.repos, "RevisionNotFound": revision not in ("main", COMMIT)}
            code = next((code for code, refused in refusals.items() if refused), None)
            if code is not None:
                self.send(b"{}", 403 if code == "GatedRepo" else 404, {"X-Error-Code": code, "X-Error-Message": code})
                return
            siblings = []
            for name, data in hub.repos[repo].items():
                entry: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
                if large(name):
                    entry["lfs"] = {"sha256": hub.sha256(repo, name), "size": len(data), "pointerSize": 130}
                siblings.append(entry)
            self.send(json.dumps({"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings}).encode())

        def content(self, repo: str, name: str) -> None:
            data = hub.repos[repo][name]
            etag = hub.sha256(repo, name) if large(name) else hashlib.sha1(data).hexdigest()
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))} if large(name) else {}
            if name == hub.damaged:
                data = data[:-1] + bytes((data[-1] ^ 1,))
            asked, total, status = self.headers.get("Range"), len(data), 200
            if asked:
                start = int(asked.removeprefix("bytes=").split("-")[0])
                data, status = data[start:], 206
                headers["Content-Range"] = f"bytes {start}-{total - 1}/{total}"
            cut = None if hub.cut is None or not large(name) or self.command != "GET" else max(0, hub.cut - (total - len(data)))
            self.send(data, status, headers, cut=cut)

        def send(self, data: bytes, status: int = 200, headers: dict[str, str] | None = None, cut: int | None = None) -> None:
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data if cut is None else data[:cut])
            if cut is not None:
                self.close_connection = True

    return Handler


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    make_hf(tmp_path / "hf")
    folder = {p.name: p.read_bytes() for p in (tmp_path / "hf").iterdir()}
    half = {"original/model.safetensors": b"not this one", "README.md": b"a card"}
    parts = {f"q4/s-{i:05d}-of-00002.gguf": b"" for i in (1, 2)}
    found = Hub(
        {"acme/tiny": folder | half, "acme/files": {"README.md": b"", "s.gguf": STORIES.read_bytes()} | parts, "acme/data": {"x.csv": b"1"}}
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(found))
    found.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield found
    server.shutdown()
    server.server_close()


def inspect(hub: Hub, home: Path, name: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``quantscope inspect NAME --json`` with an empty cache of its own."""
    given = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    for key in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE"):
        given.pop(key, None)
    command = [sys.executable, "-c", "from quantscope.cli.main import run; run()", "inspect", name, "--json"]
    return subprocess.run(command, env=given | environment, capture_output=True, text=True, timeout=300, check=False)


def said(done: subprocess.CompletedProcess[str]) -> str:
    """What a refused command says, on one line."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return " ".join(done.stderr.split())


def fetched(hub: Hub) -> list[str]:
    return [path for method, path, _ in hub.asked if method == "GET" and "/resolve/" in path]


def test_a_folder_and_again_from_the_cache(hub: Hub, tmp_path: Path) -> None:
    done = inspect(hub, tmp_path / "home", "hf:acme/tiny")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["tensors"]) > 15
    assert {path.rpartition("/")[2] for path in fetched(hub)} == {"config.json", "model.safetensors", "generation_config.json", "README.md"}
    assert not any("original" in path for path in fetched(hub))
    hub.asked.clear()
    assert inspect(hub, tmp_path / "home", "hf:acme/tiny@main").stdout == done.stdout
    assert fetched(hub) == []
    hub.url = "http://127.0.0.1:9"  # nothing listens there
    assert inspect(hub, tmp_path / "home", "hf:acme/tiny").stdout == done.stdout
    assert "the hub cannot be reached" in said(inspect(hub, tmp_path / "elsewhere", "hf:acme/tiny"))


def test_one_file(hub: Hub, tmp_path: Path) -> None:
    done = inspect(hub, tmp_path / "home", f"hf:acme/files@{COMMIT}/s.gguf")
    assert done.returncode == 0, done.stderr
    assert [path.rpartition("/")[2] for path in fetched(hub)] == ["s.gguf"]


def test_a_broken_download_goes_on_where_it_stopped(hub: Hub, tmp_path: Path) -> None:
    """The package writes 10 MiB at a time."""
    hub.repos["acme/files"]["s.gguf"] = make_gguf(tmp_path / "s.gguf", n_vocab=50_000, n_embd=128).read_bytes()
    hub.cut = 15 << 20
    text = said(inspect(hub, tmp_path / "home", "hf:acme/files/s.gguf", HF_HUB_DOWNLOAD_TIMEOUT="5"))
    assert "hf:acme/files/s.gguf: the download broke off" in text
    assert "Give the same command again" in text
    hub.cut = None
    hub.asked.clear()
    assert inspect(hub, tmp_path / "home", "hf:acme/files/s.gguf").returncode == 0
    ranges = [asked for method, path, asked in hub.asked if method == "GET" and path.endswith("s.gguf")]
    assert ranges == [f"bytes={10 << 20}-"]


def test_what_comes_damaged_is_not_kept(hub: Hub, tmp_path: Path) -> None:
    hub.damaged = "s.gguf"
    text = said(inspect(hub, tmp_path / "home", "hf:acme/files/s.gguf"))
    assert "CorruptFileError: hf:acme/files/s.gguf: the SHA-256 of what was downloaded is" in text
    assert f"expected {hub.sha256('acme/files', 's.gguf')[:12]}…" in text
    assert not [p for p in (tmp_path / "home").rglob("*") if p.is_file() and p.stat().st_size > 100_000]
    hub.damaged = None
    assert inspect(hub, tmp_path / "home", "hf:acme/files/s.gguf").returncode == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("acme", "expected hf:OWNER/REPO for a folder"),
        ("acme/none", "hf:acme/none: the hub has no such repository, or it is private"),
        ("acme/tiny@v9", "hf:acme/tiny@v9: the repository has no branch, tag or commit 'v9'"),
        ("acme/files", "no config.json, but GGUF files (q4/s-00001-of-00002.gguf, q4/s-00002-of-00002.gguf, s.gguf): give one of them"),
        ("acme/files/t.gguf", "the repository has no file 't.gguf'"),
        ("acme/data", "neither config.json nor a GGUF file, expected a model. It has x.csv"),
    ],
)
def test_what_the_hub_does_not_have(name: str, message: str, hub: Hub, tmp_path: Path) -> None:
    assert message in said(inspect(hub, tmp_path / "home", f"hf:{name}"))


def test_a_gated_model(hub: Hub, tmp_path: Path) -> None:
    hub.gated = True
    assert "the model is gated" in said(inspect(hub, tmp_path / "home", "hf:acme/tiny"))
