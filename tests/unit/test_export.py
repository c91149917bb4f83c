"""Writing a model file: recipes, what is kept, corrections, streaming, and every way in which it must not go wrong."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tracemalloc
from collections import namedtuple
from pathlib import Path

import gguf as gguf_package
import numpy as np
import pytest

from quantscope.errors import (
    BlockError,
    MissingTensorError,
    NonFiniteError,
    ShapeError,
    UnsupportedTypeError,
    UsageError,
)
from quantscope.qtypes import QTYPES
from quantscope.recipes import parse_override
from quantscope.remedy import export as export_module
from quantscope.remedy.export import export
from quantscope.remedy.gguf_file import stored_pairs
from quantscope.remedy.original import GgufOriginal, original
from quantscope.remedy.recipe_file import Recipe, read_recipe
from quantscope.remedy.types import choose_types
from quantscope.sources.gguf import open_gguf
from quantscope.sources.resolve import open_source
from tests.models import STORIES, make_gguf
from tests.unit.gguf_bytes import BOOL, F32, F64, FORMATS, STRING, U8, U16, U32, Info, array, gguf, kv

Q8_0 = 7  # general.file_type
NORM, MATRIX = "blk.0.attn_norm.weight", "blk.1.ffn_down.weight"


@pytest.fixture
def model(tmp_path: Path) -> GgufOriginal:
    (tmp_path / "in").mkdir()
    return GgufOriginal(open_gguf(make_gguf(tmp_path / "in" / "m.gguf", seed=2)))


def types_of(model: GgufOriginal, preset: str = "Q8_0"):
    return choose_types(model, Recipe(preset)).types


# ---------------------------------------------------------------- metadata


def test_every_kind_of_metadata_is_kept_as_it_is(tmp_path: Path) -> None:
    values = {kind: (kind != BOOL and 3) or True for kind in FORMATS}
    pairs = [kv(f"k.{kind}", kind, value) for kind, value in values.items()]
    pairs += [array(f"a.{kind}", kind, [value, value]) for kind, value in values.items()]
    pairs += [kv("s", STRING, "ÿ\u0001"), kv("bytes", STRING, b"\xff\xfe"), kv("none", STRING, ""), kv(b"\xff", U8, 1)]
    pairs += [array("strings", STRING, ["x", "", "ÿ"]), array("no strings", STRING, []), array("no numbers", F32, [])]
    pairs += [kv("f", F64, 0.1), kv("general.file_type", U32, 0), kv("split.count", U16, 1)]
    source = tmp_path / "m.gguf"
    source.write_bytes(gguf(pairs, [Info("a", (32,))], bytes(128), version=2))
    out = export(GgufOriginal(open_gguf(source)), tmp_path / "out.gguf", {}, Q8_0).path
    written = out.read_bytes()
    assert written.startswith(b"GGUF\x03\0\0\0")
    for pair in pairs[:-2]:
        assert written.count(pair) == 1, pair
    assert b"split.count" not in written
    assert kv("general.file_type", U32, 7) in written
    assert kv("general.quantization_version", U32, 2) in written
    opened = open_gguf(out)
    assert opened.metadata["quantscope.source"] == "m.gguf"
    assert opened.metadata["quantscope.source_sha256"] == open_gguf(source).sha256()
    assert list(stored_pairs(opened)) == list(opened.metadata)


def test_the_alignment_of_the_source_is_kept(tmp_path: Path) -> None:
    rows = np.arange(96, dtype=np.float32)
    source = tmp_path / "m.gguf"
    infos = [Info("blk.1.a", (32,)), Info("b", (32,), offset=256), Info("blk.0.c", (32,), offset=512)]
    data = b"".join(part.tobytes().ljust(256, b"\0") for part in rows.reshape(3, 32))
    source.write_bytes(gguf([kv("general.alignment", U32, 256)], infos, data, alignment=256))
    out = open_gguf(export(GgufOriginal(open_gguf(source)), tmp_path / "out.gguf", {}, 0).path)
    assert list(out.tensors) == ["b", "blk.0.c", "blk.1.a"]  # llama.cpp's order
    assert [offset % 256 for offset in out.offsets.values()] == [0, 0, 0]
    assert out.raw("blk.0.c").view(np.float32).tolist() == rows[64:].tolist()
    assert out.file_bytes % 256 == 0


# ---------------------------------------------------------------- recipes and types


def test_a_recipe_names_tensors_and_patterns(model: GgufOriginal, tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    entries = {"output.weight": "q5_0", r"blk\.1\.": "Q4_0", "attn_output": "Q5_1", NORM: "Q4_1"}
    path.write_text(json.dumps({"version": 1, "base": "q8_0", "types": entries, "predicted_kl": 0.01}))
    choice = choose_types(model, read_recipe(path))
    assert choice.file_type == Q8_0
    assert choice.notes == ()
    t = {name: str(t) for name, t in choice.types.items()}
    assert t["output.weight"] == "Q5_0"  # and not the attn_output.weight of each layer
    assert t["blk.0.attn_output.weight"] == "Q5_1"
    assert t["blk.1.attn_output.weight"] == "Q4_0"  # the first entry that matches
    assert t["token_embd.weight"] == t["blk.0.ffn_up.weight"] == "Q8_0"
    assert t[NORM] == t["blk.1.ffn_norm.weight"] == "F32"


def test_the_type_file_of_llama_quantize(model: GgufOriginal, tmp_path: Path) -> None:
    path = tmp_path / "types.txt"
    path.write_text("output.weight=q5_0\n\nFFN_.*=q4_1 attn_v=f16\n")
    types = choose_types(model, Recipe("Q8_0", read_recipe(path).types, exact=False)).types
    assert str(types["output.weight"]) == str(types["blk.0.attn_output.weight"]) == "Q5_0"  # a pattern, whatever it looks like
    assert str(types["blk.1.ffn_up.weight"]) == "Q4_1"
    assert str(types["blk.1.attn_v.weight"]) == "F16"


@pytest.mark.parametrize(("t", "file_type"), [("Q4_0", 2), ("F16", 1), ("BF16", 32)])
def test_a_recipe_without_base_names_every_matrix(model: GgufOriginal, t: str, file_type: int) -> None:
    whole = Recipe(None, (("output.weight", QTYPES["Q8_0"]), ("token_embd|_q|_k|_v|attn_output|ffn", QTYPES[t])))
    choice = choose_types(model, whole)
    assert choice.file_type == file_type
    assert str(choice.types["blk.0.attn_q.weight"]) == t
    assert str(choice.types["output.weight"]) == "Q8_0"
    with pytest.raises(UsageError, match=r"names 14 of 16 matrices and has no base, .*token_embd\.weight.*--type Q4_K_M"):
        choose_types(model, Recipe(None, ((r"blk\.", QTYPES["Q8_0"]),)))


def test_options_come_before_the_recipe(model: GgufOriginal) -> None:
    recipe = Recipe("Q8_0", (("attn_v", QTYPES["Q4_0"]),))
    types = choose_types(model, recipe, [parse_override(r"1\.attn_v=Q5_0")]).types
    assert [str(types[f"blk.{i}.attn_v.weight"]) for i in range(2)] == ["Q4_0", "Q5_0"]


def test_a_recipe_that_names_every_tensor_of_a_large_model_is_quick() -> None:
    names = [f"blk.{i}.attn_v.weight" for i in range(2000)]
    types = tuple((name, QTYPES["Q4_K" if i % 2000 < 1000 else "Q6_K"]) for i, name in enumerate(names))
    first, second = Recipe("Q4_K_M", types).overrides(set(names))
    assert first.matches("blk.7.attn_v.weight")
    assert not first.matches("blk.1007.attn_v.weight")
    assert second.matches("blk.1007.attn_v.weight")


def test_what_is_said_beforehand(tmp_path: Path) -> None:
    q8 = GgufOriginal(open_gguf(make_gguf(tmp_path / "q8.gguf", dtype="Q8_0")))
    (note,) = choose_types(q8, Recipe("Q4_0")).notes
    assert "Requantizing: 15 tensors" in note  # the head keeps 8 bits
    assert "Q8_0 already" in note
    assert choose_types(q8, Recipe("Q8_0")).notes == ()
    (_, rows, misspelt) = choose_types(q8, Recipe("Q4_K_M", (("atn_v", QTYPES["Q8_0"]),))).notes
    assert "rows of 16 tensors cannot be filled" in rows
    assert "'atn_v'" in misspelt


def test_types_that_cannot_be_written_or_read(model: GgufOriginal, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedTypeError, match=r"to become IQ4_NL, expected one of F32.*with llama-quantize"):
        choose_types(model, Recipe("IQ4_NL"))
    with pytest.raises(UsageError, match="Q2_K_S without an importance matrix"):
        choose_types(model, Recipe("Q2_K_S"))
    source = tmp_path / "i32.gguf"
    source.write_bytes(gguf([], [Info("a.weight", (32, 2), kind=26)], bytes(256)))
    with pytest.raises(UnsupportedTypeError, match=r"'a\.weight' has the type I32, which holds no weights"):
        choose_types(GgufOriginal(open_gguf(source)), Recipe("Q8_0"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "it is empty"),
        ("{", "no JSON"),
        ('{"types": {}}', '"version" is None, expected 1'),
        ('{"version": 2, "types": {}}', '"version" is 2'),
        ('{"version": 1, "types": []}', '"types" is no object'),
        ('{"version": 1, "types": {"a": 3}}', '"types" is no object'),
        ('{"version": 1, "types": {"a": "Q9"}}', "unknown tensor type 'Q9'"),
        ('{"version": 1, "types": {"(": "Q8_0"}}', "no regular expression"),
        ('{"version": 1, "types": {"a": "F16", "a": "Q8_0"}}', "'a' occurs twice"),
        ('{"version": 1, "base": "Q9", "types": {}}', "unknown quantization 'Q9'"),
        ('{"version": 1, "base": 9, "types": {}}', '"base" is 9'),
        ("attn_v", "expected regex=type"),
        ("attn_v=Q9", "unknown tensor type"),
    ],
)
def test_recipes_that_cannot_be_used(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe"
    path.write_text(text)
    with pytest.raises(UsageError) as e:
        read_recipe(path)
    assert words in str(e.value)
    assert str(e.value).startswith(f"--recipe {path}")


def test_recipe_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_recipe(tmp_path / "no.json")
    (tmp_path / "binary").write_bytes(b"GGUF\xff")
    with pytest.raises(UsageError, match="no UTF-8"):
        read_recipe(tmp_path / "binary")


# ---------------------------------------------------------------- tensors


def test_bands_change_nothing(model: GgufOriginal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = export(model, tmp_path / "whole.gguf", types_of(model, "Q4_0"), 2).path
    monkeypatch.setattr(export_module, "BAND_BYTES", 5 * 64 * 4)  # five rows of 64
    assert export(model, tmp_path / "bands.gguf", types_of(model, "Q4_0"), 2).path.read_bytes() == whole.read_bytes()


def test_progress_counts_every_weight(model: GgufOriginal, tmp_path: Path) -> None:
    seen: list[tuple[int, str]] = []
    export(model, tmp_path / "m.gguf", types_of(model), Q8_0, step=lambda done, what: seen.append((done, what)))
    assert seen[-1][0] == sum(t.n_elements for t in model.tensors.values())
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[0] == (0, "1/21 output.weight")


def test_corrections_are_written_in_place_of_the_source(model: GgufOriginal, tmp_path: Path) -> None:
    rng, types = np.random.default_rng(1), types_of(model)
    shape = model.tensors["blk.0.ffn_up.weight"].shape
    values = (rng.integers(-127, 128, (*shape[:-1], shape[-1] // 32, 32))).astype(np.float32)
    values[..., 0] = 127
    given = {
        "replacements": {MATRIX: np.arange(64 * 96 // 32 * 34, dtype=np.uint32).astype(np.uint8)},
        "floats": {"blk.0.ffn_up.weight": values.reshape(shape), NORM: np.full(64, 2, np.float32)},
        "extra": {"blk.1.attn_q.bias": np.arange(64, dtype=np.float32)},
    }
    plain = open_gguf(export(model, tmp_path / "plain.gguf", types, Q8_0).path)
    written = export(model, tmp_path / "m.gguf", types, Q8_0, **given, metadata={"quantscope.corrections": "bias"})
    out = open_gguf(written.path)
    assert written.n_bytes == out.file_bytes
    assert out.metadata["quantscope.corrections"] == "bias"
    assert out.raw(MATRIX).tobytes() == given["replacements"][MATRIX].tobytes()
    decoded = gguf_package.quants.dequantize(out.raw("blk.0.ffn_up.weight").reshape(96, -1), gguf_package.GGMLQuantizationType.Q8_0)
    assert np.array_equal(decoded, given["floats"]["blk.0.ffn_up.weight"])
    assert out.raw(NORM).view(np.float32).tolist() == [2] * 64
    assert out.raw("blk.1.attn_q.bias").view(np.float32).tolist() == list(range(64))
    names = list(out.tensors)
    assert names.index("blk.1.attn_q.bias") == names.index("blk.1.attn_q.weight") - 1
    others = [n for n in plain.tensors if n not in (MATRIX, "blk.0.ffn_up.weight", NORM)]
    assert [n for n in others if plain.raw(n).tobytes() != out.raw(n).tobytes()] == []


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"floats": {"blk.0.attn_q.bias": np.zeros(64, np.float32)}}, MissingTensorError, "no tensor 'blk.0.attn_q.bias'"),
        ({"replacements": {"blk.7.ffn_up.weight": b""}}, MissingTensorError, "no tensor"),
        ({"replacements": {MATRIX: bytes(10)}}, ShapeError, r"10 bytes, expected 6,528 for Q8_0 \[64, 96\]"),
        ({"floats": {NORM: np.zeros(63, np.float32)}}, ShapeError, r"shape \[63\], expected \[64\]"),
        ({"floats": {NORM: np.full(64, np.nan, np.float32)}}, NonFiniteError, f"'{NORM}' holds nan in row 0, column 0"),
        ({"extra": {NORM: np.zeros(64, np.float32)}}, ShapeError, "is in the model already"),
    ],
)
def test_corrections_that_do_not_fit(model: GgufOriginal, tmp_path: Path, given, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        export(model, tmp_path / "m.gguf", types_of(model), Q8_0, **given)
    assert not (tmp_path / "m.gguf").exists()


def test_weights_of_another_model(model: GgufOriginal, tmp_path: Path) -> None:
    types = types_of(model, "Q4_0")
    with pytest.raises(ShapeError, match=r"63 weights of importance, expected 64.*quantscope imatrix MODEL"):
        export(model, tmp_path / "m.gguf", types, 2, importance=lambda name: np.ones(63, np.float32))
    assert everything(tmp_path) == {}


def test_weights_in_bands(model: GgufOriginal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They change the bytes, and where a band ends does not."""
    rng = np.random.default_rng(0)
    weights = {t.name: rng.random(t.n_per_row, np.float32) for t in model.tensors.values()}

    def written(name: str, **more) -> bytes:
        return export(model, tmp_path / name, types_of(model, "Q4_0"), 2, **more).path.read_bytes()

    whole = written("whole.gguf", importance=weights.get)
    assert whole != written("plain.gguf")
    monkeypatch.setattr(export_module, "BAND_BYTES", 7 * 64 * 4)
    assert written("bands.gguf", importance=weights.get) == whole


def test_types_that_do_not_fit(model: GgufOriginal, tmp_path: Path) -> None:
    with pytest.raises(BlockError, match="a row of 64 elements cannot be stored as Q4_K"):
        export(model, tmp_path / "m.gguf", {"output.weight": QTYPES["Q4_K"]}, Q8_0)
    with pytest.raises(MissingTensorError, match="no tensor 'outputs'"):
        export(model, tmp_path / "m.gguf", {"outputs": QTYPES["Q4_0"]}, Q8_0)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(("name", "at"), [("blk.1.ffn_up.weight", (70, 5)), ("output_norm.weight", (0, 63))])
def test_a_source_with_nan(name: str, at: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoded or kept as it is: the row is named, also behind the first band."""
    monkeypatch.setattr(export_module, "BAND_BYTES", 9 * 64 * 4)
    shape = (96, 64) if "ffn" in name else (64,)
    values = np.ones(shape, np.float32)
    values[at if len(shape) > 1 else at[1]] = np.nan
    model = GgufOriginal(open_gguf(make_gguf(tmp_path / "nan.gguf", edit={name: values})))
    with pytest.raises(NonFiniteError, match=rf"nan\.gguf: tensor '{name}' holds nan in row {at[0]}, column {at[1]}"):
        export(model, tmp_path / "m.gguf", types_of(model), Q8_0)
    assert [p.name for p in tmp_path.iterdir()] == ["nan.gguf"]


def test_memory_does_not_grow_with_the_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_module, "BAND_BYTES", 1 << 18)
    big = np.ones((4096, 512), np.float32)  # 8 MB
    model = GgufOriginal(open_gguf(make_gguf(tmp_path / "m.gguf", edit={"blk.0.big.weight": big})))
    model.source.sha256()
    types = types_of(model)
    tracemalloc.start()
    export(model, tmp_path / "out.gguf", types, Q8_0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


# ---------------------------------------------------------------- files


def everything(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


@pytest.mark.parametrize("there", [False, True])
def test_a_disk_that_fails_leaves_nothing(model: GgufOriginal, tmp_path: Path, there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "m.gguf"
    if there:
        out.write_bytes(b"what was there")
    before = everything(tmp_path)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match="could not be written: No space left on device"):
        export(model, out, types_of(model), Q8_0)
    assert everything(tmp_path) == before
    monkeypatch.undo()
    export(model, out, types_of(model), Q8_0)
    assert open_gguf(out).tensors.keys() == model.tensors.keys()


def test_a_full_disk_is_seen_beforehand(model: GgufOriginal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    with pytest.raises(UsageError, match=r"the file takes \d+ kB, the disk has 1\.00 kB free"):
        export(model, tmp_path / "m.gguf", types_of(model), Q8_0)
    assert everything(tmp_path) == {}


def test_an_interrupted_run_leaves_nothing(model: GgufOriginal, tmp_path: Path) -> None:
    def stop(done: int, what: str) -> None:
        if done:
            raise KeyboardInterrupt

    (tmp_path / "m.gguf").write_bytes(b"what was there")
    with pytest.raises(KeyboardInterrupt):
        export(model, tmp_path / "m.gguf", types_of(model), Q8_0, step=stop)
    assert everything(tmp_path) == {"m.gguf": b"what was there"}


def test_the_source_is_never_overwritten(model: GgufOriginal, tmp_path: Path) -> None:
    source = model.source.path
    before = source.read_bytes()
    os.link(source, tmp_path / "hard.gguf")
    (tmp_path / "soft.gguf").symlink_to(source)
    for out in (source, source.parent / ".." / "in" / "m.gguf", tmp_path / "hard.gguf", tmp_path / "soft.gguf"):
        with pytest.raises(UsageError, match="is the model to quantize itself"):
            export(model, out, types_of(model), Q8_0)
    assert source.read_bytes() == before


@pytest.mark.parametrize("name", ["no such folder/m.gguf", ".", "in"])
def test_where_no_file_can_be(model: GgufOriginal, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="expected a file in a folder that exists"):
        export(model, tmp_path / name, types_of(model), Q8_0)


def test_a_new_file_is_readable_like_any_other(model: GgufOriginal, tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    assert export(model, tmp_path / "m.gguf", {}, 0).path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_requantizing_a_trained_model_keeps_its_vocabulary(tmp_path: Path) -> None:
    model = original(open_source(STORIES))
    out = open_gguf(export(model, tmp_path / "m.gguf", types_of(model, "Q5_1"), 9).path)
    assert list(out.metadata["tokenizer.ggml.tokens"]) == list(model.source.metadata["tokenizer.ggml.tokens"])
    assert {str(t.qtype) for t in out.tensors.values()} >= {"F32", "Q5_1", "Q8_0", "F16"}  # rows of 172 fit no block
