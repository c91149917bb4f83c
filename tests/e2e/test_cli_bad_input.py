"""Bad input of every kind, through the command line: one paragraph that names the subject and the way out, exit code 2, nothing written."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

from quantscope.cli.main import main
from tests.models import STORIES, STORIES_PROMPT, make_gguf

IDS = ",".join(map(str, STORIES_PROMPT))
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty working folder, in which nothing may be left behind."""
    folder = tmp_path_factory.mktemp("work")
    monkeypatch.chdir(folder)
    yield
    assert list(folder.iterdir()) == [], "a refused input left files behind"


def refused(capsys: Capture, *arguments: str | Path) -> str:
    """The paragraph on stderr, on one line; checks everything that holds for every refusal."""
    capsys.readouterr()
    code = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert code == 2, err
    assert out == ""
    assert "Traceback" not in err
    lines = err.strip().splitlines()
    assert all(lines), "more than one paragraph"
    assert all(len(line) <= 120 for line in lines if " " in line.strip())
    text = " ".join(lines)
    assert re.match(r"[A-Z][A-Za-z]+Error: ", text)
    assert re.search(r"[.?`)]$", text)
    assert len(text) > 80, "too short to say subject, cause and next step"
    return text


def study(capsys: Capture, model: str | Path, *arguments: str | Path) -> str:
    """A refused study; with ``--json`` it is refused the same way."""
    first = refused(capsys, "study", model, *arguments)
    assert refused(capsys, "study", model, *arguments, "--json") == first
    return first


# ---- Files that are no models -------------------------------------------------------------------------------------------


def header_value(path: Path, offset: int, fmt: str, value: int) -> Path:
    """The file with one number in its header replaced."""
    data = bytearray(path.read_bytes())
    struct.pack_into(fmt, data, offset, value)
    path.write_bytes(data)
    return path


@pytest.fixture
def stories(tmp_path: Path) -> Path:
    """A copy of a good model, to be damaged."""
    return Path(shutil.copy(STORIES, tmp_path / "model.gguf"))


def tensor_info(path: Path, name: str) -> int:
    """Byte offset of a tensor's type in the header; its data offset follows 4 bytes later."""
    data = path.read_bytes()
    wanted = struct.pack("<Q", len(name)) + name.encode()
    assert data.count(wanted) == 1
    at = data.index(wanted) + len(wanted)
    (n_dims,) = struct.unpack_from("<I", data, at)
    return at + 4 + 8 * n_dims


class TestFiles:
    def test_missing(self, capsys: Capture, tmp_path: Path) -> None:
        text = study(capsys, tmp_path / "no" / "such.gguf")
        assert text.startswith("MissingFileError: ")
        assert "such.gguf" in text

    def test_not_a_gguf(self, capsys: Capture, tmp_path: Path) -> None:
        (tmp_path / "readme.gguf").write_text("This is not a model. " * 100)
        assert study(capsys, tmp_path / "readme.gguf").startswith("NotAModelError: ")

    @pytest.mark.parametrize("n", [0, 3])
    def test_empty(self, n: int, capsys: Capture, tmp_path: Path) -> None:
        (tmp_path / "empty.gguf").write_bytes(b"GGUF"[:n])
        assert re.match("(NotAModel|TruncatedFile)Error: ", study(capsys, tmp_path / "empty.gguf"))

    @pytest.mark.parametrize("keep", [10, 1_000, 200_000, 1_054_303])
    def test_truncated(self, keep: int, capsys: Capture, stories: Path) -> None:
        stories.write_bytes(stories.read_bytes()[:keep])
        assert study(capsys, stories, "--tokens", IDS).startswith("TruncatedFileError: ")

    @pytest.mark.parametrize("version", [1, 99])
    def test_wrong_version(self, version: int, capsys: Capture, stories: Path) -> None:
        text = study(capsys, header_value(stories, 4, "<I", version))
        assert text.startswith("UnsupportedVersionError: ")
        assert str(version) in text

    def test_big_endian(self, capsys: Capture, stories: Path) -> None:
        text = study(capsys, header_value(stories, 4, ">I", 3))
        assert text.startswith("UnsupportedVersionError: ")
        assert "big-endian" in text

    def test_tensor_past_the_end(self, capsys: Capture, stories: Path) -> None:
        at = tensor_info(stories, "blk.2.ffn_down.weight")
        text = study(capsys, header_value(stories, at + 4, "<Q", 1 << 30), "--tokens", IDS)
        assert re.match("(TruncatedFile|CorruptFile)Error: ", text)
        assert "blk.2.ffn_down.weight" in text

    def test_unknown_type(self, capsys: Capture, stories: Path) -> None:
        at = tensor_info(stories, "blk.2.ffn_down.weight")
        text = study(capsys, header_value(stories, at, "<I", 77), "--tokens", IDS)
        assert text.startswith("UnsupportedTypeError: ")
        assert "blk.2.ffn_down.weight" in text
        assert "77" in text

    def test_rows_no_block_fits(self, capsys: Capture, stories: Path) -> None:
        """A file whose header claims Q4_K (blocks of 256) for rows of 172 elements."""
        at = tensor_info(stories, "blk.2.ffn_down.weight")
        text = study(capsys, header_value(stories, at, "<I", 12), "--tokens", IDS)
        assert re.match("(Block|CorruptFile)Error: ", text)
        assert "172" in text
        assert "256" in text

    def test_presets_fall_back_where_no_block_fits(self, capsys: Capture, tmp_path: Path) -> None:
        """Not refused: rows of 64 and 96 take the type that the presets name for such rows."""
        model = make_gguf(tmp_path / "m.gguf")
        code = main(["study", str(model), "--tokens", "1,5", "--types", "Q4_K_M", "--out", str(tmp_path / "out")])
        assert code == 0, capsys.readouterr().err
        types = {v["name"]: v["types"] for v in json.loads((tmp_path / "out" / "study.json").read_text("utf-8"))["variants"]}
        assert types["Q4_K_M"]["blk.0.attn_q.weight"] == "Q5_0"

    def test_unsupported_architecture(self, capsys: Capture, tmp_path: Path) -> None:
        model = make_gguf(tmp_path / "m.gguf", metadata={"general.architecture": "mamba9"})
        text = study(capsys, model)
        assert text.startswith("UnsupportedArchitectureError: ")
        assert all(name in text for name in ("mamba9", "llama", "qwen2", "qwen3"))

    def test_folder_without_config(self, capsys: Capture, tmp_path: Path) -> None:
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
        text = study(capsys, tmp_path / "model")
        assert text.startswith("MissingFileError: ")
        assert "config.json" in text

    def test_folder_of_ggufs(self, capsys: Capture, stories: Path) -> None:
        assert "model.gguf" in study(capsys, stories.parent)

    def test_folder_with_broken_config(self, capsys: Capture, tmp_path: Path) -> None:
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_text("{ not json")
        assert "config.json" in study(capsys, tmp_path / "model")

    def test_folder_of_an_unsupported_architecture(self, capsys: Capture, tmp_path: Path) -> None:
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_text('{"architectures": ["BertModel"], "model_type": "bert"}')
        text = study(capsys, tmp_path / "model")
        assert re.match("(UnsupportedArchitecture|MissingFile)Error: ", text)


class TestWeights:
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("name", ["blk.1.ffn_up.weight", "blk.0.attn_norm.weight", "token_embd.weight", "output.weight"])
    def test_not_finite(self, name: str, value: float, capsys: Capture, tmp_path: Path) -> None:
        shape = {"blk.1.ffn_up.weight": (96, 64), "blk.0.attn_norm.weight": (64,)}.get(name, (288, 64))
        weight = np.full(shape, 0.01, np.float32)
        weight.flat[min(5 * 64 + 17, weight.size - 1)] = value  # of token 5, where the rows are tokens
        text = study(capsys, make_gguf(tmp_path / "m.gguf", edit={name: weight}), "--tokens", "1,5,9", "--types", "Q8_0")
        assert text.startswith("NonFiniteError: ")
        assert name in text

    def test_missing_tensor(self, capsys: Capture, tmp_path: Path) -> None:
        text = study(capsys, make_gguf(tmp_path / "m.gguf", edit={"blk.1.ffn_up.weight": None}), "--tokens", "1,5")
        assert text.startswith("MissingTensorError: ")
        assert "blk.1.ffn_up.weight" in text

    def test_wrong_shape(self, capsys: Capture, tmp_path: Path) -> None:
        model = make_gguf(tmp_path / "m.gguf", edit={"blk.1.ffn_up.weight": np.zeros((64, 96), np.float32)})
        text = study(capsys, model, "--tokens", "1,5")
        assert text.startswith("ShapeError: ")
        assert "blk.1.ffn_up.weight" in text

    def test_different_models(self, capsys: Capture, tmp_path: Path) -> None:
        text = study(capsys, STORIES, make_gguf(tmp_path / "m.gguf"), "--tokens", "1,5")
        assert text.startswith("ShapeError: ")


class TestPrompts:
    @pytest.mark.parametrize("prompt", ["--prompt", "--tokens"])
    def test_empty(self, prompt: str, capsys: Capture) -> None:
        assert study(capsys, STORIES, prompt, "").startswith("PromptError: ")

    @pytest.mark.parametrize("i", [512, 999_999, 1 << 40])
    def test_token_id_past_the_vocabulary(self, i: int, capsys: Capture) -> None:
        text = study(capsys, STORIES, "--tokens", f"1,{i}")
        assert text.startswith("PromptError: ")
        assert f"{i:,}" in text or str(i) in text
        assert "512" in text or "511" in text

    def test_longer_than_the_context(self, capsys: Capture) -> None:
        text = study(capsys, STORIES, "--tokens", ",".join(["5"] * 513))
        assert text.startswith("PromptError: ")
        assert "513" in text
        assert "512" in text
        assert study(capsys, STORIES, "--prompt", "a cat sat " * 200).startswith("PromptError: ")

    def test_text_without_a_vocabulary(self, capsys: Capture, tmp_path: Path) -> None:
        model = make_gguf(tmp_path / "m.gguf")
        key = b"tokenizer.ggml.model" + struct.pack("<IQ", 8, 5)  # a string of 5 bytes follows
        assert model.read_bytes().count(key + b"llama") == 1
        model.write_bytes(model.read_bytes().replace(key + b"llama", key + b"klngn"))
        assert "klngn" in study(capsys, model, "--prompt", "Hello")
        assert main(["study", str(model), "--tokens", "1,5", "--types", "Q8_0", "--out", str(tmp_path / "out")]) == 0


class TestTexts:
    def test_missing(self, capsys: Capture, tmp_path: Path) -> None:
        assert study(capsys, STORIES, "--text", tmp_path / "no.txt").startswith("MissingFileError: ")

    def test_a_folder(self, capsys: Capture, tmp_path: Path) -> None:
        assert study(capsys, STORIES, "--text", tmp_path).startswith("MissingFileError: ")

    def test_not_utf8(self, capsys: Capture, tmp_path: Path) -> None:
        (tmp_path / "t.txt").write_bytes("déjà vu".encode("latin1"))
        assert "UTF-8" in study(capsys, STORIES, "--text", tmp_path / "t.txt")

    def test_too_short(self, capsys: Capture, tmp_path: Path) -> None:
        (tmp_path / "t.txt").write_text("Once upon a time.")
        assert study(capsys, STORIES, "--text", tmp_path / "t.txt").startswith("PromptError: ")

    def test_chunks_longer_than_the_context(self, capsys: Capture, tmp_path: Path) -> None:
        (tmp_path / "t.txt").write_text("Once upon a time. " * 2000)
        text = study(capsys, STORIES, "--text", tmp_path / "t.txt", "--ctx", "1024")
        assert text.startswith("UsageError: ")
        assert "512" in text


class TestOptions:
    def test_unknown_type_names_the_known_ones(self, capsys: Capture) -> None:
        text = study(capsys, STORIES, "--tokens", "1", "--types", "Q4_K_M,Q9_Z")
        assert "Q9_Z" in text
        assert "Q8_0" in text

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (["--kv", "q4_k"], "expected one of f32, f16, bf16, q8_0"),
            (["--kv", ","], "--kv ',' names no type"),
            (["--kv", "q8_0"], "Q8_0 has blocks of 32, and the heads of this model have 8 channels"),
            (["--kv", "q8_0", "--engine", "llama.cpp"], "--engine runs files with the engine's own cache"),
            (["--text", "-", "--ray", "local"], "cannot read this one's standard input"),
        ],
    )
    def test_a_cache_or_a_text_that_cannot_be(self, options: list[str], said: str, capsys: Capture) -> None:
        assert said in study(capsys, STORIES, *options)

    def test_output_folder_is_a_file(self, capsys: Capture, tmp_path: Path) -> None:
        (tmp_path / "taken").touch()
        assert "is a file" in study(capsys, STORIES, "--tokens", IDS, "--out", tmp_path / "taken")

    @pytest.mark.skipif("__import__('torch').cuda.is_available()")
    def test_no_cuda(self, capsys: Capture) -> None:
        assert "--device cpu" in study(capsys, STORIES, "--tokens", IDS, "--device", "cuda")


class TestInspect:
    def test_missing_and_foreign_files(self, capsys: Capture, tmp_path: Path) -> None:
        assert refused(capsys, "inspect", tmp_path / "no.gguf").startswith("MissingFileError: ")
        (tmp_path / "t.gguf").write_text("hello " * 100)
        assert refused(capsys, "inspect", tmp_path / "t.gguf").startswith("NotAModelError: ")

    def test_truncated_files_are_listed_as_far_as_they_go(self, capsys: Capture, stories: Path) -> None:
        stories.write_bytes(stories.read_bytes()[:500_000])
        assert main(["inspect", str(stories)]) == 0
        out = capsys.readouterr().out
        assert "ends too early" in out
        assert main(["inspect", str(stories), "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)["tensors"]
        assert {row["intact"] for row in rows} == {True, False}
        assert len(rows) == len(gguf.GGUFReader(STORIES).tensors)


def test_as_a_program(tmp_path: Path) -> None:
    """The same through the installed console script: exit code, streams, no traceback, nothing written."""
    (tmp_path / "x.gguf").write_text("no model " * 10)
    command = [sys.executable, "-c", "from quantscope.cli.main import run; run()", "study", "x.gguf"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("NotAModelError: x.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]
