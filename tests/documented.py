"""The commands that README and docs show, and the small files that make each of them run.

A command is a line of a fenced block that begins with ``quantscope`` (after ``$`` or not); three spaces or `` # `` end it.  What stands in
backticks inside a sentence is a mention: its command and options must exist.
"""

from __future__ import annotations

import gzip
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

import quantscope
from benchmarks.numpy_engine import run as run_numpy
from benchmarks.planted import Planted
from quantscope.cli.demo import MODEL, TEXT, bundled
from quantscope.cli.main import main
from quantscope.inputs import prompt_ids
from quantscope.trace import Full, Trace
from quantscope.trace_file import save
from tests.hf_models import make_hf

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(__file__).resolve().parent / "data"
PAGES = sorted([*ROOT.glob("README*.md"), ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
IDS = (1, 403, 407, 261, 378)
N_LAYER = 2
TWO_FAULTS = (Planted("rope-theta", ("Qcur", "Kcur"), detail="500000"), Planted("act-relu", ("ffn_swiglu",)))


@dataclass(frozen=True)
class Command:
    """One command line of a page."""

    page: str
    line: int
    text: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)


def commands(program: str = "quantscope") -> list[Command]:
    """Every command of a program in the fenced blocks of all pages."""
    return [c for page in PAGES for c in _fenced(page) if c.words[0] == program]


def python_blocks() -> list[tuple[str, int, str]]:
    """(page, line, code) of every Python block."""
    found = []
    for page in PAGES:
        text = page.read_text("utf-8")
        for m in re.finditer(r"^```python\n(.*?)^```$", text, re.S | re.M):
            found.append((page.relative_to(ROOT).as_posix(), text[: m.start()].count("\n") + 1, m[1]))
    return found


def mentions(program: str = "quantscope") -> list[Command]:
    """Every command in backticks inside a sentence or table."""
    found = []
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", lambda m: "\n" * m.group().count("\n"), page.read_text("utf-8"), flags=re.S | re.M)
        for m in re.finditer(rf"`({program} [^`\n]*)`", text):
            found.append(Command(page.relative_to(ROOT).as_posix(), text[: m.start()].count("\n") + 1, m[1].replace("\\|", "|")))
    return found


def _fenced(page: Path) -> Iterator[Command]:
    inside, plain = False, False
    for number, line in enumerate(page.read_text("utf-8").splitlines(), 1):
        if line.lstrip().startswith("```"):
            inside, plain = not inside, line.strip() in ("```", "```console", "```sh", "```bash")
            continue
        m = re.match(r"^(?:\$ )?((?:quantscope|make|pip|python -m) .*)$", line.strip()) if inside and plain else None
        if m:
            yield Command(page.relative_to(ROOT).as_posix(), number, re.split(r" {3,}|\s+# ", m[1])[0].strip())


# ---- the files -----------------------------------------------------------------------------------------------------------------------


def write_files(folder: Path) -> None:
    """Every file that a documented command reads, under the names of the documents, made from two layers of the demo model."""
    original = folder / "f16.gguf"
    cut_demo(original)
    words = bundled(TEXT).read_text("utf-8")
    (folder / "wiki.txt").write_text(words[:9600], "utf-8")
    (folder / "other.txt").write_text(words[9600:19200], "utf-8")
    for name, preset in {"q4.gguf": "Q4_K_M", "b.Q4_K_M.gguf": "Q4_K_S", "q8.gguf": "Q8_0"}.items():
        run(folder, f"quantize f16.gguf {name} --type {preset}")
    for name in ("MODEL.gguf", "original-f16.gguf", "demo-f16.gguf", "m.gguf"):
        shutil.copy(original, folder / name)
    for name in ("a.Q4_K_M.gguf", "demo-Q4_K_M.gguf"):
        shutil.copy(folder / "q4.gguf", folder / name)
    (folder / "recipe.json").write_text('{"version": 1, "base": "Q4_K_M", "types": {"blk.0.attn_v.weight": "Q6_K"}}', "utf-8")
    make_hf(folder / "hf-folder", vocab_size=4096)
    _logs(folder)
    _traces(folder)
    run(folder, "kld-base f16.gguf --text wiki.txt --ctx 128 -o BASE")
    run(folder, "imatrix f16.gguf --text wiki.txt --ctx 128 -o imatrix.gguf")
    run(folder, "golden MODEL.gguf -o golden-pack")
    run(folder, "study f16.gguf --types Q4_0 --tokens 1,403 --out quantscope-MODEL")
    shutil.copytree(folder / "quantscope-MODEL", folder / "types")


def cut_demo(path: Path, n_layer: int = N_LAYER) -> None:
    """The demo model's first layers, with its vocabulary, as a GGUF file."""
    reader = gguf.GGUFReader(bundled(MODEL))
    writer = gguf.GGUFWriter(path, "llama")
    for f in reader.fields.values():
        if f.name.startswith("GGUF.") or f.name == "general.architecture":
            continue
        value = n_layer if f.name == "llama.block_count" else f.contents()
        writer.add_key_value(f.name, value, f.types[0], f.types[-1] if f.types[0] == gguf.GGUFValueType.ARRAY else None)
    for t in reader.tensors:
        m = re.match(r"blk\.(\d+)\.", t.name)
        if m is None or int(m[1]) < n_layer:
            writer.add_tensor(t.name, t.data, raw_dtype=t.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run(folder: Path, command: str) -> None:
    """Run a quantscope command in the folder."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        if main(shlex.split(command)) != 0:
            raise RuntimeError(f"{command} failed")
    finally:
        os.chdir(before)


def _logs(folder: Path) -> None:
    (folder / "run.log").write_bytes(gzip.decompress((DATA / "eval_callback" / "demo-f16.log.gz").read_bytes()))
    logs = DATA / "rustorch"
    names = {"a": "q4_k_m-hello", "b": "q4_k_m-test", "c": "q6_k", "hello": "q4_k_m-hello", "test": "q4_k_m-test"}
    for name, source in {**names, "q4km": "q4_k_m", "q40": "q4_0", "q6k": "q6_k"}.items():
        shutil.copy(logs / f"{source}.log", folder / f"{name}.log")
    shutil.copy(logs / "seed-tables.md", folder / "TABLE.md")


def _traces(folder: Path) -> None:
    """Traces of the file that the documents run: exact ones, a healthy engine's, and one of an engine with two faults."""
    quantscope.trace(folder / "MODEL.gguf", tokens=IDS, out=folder / "exact.safetensors")
    shutil.copy(folder / "exact.safetensors", folder / "a.safetensors")
    save(run_numpy(folder / "MODEL.gguf", prompt_ids(str(folder / "MODEL.gguf"))), folder / "T.safetensors")
    broken = run_numpy(folder / "m.gguf", IDS, TWO_FAULTS)
    save(broken, folder / "engine.safetensors")
    shutil.copy(folder / "engine.safetensors", folder / "b.safetensors")
    np.savez(folder / "engine.npz", **_values(broken))
    np.savez(folder / "taps.npz", **{f"layers.{i}.out": _values(broken)[f"l_out-{i}"] for i in range(N_LAYER)})
    mine = run_numpy(folder / "q4.gguf", prompt_ids(str(folder / "q4.gguf")), TWO_FAULTS)
    save(mine, folder / "my-engine.safetensors")
    np.savez(folder / "my-engine.npz", **_values(mine))
    quantscope.trace(folder / "q4.gguf", out=folder / "reference.safetensors")
    quantscope.trace(folder / "q4.gguf", "llama.cpp", out=folder / "llama.safetensors")


def _values(trace: Trace) -> dict[str, NDArray[np.float32]]:
    return {tap: full.values.numpy() for tap in trace.taps if (full := trace.find(tap, Full)) is not None}
