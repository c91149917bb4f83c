"""The readers against the packages that write and read these files: gguf and safetensors."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.open_gguf import N_MERGES, N_TOKENS, write_vocabulary
from quantscope.qtypes import BY_ID, QTYPES
from quantscope.sources.gguf import (
    ARRAY,
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_DIMS,
    REMOVED_TYPES,
    SCALARS,
    STRING,
    VERSIONS,
    StringArray,
    open_gguf,
)
from quantscope.sources.safetensors import DTYPES, SMALL, open_folder
from tests.models import STORIES
from tests.oracle.source_tree import llama_cpp_source

V = GGUFValueType
INTEGERS = {V.UINT8: (0, 2**8), V.INT8: (-(2**7), 2**7), V.UINT16: (0, 2**16), V.INT16: (-(2**15), 2**15), V.UINT32: (0, 2**32),
            V.INT32: (-(2**31), 2**31), V.UINT64: (0, 2**64), V.INT64: (-(2**63), 2**63)}  # fmt: skip
SCALAR_VALUES = st.one_of(
    *(st.tuples(st.just(kind), st.integers(low, high - 1)) for kind, (low, high) in INTEGERS.items()),
    st.tuples(st.just(V.FLOAT32), st.floats(width=32, allow_nan=False)),
    st.tuples(st.just(V.FLOAT64), st.floats(allow_nan=False)),
    st.tuples(st.just(V.BOOL), st.booleans()),
    st.tuples(st.just(V.STRING), st.text(st.characters(codec="utf-8"))),
)
ARRAY_VALUES = st.one_of(
    st.lists(st.text(st.characters(codec="utf-8"), max_size=12), min_size=1, max_size=20),
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=20),
    st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20),
    st.lists(st.booleans(), min_size=1, max_size=20),
)
KEYS = st.text("abcdef.xyz_", min_size=1, max_size=12).filter(lambda k: not k.startswith("general."))
STORED = [GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "I8", "I32", "Q4_0", "Q8_0", "Q4_K", "IQ4_NL")]
SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4)


def write(
    path: Path, scalars: Mapping[str, Any], arrays: Mapping[str, Any], tensors: Mapping[str, Any], alignment: int | None = None
) -> Path:
    """A file by gguf's own writer; tensors: name → (type, sizes), filled with the same random bytes for the same name."""
    writer = GGUFWriter(path, "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    for key, (kind, value) in scalars.items():
        writer.add_key_value(key, value, kind)
    for key, values in arrays.items():
        writer.add_array(key, values)
    for name, (kind, sizes) in tensors.items():
        __, size = gguf.GGML_QUANT_SIZES[kind]
        *outer, blocks = sizes
        data = np.random.default_rng(len(name)).integers(0, 256, (*outer, blocks * size), np.uint8)
        writer.add_tensor(name, data, raw_shape=(*outer, blocks * size), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def as_python(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    return list(value) if isinstance(value, StringArray) else value


def compare(path: Path) -> tuple[int, int]:
    """(keys, tensors) that both readers agree on; the gguf package lists the header's counts as keys too."""
    ours, theirs = open_gguf(path), GGUFReader(path)
    fields = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert {k: as_python(v) for k, v in ours.metadata.items()} == fields
    assert list(ours.metadata) == list(fields)
    assert [t.name for t in theirs.tensors] == list(ours.tensors)
    for t in theirs.tensors:
        mine = ours.tensors[t.name]
        assert (mine.qtype.id, mine.shape, mine.n_bytes) == (t.tensor_type.value, tuple(map(int, reversed(t.shape))), t.n_bytes)
        assert ours.offsets[t.name] == t.data_offset
        assert (ours.raw(t.name) == t.data.view(np.uint8).reshape(-1)).all()
    assert (ours.alignment, ours.data_offset) == (theirs.alignment, theirs.data_offset)
    return len(fields), len(theirs.tensors)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf")


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    scalars=st.dictionaries(KEYS, SCALAR_VALUES, max_size=8),
    arrays=st.dictionaries(KEYS.map("array.".__add__), ARRAY_VALUES, max_size=4),
    tensors=st.dictionaries(st.text("abw.", min_size=1, max_size=20), st.tuples(st.sampled_from(STORED), SHAPES), min_size=1, max_size=6),
    alignment=st.sampled_from([None, 8, 32, 64, 4096]),
)
def test_written_by_gguf_and_read_alike(
    scratch: Path, scalars: dict[str, Any], arrays: dict[str, Any], tensors: dict[str, Any], alignment: int | None
) -> None:
    path = write(scratch / "m.gguf", scalars, arrays, tensors, alignment)
    n_keys, n_tensors = compare(path)
    assert n_keys >= len(scalars) + len(arrays)
    assert n_tensors == len(tensors) > 0
    metadata = open_gguf(path).metadata
    assert {k: metadata[k] for k in scalars} == {k: v for k, (_, v) in scalars.items()}
    assert {k: as_python(metadata[k]) for k in arrays} == arrays


def test_published_files() -> None:
    assert compare(STORIES)[1] == 47
    vocabularies = sorted((llama_cpp_source() / "models").glob("ggml-vocab-*.gguf"), key=lambda p: p.stat().st_size)
    assert len(vocabularies) >= 10
    keys = [compare(path)[0] for path in vocabularies[:3]]  # the smallest: the other reader takes 10 s for some
    assert min(keys) >= 10
    for path in vocabularies:
        assert len(open_gguf(path).metadata["tokenizer.ggml.tokens"]) >= 28_000


def test_constants_are_those_of_the_gguf_package() -> None:
    assert int.from_bytes(MAGIC, "little") == gguf.GGUF_MAGIC
    assert tuple(gguf.READER_SUPPORTED_VERSIONS) == VERSIONS
    assert DEFAULT_ALIGNMENT == gguf.GGUF_DEFAULT_ALIGNMENT
    assert MAX_DIMS == 4
    scalars = {kind: np.dtype(dtype) for kind, dtype in GGUFReader.gguf_scalar_to_np.items()}
    assert {kind.value: dtype.newbyteorder("<") for kind, dtype in scalars.items()} == SCALARS
    assert (STRING, ARRAY) == (V.STRING, V.ARRAY)
    assert not set(REMOVED_TYPES) & set(BY_ID)
    assert set(DTYPES) - set(SMALL) <= set(QTYPES)


def test_safetensors_files_of_its_own_package(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    kinds = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool]
    kinds += [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu]
    tensors = {f"t{i}": (100 * torch.randn(i + 1, 7)).to(kind) for i, kind in enumerate(kinds)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    source = open_folder(tmp_path)
    loaded = load_file(tmp_path / "model.safetensors")
    assert len(loaded) == len(source.tensors) == len(DTYPES)
    for name, tensor in loaded.items():
        assert source.tensors[name].shape == tuple(tensor.shape)
        assert source.raw(name).tobytes() == tensor.view(torch.uint8).numpy().tobytes()


def test_opening_a_vocabulary_of_32000_tokens_takes_under_a_tenth_of_a_second(tmp_path: Path) -> None:
    path = write_vocabulary(tmp_path / "vocab.gguf")
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        source = open_gguf(path)
        seconds.append(time.perf_counter() - start)
    assert (len(source.metadata["tokenizer.ggml.tokens"]), len(source.metadata["tokenizer.ggml.merges"])) == (N_TOKENS, N_MERGES)
    assert min(seconds) < 0.1
    assert compare(path) == (6, 1)
