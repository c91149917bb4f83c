"""Hugging Face folders: one file or shards, and what is wrong with a folder that cannot be read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save
from safetensors.torch import save_file as torch_save

from quantscope.errors import (
    CorruptFileError,
    MissingFileError,
    MissingTensorError,
    ModelFileError,
    NotAModelError,
    QuantscopeError,
    TruncatedFileError,
    UnsupportedTypeError,
)
from quantscope.sources.resolve import open_source
from quantscope.sources.safetensors import INDEX, SINGLE, SafetensorsSource, open_folder
from quantscope.sources.summary import summarize
from quantscope.weights import Weights
from tests.hf_models import make_hf

A = np.arange(6, dtype=np.float32).reshape(2, 3)
B = np.arange(4, dtype=np.float16)
CONFIG = {"model_type": "llama", "rope_theta": 1e4}


def folder(tmp_path: Path, shards: Mapping[str, bytes], **extra: Any) -> Path:
    """config.json, the shards, and JSON files given by name without suffix."""
    tmp_path.mkdir(exist_ok=True)
    for name, data in shards.items():
        (tmp_path / name).write_bytes(data)
    for name, value in ({"config": CONFIG} | extra).items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    return tmp_path


def stored(entries: Mapping[str, Any], data: bytes = b"") -> bytes:
    """A safetensors file of this header and data."""
    head = json.dumps(entries).encode()
    return len(head).to_bytes(8, "little") + head + data


def entry(dtype: str = "F32", shape: Any = (2,), begin: int = 0, end: int = 8) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def sharded(tmp_path: Path) -> Path:
    shards = {"model-00001-of-00002.safetensors": save({"a": A}), "model-00002-of-00002.safetensors": save({"b": B})}
    index = {
        "metadata": {"total_size": 32},
        "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"},
    }
    return folder(tmp_path, shards, **{INDEX.removesuffix(".json"): index})


def refused(path: Path, kind: type[QuantscopeError], *parts: str) -> None:
    with pytest.raises(QuantscopeError) as caught:
        open_source(path)
    assert type(caught.value) is kind
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert part in text, text


# ---------------------------------------------------------------- what is read


def test_one_file(tmp_path: Path) -> None:
    source = open_source(folder(tmp_path, {SINGLE: save({"a": A, "b": B}, {"format": "pt"})}))
    assert isinstance(source, SafetensorsSource)
    assert (source.format, dict(source.metadata)) == ("safetensors", CONFIG)
    assert {n: (t.shape, str(t.qtype), t.n_bytes) for n, t in source.tensors.items()} == {"a": ((2, 3), "F32", 24), "b": ((4,), "F16", 8)}
    assert (source.raw("a").view(np.float32).reshape(2, 3) == A).all()
    assert (source.raw("b").view(np.float16) == B).all()
    assert not source.raw("a").flags.writeable
    assert not source.raw("a").flags.owndata
    assert source.file_bytes == (tmp_path / SINGLE).stat().st_size
    assert source.truncated == ()


def test_shards(tmp_path: Path) -> None:
    source = open_folder(sharded(tmp_path))
    assert (source.raw("a").view(np.float32).reshape(2, 3) == A).all()
    assert (source.raw("b").view(np.float16) == B).all()
    assert source.file_bytes == sum(p.stat().st_size for p in tmp_path.glob("*.safetensors"))


def test_one_file_wins_over_an_index(tmp_path: Path) -> None:
    sharded(tmp_path)
    assert list(open_folder(folder(tmp_path, {SINGLE: save({"c": A})})).tensors) == ["c"]


def test_every_dtype(tmp_path: Path) -> None:
    sizes = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I8": 1, "I16": 2, "I32": 4, "I64": 8}
    entries, at = {}, 0
    for dtype, size in sizes.items():
        entries[dtype] = entry(dtype, (3, 5), at, at + 15 * size)
        at += 15 * size
    source = open_folder(folder(tmp_path, {SINGLE: stored(entries, os.urandom(at))}))
    assert {n: (str(t.qtype), t.n_bytes) for n, t in source.tensors.items()} == {d: (d, 15 * n) for d, n in sizes.items()}


def test_scalars_and_tokenizer_files(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    source = open_folder(folder(tmp_path, {SINGLE: save({"s": np.array(3, np.float32)})}, tokenizer={}))
    assert source.raw("s").view(np.float32).tolist() == [3]
    assert source.tokenizer_files == {n: tmp_path / n for n in ("tokenizer.json", "tokenizer.model")}


def test_digest_covers_config_and_shards(tmp_path: Path) -> None:
    path = sharded(tmp_path)
    names = sorted(["config.json", *(p.name for p in path.glob("*.safetensors"))])
    listing = "".join(f"{hashlib.sha256((path / n).read_bytes()).hexdigest()}  {n}\n" for n in names)
    assert open_folder(path).sha256() == hashlib.sha256(listing.encode()).hexdigest()


def test_views_outlive_a_closed_source(tmp_path: Path) -> None:
    source = open_folder(sharded(tmp_path))
    raw = source.raw("a")
    source.close()
    assert raw.view(np.float32)[5] == 5
    with pytest.raises(ValueError, match="closed"):
        source.raw("a")


# ---------------------------------------------------------------- what is refused


def test_folders_that_are_none(tmp_path: Path) -> None:
    refused(tmp_path, MissingFileError, "a folder without config.json", "Hugging Face folder")
    for i in range(7):
        (tmp_path / f"m{i}.gguf").write_bytes(b"")
    refused(tmp_path, MissingFileError, "It holds GGUF files (m0.gguf, m1.gguf", "and 2 more", "m0.gguf`")
    refused(folder(tmp_path / "a", {}), MissingFileError, "config.json but no weights")
    refused(folder(tmp_path / "b", {"pytorch_model.bin": b"x"}), MissingFileError, "pickled weights (pytorch_model.bin)", "save_pretrained")
    refused(folder(tmp_path / "c", {"adapter.safetensors": b"x"}), MissingFileError, "adapter.safetensors, which has another name")


def test_folder_that_may_not_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", denied)
    refused(tmp_path, ModelFileError, "permission denied")


def test_missing_shard(tmp_path: Path) -> None:
    path = sharded(tmp_path)
    (path / "model-00002-of-00002.safetensors").unlink()
    refused(path, MissingFileError, "model-00002-of-00002.safetensors: no such file, but ", INDEX, "1 of 2 shards are missing")


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": ["a"]}, {"weight_map": {"a": 1}}, {"weight_map": {"a": "../x"}}])
def test_broken_index(tmp_path: Path, index: dict[str, Any]) -> None:
    refused(folder(tmp_path, {}, **{INDEX.removesuffix(".json"): index}), CorruptFileError, "'weight_map'")


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"\xff\xfe{", b"null", b"[" * 100_000])
def test_broken_config(tmp_path: Path, text: bytes) -> None:
    folder(tmp_path, {SINGLE: save({"a": A})})
    (tmp_path / "config.json").write_bytes(text)
    refused(tmp_path, CorruptFileError, "config.json: the file ")


def test_truncated_data(tmp_path: Path) -> None:
    data = save({"a": A, "b": B})
    folder(tmp_path, {SINGLE: data[:-4]})
    wanted = f"(F16) ends at byte {len(data):,} but the file has {len(data) - 4:,}. The download is probably incomplete"
    refused(tmp_path, TruncatedFileError, "tensor 'b'", wanted, "run `quantscope inspect ")
    source = open_source(tmp_path, allow_truncated=True)
    assert source.truncated == ("b",)
    assert [t.intact for t in summarize(source).tensors] == [True, False]
    assert source.raw("a").size == 24
    with pytest.raises(TruncatedFileError):
        source.raw("b")


def test_truncated_header(tmp_path: Path) -> None:
    data = save({"a": A})
    for n in (9, 20, 50):
        refused(folder(tmp_path, {SINGLE: data[:n]}), TruncatedFileError, "the header ends at byte", f"the file has {n}")
    refused(folder(tmp_path, {SINGLE: data[:7]}), CorruptFileError, "not a safetensors file")
    refused(folder(tmp_path, {SINGLE: b""}), NotAModelError, "the file is empty")


@pytest.mark.parametrize(
    ("data", "kind", "part"),
    [
        (b"PK\x03\x04" + bytes(20), CorruptFileError, "not a safetensors file: it starts with b'PK"),
        ((2**62).to_bytes(8, "little") + b"{", CorruptFileError, "not a safetensors file"),
        ((5).to_bytes(8, "little") + b"{nono", CorruptFileError, "the header is no JSON"),
        (stored({"a": 1}), CorruptFileError, "the header entry of tensor 'a' is 1"),
        (stored({"a": {"dtype": "F32"}}), CorruptFileError, "expected dtype, shape and data_offsets"),
        (stored({"a": entry("F4")}, bytes(8)), UnsupportedTypeError, "tensor 'a' has dtype F4, expected one of F32, F16"),
        (stored({"a": entry(shape=[0])}, bytes(8)), CorruptFileError, "shape [0], expected positive sizes"),
        (stored({"a": entry(shape=[-2])}, bytes(8)), CorruptFileError, "expected positive sizes"),
        (stored({"a": entry(shape=["2"])}, bytes(8)), CorruptFileError, "expected positive sizes"),
        (stored({"a": entry(end=4)}, bytes(8)), CorruptFileError, "data_offsets 0 to 4, expected 8 bytes"),
        (stored({"a": entry(begin=-8, end=0)}, bytes(8)), CorruptFileError, "data_offsets -8 to 0"),
        (stored({"a": entry(), "b": entry(begin=4, end=12)}, bytes(12)), CorruptFileError, "'b' starts inside 'a'"),
    ],
)
def test_broken_weights(tmp_path: Path, data: bytes, kind: type[QuantscopeError], part: str) -> None:
    refused(folder(tmp_path, {SINGLE: data}), kind, SINGLE, part)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    path = sharded(tmp_path)
    (path / "model-00002-of-00002.safetensors").write_bytes(save({"a": A}))
    refused(path, CorruptFileError, "tensor 'a' is also in model-00001-of-00002.safetensors")


def test_single_safetensors_file_points_to_its_folder(tmp_path: Path) -> None:
    refused(folder(tmp_path, {SINGLE: save({"a": A})}) / SINGLE, NotAModelError, f"here perhaps `{tmp_path}`")


def test_a_tensor_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MissingTensorError, match="no tensor 'zz'"):
        open_folder(sharded(tmp_path)).raw("zz")


GOOD = save({"a": A, "bb": B})


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hf")


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    cut=st.integers(0, len(GOOD)),
    edits=st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.binary(min_size=1, max_size=4)), max_size=3),
)
def test_damaged_files(scratch: Path, cut: int, edits: list[tuple[int, bytes]]) -> None:
    data = bytearray(GOOD)
    for at, piece in edits:
        data[at : at + len(piece)] = piece
    path = folder(scratch, {SINGLE: bytes(data[: cut or None])})
    try:
        source = open_folder(path, allow_truncated=True)
    except QuantscopeError:
        return
    for name in source.tensors:
        assert name in source.truncated or source.raw(name).size == source.tensors[name].n_bytes


def test_tensors_of_different_types_in_one_model(tmp_path: Path) -> None:
    model = make_hf(tmp_path)
    state, kinds = model.state_dict(), (torch.float32, torch.float16, torch.bfloat16)
    mixed = {name: tensor.to(kinds[i % 3]) for i, (name, tensor) in enumerate(state.items())}
    torch_save(mixed, tmp_path / SINGLE)
    weights = Weights(open_source(tmp_path))
    assert {t.name for t in weights.stored_types().values()} == {"F32", "F16", "BF16"}
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(weights.get("blk.1.ffn_down.weight"), mixed[name].float())
