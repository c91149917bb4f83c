"""The GGUF reader: values, laziness, and one paragraph for every kind of damage."""

from __future__ import annotations

import hashlib
import os
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantscope.errors import (
    CorruptFileError,
    MissingFileError,
    MissingTensorError,
    ModelFileError,
    NotAModelError,
    QuantscopeError,
    TruncatedFileError,
    UnsupportedTypeError,
    UnsupportedVersionError,
)
from quantscope.sources import files
from quantscope.sources.gguf import GgufSource, StringArray, open_gguf
from quantscope.sources.resolve import open_source
from quantscope.sources.summary import ArrayPreview, summarize
from tests.models import STORIES
from tests.unit.gguf_bytes import (
    ARRAY,
    BOOL,
    F32,
    F64,
    FORMATS,
    I8,
    I32,
    I64,
    STRING,
    U8,
    U16,
    U32,
    U64,
    Info,
    array,
    gguf,
    header,
    kv,
    string,
    u32,
    u64,
)

DATA = np.arange(64, dtype=np.float32).tobytes()
TWO = (Info("a", (32,)), Info("blk.0.b", (16, 2), offset=128))
GOOD = gguf([kv("general.name", STRING, "tiny"), array("t", STRING, ["x", "ÿ", ""]), array("s", F32, [1.5, -2.0])], TWO, DATA)


def write(tmp_path: Path, data: bytes, name: str = "m.gguf") -> Path:
    path = tmp_path / name
    path.write_bytes(data)
    return path


def opened(tmp_path: Path, data: bytes) -> GgufSource:
    return open_gguf(write(tmp_path, data))


def paragraph(error: QuantscopeError) -> str:
    """The message, checked for the form all of them have: one paragraph, its subject first, and a way on."""
    text = str(error)
    assert "\n" not in text
    assert "m.gguf: " in text.split("expected")[0] or "`" in text, text
    assert text.endswith((".", ")."))
    assert text.count(". ") >= 1, text
    return text


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize("version", [2, 3])
def test_values_of_every_type(tmp_path: Path, version: int) -> None:
    values = {
        "u8": (U8, 255), "i8": (I8, -128), "u16": (U16, 65535), "i16": (3, -5), "u32": (U32, 2**32 - 1), "i32": (I32, -7),
        "f32": (F32, 0.1), "yes": (BOOL, 1), "no": (BOOL, 0), "str": (STRING, "日本\n"), "u64": (U64, 2**64 - 1), "i64": (I64, -(2**63)),
        "f64": (F64, 0.1), "": (U8, 3),
    }  # fmt: skip
    source = opened(tmp_path, gguf([kv(k, kind, v) for k, (kind, v) in values.items()], version=version))
    expected = {k: v for k, (_, v) in values.items()} | {"f32": float(np.float32(0.1)), "yes": True, "no": False}
    assert dict(source.metadata) == expected
    assert {k: type(v) for k, v in source.metadata.items()} == {k: type(v) for k, v in expected.items()}
    assert source.version == version


@pytest.mark.parametrize("kind", [k for k in FORMATS if k != BOOL])
def test_numeric_arrays_are_views_of_the_file(tmp_path: Path, kind: int) -> None:
    source = opened(tmp_path, gguf([kv("odd", U8, 1), array("a", kind, [1, 2, 3])]))
    value = source.metadata["a"]
    assert value.tolist() == [1, 2, 3]
    assert value.dtype == np.dtype("<" + FORMATS[kind])
    assert not value.flags.owndata
    assert not value.flags.writeable


def test_bool_arrays_and_any_nonzero_byte_is_true(tmp_path: Path) -> None:
    source = opened(tmp_path, gguf([array("a", BOOL, [0, 1, 2]), kv("two", BOOL, 2)]))
    assert source.metadata["a"].tolist() == [False, True, True]
    assert source.metadata["two"] is True


def test_string_arrays_decode_on_access(tmp_path: Path) -> None:
    tokens = opened(tmp_path, GOOD).metadata["t"]
    assert isinstance(tokens, StringArray)
    assert tokens._strings is None
    assert (len(tokens), list(tokens), tokens[-1], tokens[:2]) == (3, ["x", "ÿ", ""], "", ["x", "ÿ"])
    assert "3 strings" in repr(tokens)
    with pytest.raises(IndexError):
        tokens[3]


def test_undecodable_strings_keep_their_bytes(tmp_path: Path) -> None:
    broken = b"\xe6\x97\xff"
    source = opened(tmp_path, gguf([kv("k", STRING, broken), array("t", STRING, [broken, "ok"])]))
    assert source.metadata["k"].encode("utf-8", "surrogateescape") == broken
    assert [t.encode("utf-8", "surrogateescape") for t in source.metadata["t"]] == [broken, b"ok"]


def test_tensors_are_row_major_views(tmp_path: Path) -> None:
    source = opened(tmp_path, GOOD)
    b = source.tensors["blk.0.b"]
    assert (b.shape, str(b.qtype), b.n_elements, b.n_bytes, b.n_per_row) == ((2, 16), "F32", 32, 128, 16)
    raw = source.raw("blk.0.b")
    assert raw.view(np.float32).tolist() == list(range(32, 64))
    assert not raw.flags.owndata
    assert not raw.flags.writeable
    assert list(source.tensors) == ["a", "blk.0.b"]
    assert source.offsets["blk.0.b"] == source.data_offset + 128
    assert source.file_bytes == len(GOOD)


def test_alignment_moves_the_data(tmp_path: Path) -> None:
    infos = (Info("a", (2,)), Info("b", (3,), offset=64))
    data = struct.pack("<2f56x3f", 1, 2, 3, 4, 5)
    source = opened(tmp_path, gguf([kv("general.alignment", U32, 64)], infos, data, alignment=64))
    assert source.data_offset % 64 == 0
    assert source.raw("a").view(np.float32).tolist() == [1, 2]
    assert source.raw("b").view(np.float32).tolist() == [3, 4, 5]


def test_file_without_tensors_and_a_scalar_tensor(tmp_path: Path) -> None:
    assert not opened(tmp_path, header()).tensors
    source = opened(tmp_path, gguf([], [Info("s", ())], struct.pack("<f", 7)))
    assert source.tensors["s"].shape == ()
    assert source.raw("s").view(np.float32).tolist() == [7]


def test_digest_is_that_of_the_file(tmp_path: Path) -> None:
    assert opened(tmp_path, GOOD).sha256() == hashlib.sha256(GOOD).hexdigest()


def test_views_outlive_a_closed_source(tmp_path: Path) -> None:
    source = opened(tmp_path, GOOD)
    raw, digest = source.raw("a"), source.sha256()
    source.close()
    assert raw.view(np.float32)[3] == 3
    assert source.sha256() == digest
    with pytest.raises(ValueError, match="closed"):
        source.raw("a")


def test_opening_reads_no_tensor_data(tmp_path: Path) -> None:
    path = write(tmp_path, gguf([], [Info("a", (1 << 24,))]))
    os.truncate(path, path.stat().st_size + (1 << 26))  # a sparse file of 64 MiB
    tracemalloc.start()
    source = open_gguf(path)
    source.raw("a")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_real_model() -> None:
    source = open_source(STORIES)
    assert source.format == "gguf"
    assert (source.metadata["llama.block_count"], source.metadata["tokenizer.ggml.tokens"][403]) == (5, "▁Once")
    assert source.tensors["blk.4.ffn_down.weight"].shape == (64, 172)
    assert sum(t.n_elements for t in source.tensors.values()) == 260_032


# ---------------------------------------------------------------- summary


def test_summary(tmp_path: Path) -> None:
    mixed = (Info("a", (64,)), Info("b", (32, 2), kind=8, offset=256))  # F32 and Q8_0
    path = write(tmp_path, gguf([kv("k", U8, 1), array("t", STRING, list("abcd")), array("n", I32, [4, 5])], mixed, bytes(256 + 68)))
    s = summarize(open_source(path))
    assert [(t.type, t.n_tensors, t.n_elements, t.n_bytes, t.bpw) for t in s.types] == [("F32", 1, 64, 256, 32.0), ("Q8_0", 1, 64, 68, 8.5)]
    assert (s.n_elements, s.tensor_bytes, s.bpw, s.file_bytes) == (128, 324, 20.25, path.stat().st_size)
    assert s.metadata == {"k": 1, "t": ArrayPreview(4, ("a", "b", "c")), "n": ArrayPreview(2, (4, 5))}
    assert s.container["version"] == 3
    assert [(t.name, t.shape, t.intact) for t in s.tensors] == [("a", (64,), True), ("b", (2, 32), True)]


def test_summary_of_a_cut_file_names_the_missing_tensors(tmp_path: Path) -> None:
    source = open_source(write(tmp_path, GOOD[:-1]), allow_truncated=True)
    assert source.truncated == ("blk.0.b",)
    assert [t.intact for t in summarize(source).tensors] == [True, False]
    assert source.raw("a").size == 128
    with pytest.raises(TruncatedFileError):
        source.raw("blk.0.b")


def test_summary_of_no_tensors(tmp_path: Path) -> None:
    assert summarize(opened(tmp_path, header())).bpw == 0


# ---------------------------------------------------------------- what is refused


def refused(tmp_path: Path, data: bytes, kind: type[QuantscopeError], *parts: str) -> None:
    with pytest.raises(kind) as caught:
        opened(tmp_path, data)
    assert type(caught.value) is kind
    text = paragraph(caught.value)
    for part in parts:
        assert part in text, text


def test_tensor_past_the_end(tmp_path: Path) -> None:
    n = len(GOOD)
    wanted = f"tensor 'blk.0.b' (F32) ends at byte {n:,} but the file has {n - 4:,}. The download is probably incomplete: compare its size"
    refused(tmp_path, GOOD[:-4], TruncatedFileError, wanted, "run `quantscope inspect ")


def test_every_cut_of_the_header_is_refused(tmp_path: Path) -> None:
    end = len(header([kv("general.name", STRING, "tiny"), array("t", STRING, ["x", "ÿ", ""]), array("s", F32, [1.5, -2.0])], TWO))
    for n in range(4, end):
        refused(tmp_path, GOOD[:n], TruncatedFileError, f"{n:,}")
    for n in range(end, len(GOOD)):
        refused(tmp_path, GOOD[:n], TruncatedFileError, "ends at byte")


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (b"", "the file is empty"),
        (b"GG", "not a GGUF file: it starts with b'GG', expected b'GGUF'"),
        (b"hello world", "b'hell'"),
        (b"<!DOCTYPE html><html>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"PK\x03\x04....", "a zip archive"),
        (b"lmgg\x01\0\0\0", "before GGUF"),
        (u64(40) + b'{"a": 1}', "give the folder that also holds config.json"),
    ],
)
def test_not_a_gguf(tmp_path: Path, data: bytes, part: str) -> None:
    refused(tmp_path, data, NotAModelError, part)


@pytest.mark.parametrize("version", [0, 1, 4, 2**31])
def test_other_versions(tmp_path: Path, version: int) -> None:
    refused(tmp_path, gguf(version=version), UnsupportedVersionError, f"GGUF version {version}, expected 2 or 3")


@pytest.mark.parametrize("version", [1, 2, 3])
def test_big_endian(tmp_path: Path, version: int) -> None:
    data = b"GGUF" + struct.pack(">IQQ", version, 0, 0)
    refused(tmp_path, data, UnsupportedVersionError, f"big-endian GGUF v{version}, expected little-endian", "gguf_convert_endian")


@pytest.mark.parametrize(("kind", "part"), [(4, "Q4_2, which ggml has removed"), (99, "type id 99"), (2**32 - 1, "newer llama.cpp")])
def test_unknown_tensor_types(tmp_path: Path, kind: int, part: str) -> None:
    refused(tmp_path, gguf([], [Info("blk.0.x", kind=kind)], DATA), UnsupportedTypeError, "tensor 'blk.0.x'", part)


def test_unknown_value_types(tmp_path: Path) -> None:
    refused(tmp_path, header([string("k") + u32(13) + bytes(8)]), CorruptFileError, "key 'k' has type 13, expected 0 to 12")
    refused(tmp_path, header([string("k") + u32(ARRAY) + u32(77) + u64(0)]), CorruptFileError, "has type 77")
    refused(tmp_path, header([string("k") + u32(ARRAY) + u32(ARRAY) + u64(1) + bytes(12)]), CorruptFileError, "array of arrays")


@pytest.mark.parametrize("n", [2**63 - 1, 2**60, 2**40, 1000])
def test_absurd_counts_cost_nothing(tmp_path: Path, n: int) -> None:
    tracemalloc.start()
    refused(tmp_path, header(n_kv=n) + bytes(200), TruncatedFileError, f"{n:,} metadata keys")
    refused(tmp_path, header(n_tensors=n) + bytes(200), TruncatedFileError, f"{n:,} tensors")
    for kind in (STRING, U8 if n > 1000 else F64):
        refused(tmp_path, header([array("k", kind, [], n=n)]) + bytes(200), TruncatedFileError, "metadata key 'k'")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 2**60, 100])
def test_strings_past_the_end(tmp_path: Path, length: int) -> None:
    refused(tmp_path, header(n_kv=1) + u64(length) + b"general.name" + bytes(8), TruncatedFileError, "metadata key 0")
    refused(tmp_path, header([string("k") + u32(STRING) + u64(length) + b"abc"]), TruncatedFileError, "'k'")
    refused(tmp_path, header([array("k", STRING, ["a"], n=2)]) + u64(length) + b"abc", TruncatedFileError, "'k'")


def test_names_that_occur_twice(tmp_path: Path) -> None:
    refused(tmp_path, gguf([], [Info("x"), Info("x", offset=128)], DATA), CorruptFileError, "tensors hold 'x' twice")
    refused(tmp_path, gguf([kv("k", U8, 1), kv("k", U8, 2)]), CorruptFileError, "metadata keys hold 'k' twice")


@pytest.mark.parametrize(
    ("info", "part"),
    [
        (Info(offset=8), "offset 8, expected a multiple of the alignment 32"),
        (Info(ne=(0,)), "shape [0], expected positive sizes"),
        (Info(ne=(2**32, 2**32)), "product is below 2^63"),
        (Info(ne=(1,) * 5), "5 dimensions, expected at most 4"),
        (Info(n_dims=2**32 - 1), "4294967295 dimensions"),
        (Info(ne=(33,), kind=2), "(Q4_0) has rows of 33, expected a multiple of 32"),
        (Info(ne=(), kind=2), "(Q4_0) has rows of 1"),
    ],
)
def test_impossible_tensors(tmp_path: Path, info: Info, part: str) -> None:
    refused(tmp_path, gguf([], [info], DATA), CorruptFileError, part)


def test_overlapping_tensors(tmp_path: Path) -> None:
    refused(tmp_path, gguf([], [Info("x"), Info("y", offset=96)], DATA), CorruptFileError, "tensor 'y' starts at offset 96, inside 'x'")


@pytest.mark.parametrize(
    "value", [kv("general.alignment", U32, 0), kv("general.alignment", U32, 33), kv("general.alignment", STRING, "32")]
)
def test_impossible_alignment(tmp_path: Path, value: bytes) -> None:
    refused(tmp_path, gguf([value]), CorruptFileError, "general.alignment is", "expected a power of two")


def part(i: int, n: int, *tensors: Info, total: int | None = None) -> bytes:
    keys = [kv("general.name", STRING, "tiny")] if i == 0 else []
    keys += [] if total is None else [kv("split.tensors.count", I32, total)]
    return gguf([*keys, kv("split.no", U16, i), kv("split.count", U16, n)], tensors, DATA)


def three_parts(tmp_path: Path) -> list[Path]:
    names = ["b", "a", "c"]
    return [write(tmp_path, part(i, 3, Info(x, (32,)), total=3), f"m-{i + 1:05d}-of-00003.gguf") for i, x in enumerate(names)]


def test_a_split_model_is_opened_by_any_part(tmp_path: Path) -> None:
    paths = three_parts(tmp_path)
    for path in paths:
        source = open_source(path)
        assert (source.path, list(source.tensors), dict(source.metadata)) == (paths[0], ["b", "a", "c"], {"general.name": "tiny"})
        assert source.raw("c").tobytes() == DATA[:128]
        assert source.file_bytes == sum(p.stat().st_size for p in paths)
        listing = "".join(f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in paths)
        assert source.sha256() == hashlib.sha256(listing.encode()).hexdigest()
        assert summarize(source).container == {"version": 3, "alignment": 32}
        with pytest.raises(MissingTensorError):
            source.raw("d")
        source.close()
    assert opened(tmp_path, gguf([kv("split.no", U16, 0), kv("split.count", U16, 1)])).metadata  # one part is a whole model


def test_parts_that_are_missing_or_damaged(tmp_path: Path) -> None:
    paths = three_parts(tmp_path)
    paths[2].write_bytes(paths[2].read_bytes()[:-200])
    with pytest.raises(TruncatedFileError, match=r"m-00003-of-00003\.gguf: tensor 'c'"):
        open_source(paths[0])
    assert open_source(paths[0], allow_truncated=True).truncated == ("c",)
    paths[1].unlink()
    with pytest.raises(MissingFileError, match=r"m-00003-of-00003\.gguf: 1 of the model's 3 parts missing in .*: m-00002-of-00003\.gguf\."):
        open_source(paths[2], allow_truncated=True)
    with pytest.raises(MissingFileError, match=r"this is part 2 of 3 .* expected NAME-00001-of-00003\.gguf"):
        open_source(write(tmp_path, part(1, 3), "second.gguf"))


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (part(2, 3, Info("x", (32,))), r"00002.*split\.no and split\.count are 2 and 3, expected 1 and 3"),
        (gguf([], [Info("x", (32,))], DATA), r"00002.*split\.no and split\.count are None and 1, expected 1 and 3"),
        (part(1, 3, Info("b", (32,))), r"00002.*tensor 'b' is also in m-00001-of-00003\.gguf"),
        (part(1, 3), r"00001.*the parts hold 2 tensors, expected 3 \(split\.tensors\.count\)"),
    ],
)
def test_parts_that_do_not_belong_together(second: bytes, message: str, tmp_path: Path) -> None:
    paths = three_parts(tmp_path)
    paths[1].write_bytes(second)
    with pytest.raises(CorruptFileError, match=message):
        open_source(paths[0])


def test_missing_files_and_odd_paths(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    for path in (tmp_path / "m.gguf", tmp_path / "no" / "m.gguf", tmp_path / "file" / "m.gguf"):
        with pytest.raises(MissingFileError, match=r"no such file"):
            open_source(path)
    with pytest.raises(ModelFileError):
        open_source(str(tmp_path / "a\0b"))
    with pytest.raises(ModelFileError):
        open_source(tmp_path / ("x" * 300))
    with pytest.raises(NotAModelError, match="not a regular file"):
        open_source(os.devnull)


def test_pipes_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(NotAModelError, match="not a regular file"):
        open_source(tmp_path / "pipe")


def test_permission_denied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read everything, so the system's answer is played back."""
    path = write(tmp_path, GOOD)

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(files.np, "memmap", denied)
    with pytest.raises(ModelFileError, match=r"permission denied, expected a readable file.*run `ls -l "):
        open_source(path)


def test_other_system_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, GOOD)

    def broken(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(files.np, "memmap", broken)
    with pytest.raises(ModelFileError, match=r"cannot be read.*Input/output error"):
        open_source(path)


def test_a_tensor_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MissingTensorError, match=r"no tensor 'blk.0.bb'. The closest names are 'blk.0.b'"):
        opened(tmp_path, GOOD).raw("blk.0.bb")


def test_messages_can_be_printed_anywhere(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9")
    for make in (lambda: open_source(path), lambda: opened(tmp_path, gguf([], [Info(b"\xff", ne=(0,))], DATA))):
        with pytest.raises(ModelFileError) as caught:
            make()
        assert str(caught.value).encode("utf-8")


# ---------------------------------------------------------------- whatever the bytes, an answer or an error of ours


def answer_or_refusal(path: Path) -> None:
    try:
        source = open_gguf(path, allow_truncated=True)
    except QuantscopeError as error:
        message = str(error)
    else:
        message = ""
    message.encode("utf-8")
    if not message:
        read_everything(source)


def read_everything(source: GgufSource) -> None:
    for value in source.metadata.values():
        if isinstance(value, StringArray):
            list(value)
    for name in source.tensors:
        if name not in source.truncated:
            assert source.raw(name).size == source.tensors[name].n_bytes
    summarize(source)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf")


@settings(max_examples=600, deadline=None, derandomize=True)
@given(
    cut=st.integers(0, len(GOOD)),
    edits=st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.binary(min_size=1, max_size=8)), max_size=4),
)
def test_damaged_files(scratch: Path, cut: int, edits: list[tuple[int, bytes]]) -> None:
    data = bytearray(GOOD)
    for at, piece in edits:
        data[at : at + len(piece)] = piece
    answer_or_refusal(write(scratch, bytes(data[: cut or None])))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    at=st.integers(8, 400),
    value=st.sampled_from([0, 1, 2, 8, 9, 255, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1]),
    size=st.sampled_from([4, 8]),
)
def test_extreme_numbers_anywhere(scratch: Path, at: int, value: int, size: int) -> None:
    data = bytearray(GOOD)
    data[at : at + size] = (value % 2 ** (8 * size)).to_bytes(size, "little")
    answer_or_refusal(write(scratch, bytes(data)))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.binary(max_size=200))
def test_random_bytes_after_the_magic(scratch: Path, tail: bytes) -> None:
    answer_or_refusal(write(scratch, b"GGUF" + u32(3) + tail))


@pytest.mark.parametrize("size", [0, 1, 4096, 4097, 3 * 8192 + 5])
def test_a_digest_of_many_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(files, "HASH_BYTES", 8192)
    content = np.random.default_rng(1).bytes(size)
    (tmp_path / "f").write_bytes(content)
    mapped = files.map_file(tmp_path / "f") if size else np.empty(0, np.uint8)
    assert files.sha256_of(mapped) == hashlib.sha256(content).hexdigest()
    assert bytes(mapped) == content
