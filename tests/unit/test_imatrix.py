"""Importance matrices: the two formats by their definitions, files that are none, what is computed, and the command."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantscope.cli.imatrix import imatrix as command
from quantscope.errors import (
    BlockError,
    CorruptFileError,
    MissingFileError,
    NonFiniteError,
    NotAModelError,
    PromptError,
    QuantscopeError,
    ShapeError,
    TruncatedFileError,
    UsageError,
)
from quantscope.imatrix import Entry, Imatrix, check_imatrix, read_imatrix, write_imatrix
from quantscope.importance import compute_imatrix, compute_importance, prepare_importance
from quantscope.lockstep import Member
from quantscope.model.forward import forward
from quantscope.model.taps import Recorder
from quantscope.qtypes import QTYPES
from quantscope.quants import encode
from quantscope.results import PlanInfo, StudyOptions
from quantscope.sources.resolve import open_source
from quantscope.weights import Weights
from tests.models import make_gguf

F32 = np.float32
SAMPLE = Imatrix(
    {
        "blk.0.attn_q.weight": Entry(np.arange(1, 9, dtype=F32)[None], (4,)),
        "blk.0.ffn_down_exps.weight": Entry(np.array([[3, 6], [5, 7]], F32), (3, 0)),
    },
    ("text.txt",),
    n_chunk=2,
    n_ctx=512,
)


# ---------------------------------------------------------------- the formats


def test_gguf_as_another_reader_sees_it(tmp_path: Path) -> None:
    write_imatrix(tmp_path / "a.gguf", SAMPLE)
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    values = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert values == {
        "general.type": "imatrix",
        "imatrix.datasets": ["text.txt"],
        "imatrix.chunk_count": 2,
        "imatrix.chunk_size": 512,
    }
    found = {t.name: (t.tensor_type.name, list(map(int, t.shape)), t.data.ravel().tolist()) for t in reader.tensors}
    assert found == {
        "blk.0.attn_q.weight.in_sum2": ("F32", [8, 1], [1, 2, 3, 4, 5, 6, 7, 8]),
        "blk.0.attn_q.weight.counts": ("F32", [1, 1], [4]),
        "blk.0.ffn_down_exps.weight.in_sum2": ("F32", [2, 2], [3, 6, 5, 7]),
        "blk.0.ffn_down_exps.weight.counts": ("F32", [1, 2], [3, 0]),
    }


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write_imatrix(tmp_path / "a.gguf", SAMPLE)
    found = read_imatrix(tmp_path / "a.gguf")
    assert (found.datasets, found.n_chunk, found.n_ctx, set(found.entries)) == (("text.txt",), 2, 512, set(SAMPLE.entries))
    assert found.of("blk.0.attn_q.weight").tolist() == [0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2]  # type: ignore[union-attr]
    assert found.of("blk.0.ffn_down_exps.weight").tolist() == [1, 2, 1, 1]  # type: ignore[union-attr]  # an expert without tokens: ones
    assert found.of("token_embd.weight") is None


def legacy(*entries: tuple[str, int, list[float]], tail: bytes = b"") -> bytes:
    out = struct.pack("<i", len(entries))
    for name, n_call, values in entries:
        out += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", n_call, len(values))
        out += np.array(values, "<f4").tobytes()
    return out + tail


TAIL = struct.pack("<ii", 7, 8) + b"text.txt"
TWO = (("blk.0.attn_q.weight", 4, [2.0, 8.0]), ("blk.1.attn_q.weight", 0, [3.0, 5.0]))


@pytest.mark.parametrize(("tail", "n_chunk", "datasets"), [(b"", 0, ()), (TAIL, 7, ("text.txt",)), (struct.pack("<ii", 7, 0), 7, ())])
def test_legacy_format(tmp_path: Path, tail: bytes, n_chunk: int, datasets: tuple[str, ...]) -> None:
    (tmp_path / "a.dat").write_bytes(legacy(*TWO, tail=tail))
    found = read_imatrix(tmp_path / "a.dat")
    assert (found.n_chunk, found.datasets) == (n_chunk, datasets)
    assert {name: e.mean.tolist() for name, e in found.entries.items()} == {TWO[0][0]: [0.5, 2.0], TWO[1][0]: [3.0, 5.0]}


# ---------------------------------------------------------------- files that are none


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"no\.gguf: no such file, expected an importance matrix.*quantscope imatrix"):
        read_imatrix(tmp_path / "no.gguf")
    with pytest.raises(NotAModelError, match="not a regular file or empty"):
        read_imatrix(tmp_path)


@pytest.mark.parametrize(
    "content", [b"PK\x03\x04 a zip archive of some kind", b"ab", b"\xff" * 40, bytes(40), legacy(("x" * 300, 1, [1.0]))]
)
def test_other_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.dat").write_bytes(content)
    with pytest.raises(NotAModelError, match=r"a\.dat: .* expected an importance matrix as llama-imatrix writes it"):
        read_imatrix(tmp_path / "a.dat")


def test_a_model_is_no_importance_matrix(tmp_path: Path) -> None:
    with pytest.raises(NotAModelError, match=r"a GGUF file without a tensor \*\.in_sum2"):
        read_imatrix(make_gguf(tmp_path / "model.gguf"))
    with pytest.raises(NotAModelError, match="a GGUF file of type 'model'"):
        read_imatrix(make_gguf(tmp_path / "model.gguf", metadata={"general.type": "model"}))


def edited(path: Path, **tensors: np.ndarray) -> Path:
    """A GGUF of type imatrix with these tensors, "_" for the last dot."""
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    for name, value in tensors.items():
        writer.add_tensor(f"w.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"in_sum2": np.ones((1, 4), F32)}, "has no 'w.counts' beside it"),
        ({"in_sum2": np.ones((1, 4), F32), "counts": np.ones((1, 1), np.float16)}, "stored as F32 and F16"),
        ({"in_sum2": np.ones((1, 4), F32), "counts": np.ones((3, 1), F32)}, "4 sums for counts"),
        ({"in_sum2": np.ones((1, 4), F32), "counts": np.full((1, 1), np.nan, F32)}, "for counts"),
        ({"in_sum2": np.array([[1, np.nan]], F32), "counts": np.ones((1, 1), F32)}, "input 1 of 'w' is nan"),
        ({"in_sum2": np.array([[-1, 2]], F32), "counts": np.ones((1, 1), F32)}, "input 0 of 'w' is -1.0"),
    ],
)
def test_damaged_gguf(tmp_path: Path, tensors: dict[str, np.ndarray], words: str) -> None:
    with pytest.raises(CorruptFileError, match=words):
        read_imatrix(edited(tmp_path / "a.gguf", **tensors))


def test_truncated_files(tmp_path: Path) -> None:
    write_imatrix(tmp_path / "a.gguf", SAMPLE)
    (tmp_path / "b.gguf").write_bytes((tmp_path / "a.gguf").read_bytes()[:-40])
    (tmp_path / "b.dat").write_bytes(legacy(*TWO)[:-4])
    for name in ("b.gguf", "b.dat"):
        with pytest.raises(TruncatedFileError, match=name):
            read_imatrix(tmp_path / name)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_file_crashes_the_reader(tmp_path: Path, data: st.DataObject) -> None:
    """Cut short anywhere, or with any byte changed: read as it is, or refused in words."""
    if not (tmp_path / "a.gguf").exists():
        write_imatrix(tmp_path / "a.gguf", SAMPLE)
    whole = data.draw(st.sampled_from([legacy(*TWO, tail=TAIL), (tmp_path / "a.gguf").read_bytes()]))
    at = data.draw(st.integers(0, len(whole) - 1))
    byte = data.draw(st.binary(min_size=1, max_size=4))
    changed = data.draw(st.sampled_from([whole[:at], whole[:at] + byte + whole[at + len(byte) :]]))
    (tmp_path / "b").write_bytes(changed)
    try:
        found = read_imatrix(tmp_path / "b")
    except QuantscopeError:
        return
    assert all(np.isfinite(e.mean).all() for e in found.entries.values())


# ---------------------------------------------------------------- against a model

SHAPES = {"blk.0.attn_q.weight": (16, 8), "blk.1.attn_q.weight": (16, 8), "blk.0.attn_norm.weight": (8,), "output.weight": (32, 8)}


def weights_for(**sizes: int) -> Imatrix:
    return Imatrix({f"blk.{n[1:]}.attn_q.weight": Entry(np.ones((1, size), F32), (1,)) for n, size in sizes.items()}, path=Path("i.gguf"))


def test_matrix_of_this_model() -> None:
    assert check_imatrix(weights_for(l0=8, l1=8), "m.gguf", SHAPES) == ()
    more = SHAPES | {"blk.1.ffn_up.weight": (32, 8)}
    assert check_imatrix(weights_for(l0=8, l1=8), "m.gguf", more) == ("blk.1.ffn_up.weight",)


def test_matrix_of_another_model() -> None:
    with pytest.raises(
        ShapeError, match=r"i\.gguf: 'blk\.1\.attn_q\.weight' has 16 weights, but in m\.gguf .* has 8 inputs.*another model"
    ):
        check_imatrix(weights_for(l0=8, l1=16), "m.gguf", SHAPES)
    with pytest.raises(UsageError, match=r"i\.gguf: it has weights for 'blk\.2\.attn_q\.weight' and 1 more, which m\.gguf does not have"):
        check_imatrix(weights_for(l0=8, l1=8, l2=8, l3=8), "m.gguf", SHAPES)
    with pytest.raises(UsageError, match=r"no weights for layer 1 of m\.gguf \(1 layer of 2"):
        check_imatrix(weights_for(l0=8), "m.gguf", SHAPES)


# ---------------------------------------------------------------- encoding with weights


def test_weights_that_do_not_fit() -> None:
    x = np.ones((2, 32), F32)
    for wrong in (np.ones(16, F32), np.ones(32), np.ones((2, 32), F32)):
        with pytest.raises(ShapeError, match=r"expected float32\[32\], one number per input"):
            encode(x, QTYPES["Q4_0"], 32, wrong)
    for bad in (np.nan, np.inf, -1):
        weights = np.ones(32, F32)
        weights[3] = bad
        with pytest.raises(NonFiniteError, match=r"importance \[3\] of 32"):
            encode(x, QTYPES["Q4_0"], 32, weights)
    with pytest.raises(NonFiniteError, match=r"element \[1\]\[5\]"):
        encode(np.where(np.arange(64).reshape(2, 32) == 37, np.nan, x).astype(F32), QTYPES["Q4_0"], 32, np.ones(32, F32))
    with pytest.raises(BlockError):
        encode(x, QTYPES["Q4_K"], 32, np.ones(32, F32))
    assert encode(np.empty((0, 32), F32), QTYPES["Q4_0"], 32, np.ones(32, F32)).size == 0


def test_floats_and_q8_0_take_no_notice() -> None:
    x = np.random.default_rng(0).standard_normal((4, 64)).astype(F32)
    for name in ("Q8_0", "F16", "F32"):
        assert (encode(x, QTYPES[name], 64, np.arange(64, dtype=F32)) == encode(x, QTYPES[name], 64)).all()


# ---------------------------------------------------------------- what is computed

TAPS = {"attn_q": "attn_norm", "attn_k": "attn_norm", "attn_v": "attn_norm", "attn_output": "kqv_out", "ffn_gate": "ffn_norm"}
TAPS |= {"ffn_up": "ffn_norm", "ffn_down": "ffn_swiglu"}


def plan(chunks: int, batches: int, in_slice: int) -> PlanInfo:
    return PlanInfo(batches, chunks, in_slice, 1, 1, 0, 0)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_sums_are_those_of_the_forward(tmp_path: Path, arch: str) -> None:
    weights = Weights(open_source(make_gguf(tmp_path / "m.gguf", arch=arch, n_embd=32, n_ff=48, tied=arch == "qwen3")))
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 288, (5, 16)))
    seen = Recorder()
    forward(ids, weights, seen)
    head = "token_embd.weight" if arch == "qwen3" else "output.weight"
    expected = {f"blk.{i}.{local}.weight": f"{tap}-{i}" for i in range(2) for local, tap in TAPS.items()} | {head: "result_norm"}
    for shape in (plan(5, 1, 5), plan(2, 3, 1)):
        found = compute_imatrix(Member("", weights), ids, shape, process_output=True)
        assert set(found.entries) == set(expected)
        assert (found.n_chunk, found.n_ctx) == (5, 16)
        for name, tap in expected.items():
            x = seen.taps[tap].double().numpy()
            np.testing.assert_allclose(found.of(name), (x**2).mean((0, 1)), rtol=2e-6)
            assert found.entries[name].counts == (80,)
    assert head not in compute_imatrix(Member("", weights), ids, plan(5, 1, 5)).entries


def test_activations_that_overflow(tmp_path: Path) -> None:
    huge = np.full(64, 3e38, F32)
    weights = Weights(open_source(make_gguf(tmp_path / "m.gguf", edit={"blk.0.attn_norm.weight": huge})))
    with pytest.raises(NonFiniteError, match=r"the input of blk\.0\.attn_q\.weight has squares that are NaN or infinite"):
        compute_imatrix(Member("", weights), torch.zeros(1, 8, dtype=torch.int64), plan(1, 1, 1))


# ---------------------------------------------------------------- the command


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("abc def ghi " * 40, "utf-8")
    return make_gguf(tmp_path / "m.gguf")


def test_command(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "i.gguf"
    command(str(model), text=tmp_path / "text.txt", out=out, ctx=32, chunks=3, json=True)
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert (document["n_chunk"], document["n_ctx"], len(document["tensors"])) == (3, 32, 14)
    assert "Wrote" in printed.err
    found = read_imatrix(out)
    assert found.datasets == ("text.txt",)
    row = next(t for t in document["tensors"] if t["name"] == "blk.1.ffn_down.weight")
    mean = found.of("blk.1.ffn_down.weight")
    assert mean is not None
    assert (row["n_in"], row["n_tokens"], row["largest"], row["at"]) == (96, 96, float(mean.max()), int(mean.argmax()))
    options = StudyOptions((str(model),), text=tmp_path / "text.txt", n_ctx=32, n_chunks=3)
    again = compute_importance(prepare_importance(options))
    assert all((again.entries[name].sums == entry.sums).all() for name, entry in found.entries.items())


def test_bad_input(model: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "i.gguf"
    (tmp_path / "short.txt").write_text("abc", "utf-8")
    with pytest.raises(PromptError, match=r"text has \d+ tokens, expected at least 256, two chunks of 128"):
        command(str(model), text=tmp_path / "short.txt", out=out, ctx=128)
    for ctx, chunks in ((0, None), (None, 0)):
        with pytest.raises(UsageError, match="expected at least 1"):
            command(str(model), text=text, out=out, ctx=ctx, chunks=chunks)
    with pytest.raises(UsageError, match="this is the input itself"):
        command(str(model), text=text, out=model, ctx=32)
    with pytest.raises(UsageError, match="expected a file in a folder that exists"):
        command(str(model), text=text, out=tmp_path / "no" / "i.gguf", ctx=32)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf", "short.txt", "text.txt"]


def test_disk_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: object, *_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(UsageError, match="could not be written: No space left on device"):
        write_imatrix(tmp_path / "a.gguf", SAMPLE)
    assert list(tmp_path.iterdir()) == []
