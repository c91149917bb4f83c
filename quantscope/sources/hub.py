"""Models by name from a Hugging Face hub: ``hf:OWNER/REPO``, ``hf:OWNER/REPO/FILE.gguf``, either with ``@REVISION`` after REPO.

The `huggingface_hub` package does the transfer, with its cache (``HF_HOME``), its token and its endpoint (``HF_ENDPOINT``).  What it does
not do is done here, for the large files: a download that broke off goes on where it stopped, also in another process, and the content is
compared with the SHA-256 that the hub publishes before it goes into the cache.
"""

from __future__ import annotations

import re
import sys
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from quantscope.errors import CorruptFileError, MissingExtraError, MissingFileError, ModelFileError, UsageError
from quantscope.sources.files import map_file, sha256_of
from quantscope.sources.split import part_names
from quantscope.wording import some

PREFIX = "hf:"
_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^/]+))?(/(?P<file>.+))?")
_FOLDER = ("config.json", "quantize_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*", "added_tokens.json")
_FOLDER_TOO = ("generation_config.json", "special_tokens_map.json", "vocab.json", "merges.txt", "README.md")
_NAMED = 5  # files of a repository that an error lists


class Large(NamedTuple):
    """What the hub publishes of a large file's content."""

    sha256: str
    size: int  # [bytes]


class Repo(NamedTuple):
    """A repository at one commit."""

    name: str
    revision: str  # as asked for
    commit: str
    files: dict[str, Large | None]  # by name; None for small ones


@cache
def fetched(name: str) -> Path:
    """The file or folder of ``OWNER/REPO[@REVISION][/FILE]`` in the local cache, downloaded where it is not there yet.

    Raises MissingExtraError without the package, UsageError for what is no such name, MissingFileError and ModelFileError when the hub does
    not have it, does not give it or is not reached, CorruptFileError when what came is not what the hub says it has.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise UsageError(
            f"{PREFIX}{name}: expected {PREFIX}OWNER/REPO for a folder with safetensors, or {PREFIX}OWNER/REPO/FILE.gguf, as in "
            f"{PREFIX}ggml-org/models/tinyllamas/stories260K.gguf."
        )
    hub = _package()
    repo, revision, file = match["repo"], match["revision"], match["file"]
    found = _listed(hub, repo, revision)
    if file is not None:
        wanted = part_names(file) or [file]
    elif "config.json" in found.files:
        wanted = [f for f in found.files if "/" not in f and any(fnmatch(f, p) for p in (*_FOLDER, *_FOLDER_TOO))]
    else:
        raise _no_model(found)
    missing = [f for f in wanted if f not in found.files]
    if missing:
        raise MissingFileError(
            f"{PREFIX}{repo}: the repository has no file {missing[0]!r} at {found.commit[:12]}. It has "
            f"{some(_models(found) or list(found.files), _NAMED)}: give one of these."
        )
    paths = [_file(hub, found, f, found.commit if i else found.revision) for i, f in enumerate(wanted)]
    return paths[0] if file is not None else next(p for p, f in zip(paths, wanted, strict=True) if f == "config.json").parent


def _package() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
        import huggingface_hub.file_download
        import huggingface_hub.utils
    except ImportError:
        raise MissingExtraError(
            f"{PREFIX} names need the package huggingface_hub, which is not installed: run `pip install 'quantscope[hub]'`."
        ) from None
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    return huggingface_hub


def _listed(hub: Any, repo: str, revision: str | None) -> Repo:
    """What the repository has; from the cache when the hub cannot be reached."""
    try:
        info = hub.HfApi().model_info(repo, revision=revision, files_metadata=True)
        files = {s.rfilename: Large(s.lfs.sha256, s.lfs.size) if s.lfs else None for s in info.siblings}
        return Repo(repo, revision or "main", info.sha, files)
    except hub.errors.HfHubHTTPError as error:
        raise _refused(hub, repo, revision, error) from None
    except (OSError, RuntimeError) as error:  # no network, or told to do without it
        return _cached(hub, repo, revision, error)
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("httpx", "httpx2", "httpcore", "httpcore2", "requests"):
            raise
        return _cached(hub, repo, revision, error)


def _cached(hub: Any, repo: str, revision: str | None, why: Exception) -> Repo:
    """The repository as far as it was fetched before."""
    try:
        folder = Path(hub.snapshot_download(repo, revision=revision, local_files_only=True))
    except Exception:
        raise ModelFileError(
            f"{PREFIX}{repo}: the hub cannot be reached ({_words(why)}), and nothing of this "
            f"repository was fetched before. Check the connection and HF_ENDPOINT, or give a file on disk."
        ) from None
    return Repo(repo, folder.name, folder.name, {str(p.relative_to(folder)): None for p in folder.rglob("*") if p.is_file()})


def _words(error: Exception) -> str:
    """What an error says, on one line and not too long; what it is where it says nothing."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _refused(hub: Any, repo: str, revision: str | None, error: Exception) -> ModelFileError:
    """What the hub's answer means."""
    where = f"{PREFIX}{repo}" + (f"@{revision}" if revision else "")
    e = hub.errors
    if isinstance(error, e.GatedRepoError):
        return ModelFileError(
            f"{where}: the model is gated, and the hub does not give it to you. Accept its terms on its page, make a token, and log in "
            f"with `hf auth login` or HF_TOKEN."
        )
    if isinstance(error, e.RevisionNotFoundError):
        return MissingFileError(f"{where}: the repository has no branch, tag or commit {revision!r}. Leave out @{revision} for the newest.")
    if isinstance(error, e.RepositoryNotFoundError):
        return MissingFileError(
            f"{where}: the hub has no such repository, or it is private and you are not logged in. Check the spelling on its page, or "
            f"log in with `hf auth login`."
        )
    return ModelFileError(f"{where}: the hub answers {_words(error)}. Try again later, or give a file on disk.")


def _models(repo: Repo) -> list[str]:
    return sorted(f for f in repo.files if f.endswith(".gguf"))


def _no_model(repo: Repo) -> MissingFileError:
    found = _models(repo)
    if found:
        return MissingFileError(
            f"{PREFIX}{repo.name}: no config.json, but GGUF files ({some(found, _NAMED)}): give one of them, e.g. "
            f"`{PREFIX}{repo.name}/{found[0]}`."
        )
    return MissingFileError(
        f"{PREFIX}{repo.name}: neither config.json nor a GGUF file, expected a model. It has {some(list(repo.files), _NAMED)}: it is a "
        f"data set, an adapter, or a model of another kind."
    )


def _file(hub: Any, repo: Repo, file: str, revision: str) -> Path:
    """One file in the cache.  revision: a branch is asked for its commit again, and remembered for when the hub cannot be reached."""
    large = repo.files[file]
    try:
        if large is not None:
            _fill_cache(hub, repo, file, large)
        return Path(hub.hf_hub_download(repo.name, file, revision=revision))
    except CorruptFileError:
        raise
    except Exception as error:
        raise ModelFileError(
            f"{PREFIX}{repo.name}/{file}: the download broke off ({_words(error)}). Give the "
            f"same command again: large files go on where they stopped."
        ) from None


def _fill_cache(hub: Any, repo: Repo, file: str, large: Large) -> None:
    """Put the content where the cache keeps it: under its SHA-256, which is the ETag of a large file.

    What is not complete yet stays beside it for the next time.  CorruptFileError when the content is another one.
    """
    folder = Path(hub.constants.HF_HUB_CACHE) / hub.file_download.repo_folder_name(repo_id=repo.name, repo_type="model") / "blobs"
    target, partial = folder / large.sha256, folder / f"{large.sha256}.quantscope-part"
    if target.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    url, headers = hub.hf_hub_url(repo.name, file, revision=repo.commit), hub.utils.build_hf_headers()
    with hub.utils.WeakFileLock(folder / f"{large.sha256}.quantscope-lock"), partial.open("ab") as out:
        there = out.tell()
        hub.file_download.http_get(url, out, resume_size=there, headers=headers, expected_size=large.size, displayed_filename=file)
    found = sha256_of(map_file(partial))
    if found != large.sha256:
        partial.unlink()
        raise CorruptFileError(
            f"{PREFIX}{repo.name}/{file}: the SHA-256 of what was downloaded is {found[:12]}…, expected {large.sha256[:12]}… as the hub "
            f"publishes. It was damaged on the way and is deleted again: give the same command once more."
        )
    partial.replace(target)
