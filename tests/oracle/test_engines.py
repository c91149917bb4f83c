"""llama.cpp and Transformers as engines: the same taps as the reference, their own words when they refuse, survival when they die."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from quantscope import engines
from quantscope.compare import EXACT_FLOOR, compare
from quantscope.engines import KVType, Request, isolated
from quantscope.engines.isolated import run_isolated
from quantscope.errors import EngineError, PromptError, QuantscopeError, TraceContentError, UsageError
from quantscope.model.taps import tap_names
from quantscope.three_way import three_way
from quantscope.trace import Fingerprint, Full, Trace
from tests.hf_models import make_hf
from tests.models import STORIES, STORIES_PROMPT, make_gguf
from tests.oracle.quantized_files import PRESETS, demo_file

PROMPT = (1, 620, 315, 261, 1311, 284, 3965)  # "It was a dark and stormy"
# what llama.cpp's rounding of activations may cost against exact arithmetic on the same file, by the type of most weights
LARGEST = {"F32": EXACT_FLOOR, "F16": 1e-6, "Q8_0": 2e-3, "Q6_K": 2e-3, "Q5_K_M": 2e-3, "Q4_K_M": 2e-3, "Q4_0": 2e-3}


def run(engine: str, model: Path, tokens: tuple[int, ...] = PROMPT, kv: KVType = "F32", **more: str | bool) -> Trace:
    return engines.run(Request(engine, str(model), tokens, kv=kv, threads=1, **more))  # type: ignore[arg-type]


@pytest.mark.parametrize("preset", PRESETS)
def test_llama_cpp_shows_the_taps_of_the_reference(preset: str) -> None:
    path = demo_file(preset)
    ref, test = run("reference", path), run("llama.cpp", path)
    assert set(ref.taps) == set(test.taps) == {n for n in tap_names(10) if "normed" not in n}
    c = compare(ref, test, floor=LARGEST[preset])
    assert len(c.rows) == len(ref.taps)
    assert c.first_divergence is None, c.first_divergence
    assert any("Observing" in note for note in test.origin.notes)
    if preset != "F32":  # rounding is there and is seen: the comparison is not empty
        assert compare(ref, test, floor=EXACT_FLOOR).first_divergence is not None


@pytest.mark.parametrize("preset", PRESETS)
def test_the_three_way_split(preset: str) -> None:
    """What llama.cpp adds to a file's exact result is what its emulated arithmetic adds, at every layer."""
    path = demo_file(preset)
    original, exact = run("reference", demo_file("F32")), run("reference", path)
    predicted = engines.run(Request("reference", str(path), PROMPT, arithmetic="ggml", kv="F16"))
    rows = three_way(exact, run("llama.cpp", path, kv="F16"), original=original, predicted=predicted)
    assert [row.tap for row in rows] == [*(f"l_out-{i}" for i in range(10)), "result_output"]
    for row in rows:
        assert row.predicted is not None
        assert row.quantization is not None
        assert 0.4 < row.engine / row.predicted < 2.5, row
        assert (row.quantization == 0) == (preset in ("F32", "F16"))  # the original is the F16 file's weights


@pytest.mark.parametrize("preset", PRESETS)
def test_transformers_reads_the_same_file(preset: str) -> None:
    path = demo_file(preset)
    c = compare(run("reference", path), run("transformers", path))
    assert len(c.rows) == len([n for n in tap_names(10) if "normed" not in n])
    assert c.floor_source.startswith("an NMSE of 1e-09")
    assert c.first_divergence is None, c.first_divergence


def test_a_tiny_trained_model_in_both_engines() -> None:
    ref = run("reference", STORIES, STORIES_PROMPT)
    for engine in ("llama.cpp", "transformers"):
        c = compare(ref, run(engine, STORIES, STORIES_PROMPT), floor=EXACT_FLOOR)
        assert len(c.rows) == len(ref.taps)
        assert c.first_divergence is None


def test_an_f16_cache_rounds_more_than_an_f32_cache() -> None:
    ref = run("reference", demo_file("F32"))
    errors = {kv: {r.tap: r.nmse for r in compare(ref, run("llama.cpp", demo_file("F32"), kv=kv)).rows} for kv in ("F16", "F32")}
    assert errors["F16"]["Vcur-0"] == pytest.approx(errors["F32"]["Vcur-0"])
    assert errors["F32"]["kqv_out-0"] < EXACT_FLOOR < errors["F16"]["kqv_out-0"]


def test_a_hugging_face_folder_in_float32_and_bfloat16(tmp_path: Path) -> None:
    make_hf(tmp_path, "qwen3", seed=4)
    ids = (5, 17, 99, 3, 200)
    ref = run("reference", tmp_path, ids)
    assert any("normed" in tap for tap in ref.taps)
    exact = compare(ref, run("transformers", tmp_path, ids))
    assert len(exact.rows) == len(ref.taps)
    assert exact.first_divergence is None
    rounded = compare(ref, run("transformers", tmp_path, ids, dtype="bfloat16"), floor=EXACT_FLOOR)
    assert rounded.first_divergence is not None
    assert rounded.first_divergence.nmse < 1e-3


@pytest.mark.parametrize("engine", ["reference", "llama.cpp", "transformers"])
def test_only_the_wanted_taps_and_only_their_fingerprints(engine: str) -> None:
    some = run(engine, STORIES, STORIES_PROMPT, taps=r"^l_out-\d$|result_output", fingerprint=True)
    assert set(some.taps) == {*(f"l_out-{i}" for i in range(5)), "result_output"}
    assert all(isinstance(piece, Fingerprint) for pieces in some.taps.values() for piece in pieces)
    whole = run(engine, STORIES, STORIES_PROMPT)
    assert compare(whole, some, floor=1e-12).first_divergence is None
    with pytest.raises(TraceContentError, match="matches none of the"):
        run(engine, STORIES, STORIES_PROMPT, taps="l_uot")


def test_options_an_engine_does_not_have_are_refused() -> None:
    for wrong in ({"dtype": "bfloat16"}, {"taps": "("}):
        with pytest.raises(UsageError):
            run("reference", STORIES, **wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"expected one of reference, llama\.cpp, transformers"):
        run("candle", STORIES)
    with pytest.raises(UsageError, match="--arithmetic ggml"):
        run("llama.cpp", STORIES, arithmetic="ggml")


def test_ids_that_are_no_tokens(capfd: pytest.CaptureFixture[str]) -> None:
    for engine in ("reference", "llama.cpp", "transformers"):
        with pytest.raises(PromptError):
            run(engine, STORIES, (1, 100_000))
        with pytest.raises(PromptError):
            run(engine, STORIES, ())
    assert capfd.readouterr().err == ""


def test_llama_cpp_says_why_it_refuses(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lacking = make_gguf(tmp_path / "lacking.gguf", edit={"blk.1.ffn_down.weight": None})
    with pytest.raises(EngineError, match=r"blk\.1\.ffn_down\.weight"):
        run("llama.cpp", lacking)
    folder = tmp_path / "hf"
    make_hf(folder)
    with pytest.raises(EngineError, match="convert_hf_to_gguf"):
        run("llama.cpp", folder)
    assert capfd.readouterr().err == ""


def test_transformers_says_why_it_refuses(tmp_path: Path) -> None:
    lacking = make_gguf(tmp_path / "lacking.gguf", metadata={"general.architecture": "unheard-of"})
    with pytest.raises(QuantscopeError, match="unheard-of"):
        run("transformers", lacking)


def test_an_isolated_engine_gives_the_same_trace(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    request = Request("llama.cpp", str(STORIES), STORIES_PROMPT, kv="F32", threads=1)
    there, here = run_isolated(request, tmp_path / "t.safetensors"), engines.run(request)
    assert there.origin == here.origin
    for tap in here.taps:
        a, b = there.find(tap, Full), here.find(tap, Full)
        assert a is not None
        assert b is not None
        assert torch.equal(a.values, b.values)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    with pytest.raises(PromptError, match="100000"):
        run_isolated(Request("llama.cpp", str(STORIES), (1, 100_000)), tmp_path / "u.safetensors")


def test_an_engine_that_dies_is_an_error_with_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that prints something and aborts, as ggml does on a failed assertion."""
    dying = tmp_path / "python"
    dying.write_text(f"#!/bin/sh\necho 'GGML_ASSERT(x) failed' >&2\nkill -{signal.SIGABRT.value} $$\n")
    os.chmod(dying, 0o755)
    monkeypatch.setattr(isolated.sys, "executable", str(dying))
    with pytest.raises(EngineError, match=r"died of SIGABRT .*GGML_ASSERT\(x\) failed"):
        run_isolated(Request("llama.cpp", str(STORIES), STORIES_PROMPT), tmp_path / "t.safetensors")
    assert not (tmp_path / "t.safetensors").exists()
