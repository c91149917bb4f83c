"""llama.cpp's own programs, built from the source archive of the pinned llama-cpp-python.

    llama_program("llama-quantize")      the path of the program, built on first use

``QUANTSCOPE_LLAMA_CPP_BIN`` names a folder that has them; else they are built in ``build/llama-programs``, from the source tree that
``QUANTSCOPE_LLAMA_CPP_SOURCE`` names or from the archive (75 MB, fetched with pip).  It takes some minutes, once.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from tests.oracle import source_tree

ENV_BIN = "QUANTSCOPE_LLAMA_CPP_BIN"
PROGRAMS = ("llama-quantize", "llama-perplexity", "llama-bench", "llama-imatrix")
BUILD = source_tree.ROOT / "build" / "llama-programs"
OPTIONS = ("-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_SERVER=OFF")
ARCH_TEST = "test-llama-archs"  # makes a random model of every architecture that llama.cpp has
ENV_ARCH_TEST = "QUANTSCOPE_LLAMA_ARCHS"  # the path of that program, where it is built already
TEST_OPTIONS = ("-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_TESTS=ON", "-DLLAMA_BUILD_SERVER=OFF")


def llama_program(name: str) -> str:
    return str(program_folder() / name)


def arch_models(folder: Path, seed: int) -> Path:
    """Have ``test-llama-archs`` write its models into a folder: <architecture>-dense.gguf, <architecture>-moe.gguf, 7 MB each."""
    folder.mkdir(exist_ok=True)
    subprocess.run([arch_test(), "-s", str(seed), "-v", "0", "-o", str(folder)], capture_output=True, check=True)
    return folder


@cache
def arch_test() -> str:
    """The path of ``test-llama-archs``, built on first use in a folder of its own."""
    given = os.environ.get(ENV_ARCH_TEST)
    if given:
        return given
    key, source = _source()
    folder = BUILD / f"{key}-tests"
    if not (folder / "bin" / ARCH_TEST).is_file():
        _build(source(), folder, TEST_OPTIONS, (ARCH_TEST,))
    return str(folder / "bin" / ARCH_TEST)


def _source() -> tuple[str, Callable[[], Path]]:
    """(what names the source tree's builds, where it is)."""
    given = os.environ.get(source_tree.ENV)
    if given:
        return "of-" + hashlib.sha256(given.encode()).hexdigest()[:8], lambda: Path(given)
    version = source_tree._pinned_version()
    return version, lambda: _whole_tree(version)


@cache
def program_folder() -> Path:
    """The folder of the PROGRAMS; builds them when they are nowhere.  RuntimeError when that fails."""
    given = os.environ.get(ENV_BIN)
    if given:
        folder = Path(given)
        if missing := _missing(folder):
            raise RuntimeError(f"{ENV_BIN}={given} holds no {', '.join(missing)}; it must be the bin folder of a llama.cpp build")
        return folder
    key, source = _source()
    folder = BUILD / key / "bin"
    if _missing(folder):
        _build(source(), folder.parent, OPTIONS, PROGRAMS)
    return folder


def version() -> str:
    """What llama.cpp calls itself."""
    done = subprocess.run([llama_program("llama-perplexity"), "--version"], capture_output=True, text=True, check=True)
    return (done.stdout + done.stderr).strip().splitlines()[0].removeprefix("version: ")


def _missing(folder: Path) -> list[str]:
    return [name for name in PROGRAMS if not (folder / name).is_file()]


def _build(source: Path, target: Path, options: Sequence[str], programs: Sequence[str]) -> None:
    """An interrupted build is taken up again: the linker writes a program at the very end."""
    print(f"Building {', '.join(programs)} in {target}; this takes some minutes.", file=sys.stderr)
    jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(len(os.sched_getaffinity(0)))
    for command in (
        [_cmake(), "-S", str(source), "-B", str(target), *options],
        [_cmake(), "--build", str(target), "--parallel", jobs, "--target", *programs],
    ):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode:
            raise RuntimeError(
                f"llama.cpp could not be built (exit code {done.returncode}): {' '.join(command)}\n{done.stdout[-4000:]}\n"
                f"Install a C++ compiler and make, or set {ENV_BIN} to a folder that has {', '.join(PROGRAMS)}."
            )


@cache
def _cmake() -> str:
    """cmake on the PATH, else the one of the Python package, put beside the build."""
    found = shutil.which("cmake")
    if found:
        return found
    folder = BUILD / "cmake"
    program = folder / "cmake" / "data" / "bin" / "cmake"
    if not program.is_file():
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder), "cmake"], check=True)
    return str(program)


def _whole_tree(version: str) -> Path:
    """``vendor/llama.cpp`` of the source archive, unpacked beside the build; the oracle tests keep parts of it only."""
    tree = BUILD / version / "source"
    if not tree.is_dir():
        tree.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".source-", dir=tree.parent) as scratch:
            with tarfile.open(source_tree._download(version, Path(scratch))) as tar:
                for member in tar:
                    inside = member.name.partition("/")[2]  # of the archive's root; there is a .git/modules/vendor/llama.cpp, too
                    if inside.startswith("vendor/llama.cpp/"):
                        member.name = inside.removeprefix("vendor/llama.cpp/")
                        tar.extract(member, Path(scratch) / "tree", filter="data")
            (Path(scratch) / "tree").rename(tree)
    return tree


def main() -> None:
    print(program_folder())


if __name__ == "__main__":
    main()
