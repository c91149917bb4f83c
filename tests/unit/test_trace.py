"""Traces on disk and in memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from quantscope.errors import MissingFileError, TraceContentError, TraceFormatError, TraceMismatchError
from quantscope.trace import Evidence, Fingerprint, Full, Origin, Sample, Stats, Trace, check_same_run, covered, rows_of
from quantscope.trace_file import KEY, load, save

FULL = Full(torch.arange(6.0).reshape(2, 3))
SAMPLE = Sample(torch.tensor([1.0, -2.0]), torch.tensor([0, 5]), (2, 3), (4, 7), 4)
STATS = Stats({"rms": 1.5, "sum": -2.0}, (3,), {"rms": 6})
PRINT = Fingerprint(torch.arange(16.0), 6, 1.0, 5.0, 5, None)
ORIGIN = Origin("llama.cpp", "1", "ggml", "m.gguf", "ab" * 32, "llama", (1, 2), (0, 1), "float32", {"n_head": 4}, ("a note",))


def same(a: Evidence, b: Evidence) -> bool:
    """Equal in every field, tensors value by value."""
    fields = a.__dataclass_fields__
    pairs = [(getattr(a, name), getattr(b, name)) for name in fields]
    return type(a) is type(b) and all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


def test_a_trace_survives_the_disk(tmp_path: Path) -> None:
    trace = Trace(ORIGIN, {"l_out-0": (FULL, STATS, Stats({"mean": 0.5})), "odd name/1": (SAMPLE,), "embd": (PRINT, SAMPLE)})
    save(trace, tmp_path / "t.safetensors")
    back = load(tmp_path / "t.safetensors")
    assert back.origin == trace.origin
    assert list(back.taps) == list(trace.taps)
    assert all(same(a, b) for name in trace.taps for a, b in zip(trace.taps[name], back.taps[name], strict=True))
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]


@settings(max_examples=30, deadline=None)
@given(
    pieces=st.lists(st.sampled_from([FULL, SAMPLE, STATS, PRINT]), max_size=5),
    tokens=st.none() | st.lists(st.integers(0, 10**6), max_size=5).map(tuple),
    positions=st.none() | st.lists(st.integers(0, 100), max_size=5).map(tuple),
)
def test_any_mixture_survives(
    tmp_path_factory: pytest.TempPathFactory,
    pieces: list[Evidence],
    tokens: tuple[int, ...] | None,
    positions: tuple[int, ...] | None,
) -> None:
    path = tmp_path_factory.mktemp("t") / "t.safetensors"
    trace = Trace(Origin("x", tokens=tokens, positions=positions), {"a": tuple(pieces), "b": (FULL,)})
    save(trace, path)
    back = load(path)
    assert back.origin == trace.origin
    assert len(back.taps.get("a", ())) == len(pieces)
    assert all(same(a, b) for a, b in zip(pieces, back.taps.get("a", ()), strict=True))


def test_a_file_that_is_no_trace(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="quantscope trace"):
        load(tmp_path / "no.safetensors")
    save_file({"x": torch.ones(2)}, tmp_path / "plain.safetensors")
    with pytest.raises(TraceFormatError, match="quantscope import"):
        load(tmp_path / "plain.safetensors")
    save_file({"x": torch.ones(2)}, tmp_path / "new.safetensors", metadata={KEY: json.dumps({"version": 9})})
    with pytest.raises(TraceFormatError, match="version 9, expected 1"):
        load(tmp_path / "new.safetensors")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(TraceFormatError, match="cut short"):
        load(tmp_path / "text")


@pytest.mark.parametrize("keep", [0, 4, 9, 200, -8])
def test_a_damaged_trace_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "t.safetensors"
    save(Trace(ORIGIN, {"a": (FULL, SAMPLE)}), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(TraceFormatError):
        load(path)


def test_a_trace_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TraceFormatError, match="could not be written"):
        save(Trace(ORIGIN, {"a": (FULL,)}), tmp_path / "no such folder" / "t.safetensors")
    (tmp_path / "folder").mkdir()
    with pytest.raises(TraceFormatError):
        save(Trace(ORIGIN, {"a": (FULL,)}), tmp_path / "folder")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_other_tokens_or_files_are_refused() -> None:
    a = Origin("a", tokens=(1, 2, 3), model="m", model_sha256="1" * 64)
    check_same_run(a, Origin("b"))  # nothing is known of it
    with pytest.raises(TraceMismatchError, match="first at position 1: 2 against 9"):
        check_same_run(a, Origin("b", tokens=(1, 9, 3)))
    with pytest.raises(TraceMismatchError, match="agree up to position 1"):
        check_same_run(a, Origin("b", tokens=(1, 2)))
    other = Origin("b", tokens=(1, 2, 3), model="n", model_sha256="2" * 64)
    with pytest.raises(TraceMismatchError, match="same model file"):
        check_same_run(a, other)
    check_same_run(a, other, same_file=False)


def test_positions() -> None:
    assert covered(FULL, Origin("x", tokens=(5, 6))) == (0, 1)
    assert covered(FULL, Origin("x", tokens=(5, 6, 7), positions=(1, 2))) == (1, 2)
    assert covered(SAMPLE, ORIGIN) == (4, 7)
    assert covered(FULL, Origin("x")) is None
    last = Full(torch.arange(6.0).reshape(2, 3), (1, 2))
    assert rows_of(last, Origin("x"), (2,)).tolist() == [[3, 4, 5]]
    with pytest.raises(TraceContentError, match=r"\[0\] are not in this trace"):
        rows_of(last, Origin("x"), (0, 1))
    maps = Full(torch.arange(12.0).reshape(2, 3, 2), (0, 1, 2))
    assert rows_of(maps, Origin("x"), (1,)).tolist() == [[[2, 3]], [[8, 9]]]


def test_the_evidence_with_most_positions_is_found() -> None:
    trace = Trace(Origin("x"), {"a": (Stats({"rms": 1}, (3,)), Stats({"rms": 2}), Stats({"rms": 3}, (1, 2)))})
    found = trace.find("a", Stats)
    assert found is not None
    assert found.values == {"rms": 2}
    assert trace.find("a", Full) is None
    assert trace.find("b", Stats) is None
