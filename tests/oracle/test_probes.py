"""Probes of the real engines: honest ones pass every check without a reference, planted faults show, a death costs one probe."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from quantscope import engines
from quantscope.compare import EXACT_FLOOR, compare
from quantscope.diagnose.probes import ProbeResult, run_probes
from quantscope.engines import IN_STEPS, Request
from quantscope.engines.isolated import run_several
from quantscope.errors import EngineError, PromptError, QuantscopeError
from quantscope.metrics import nmse
from quantscope.qtypes import KVType
from quantscope.trace import Full, Trace
from tests.hf_models import make_hf
from tests.models import STORIES, STORIES_PROMPT
from tests.oracle.quantized_files import demo_file

pytestmark = pytest.mark.long

PROMPT = (1, 1156, 327, 771, 261, 607, 469, 315, 261, 635, 1975)  # "Once upon a time there was a little girl"


def by_name(found: list[ProbeResult]) -> dict[str, ProbeResult]:
    return {r.probe.name: r for r in found}


@pytest.mark.parametrize(("preset", "kv"), [("F16", "F32"), ("Q8_0", "F16"), ("Q5_K_M", "F32"), ("Q4_K_M", "F16")])
def test_llama_cpp_agrees_with_itself(preset: str, kv: KVType) -> None:
    path = demo_file(preset)
    found = by_name(run_probes(Request("llama.cpp", str(path), (), kv=kv, threads=1), PROMPT))
    assert len(found) == 6
    for name in ("repeated", "prefix", "decode"):
        r = found[name]
        assert r.conclusion == "agrees", r
        assert r.nmse is not None
        assert r.floor is not None
        assert r.floor < 2e-2
    if kv == "F16":
        assert found["repeated"].nmse  # not the same to the last bit: something was compared
    for name, r in found.items():
        assert r.trace is not None
        assert r.trace.origin.tokens == r.tokens
        assert (IN_STEPS in r.trace.origin.notes) == (name == "decode")
    text = found["text"].trace
    assert text is not None
    assert compare(engines.run(Request("reference", str(path), PROMPT)), text, floor=2e-2).first_divergence is None


def test_transformers_agrees_with_itself(tmp_path: Path) -> None:
    make_hf(tmp_path, "qwen3", seed=4)
    for dtype in ("float32", "bfloat16"):
        found = by_name(run_probes(Request("transformers", str(tmp_path), (), dtype=dtype), (5, 17, 99, 3, 200, 17)))
        for name in ("repeated", "prefix", "decode"):
            assert found[name].conclusion == "agrees", found[name]
            assert (found[name].floor == EXACT_FLOOR) == (dtype == "float32")


def test_steps_have_every_tap_of_the_batch_but_the_maps(tmp_path: Path) -> None:
    make_hf(tmp_path, "llama", seed=2)
    for engine, model, ids in (
        ("reference", STORIES, STORIES_PROMPT),
        ("llama.cpp", STORIES, STORIES_PROMPT),
        ("transformers", tmp_path, (5, 9, 2)),
    ):
        batch, steps = (engines.run(Request(engine, str(model), ids, kv="F32", threads=None, steps=s)) for s in (False, True))
        assert set(steps.taps) == {tap for tap in batch.taps if not tap.startswith("kq_soft_max")}
        for tap in steps.taps:
            a, b = batch.find(tap, Full), steps.find(tap, Full)
            assert a is not None
            assert b is not None
            assert a.values.shape == b.values.shape
            assert float(nmse(a.values.flatten(), b.values.flatten())) < EXACT_FLOOR, tap
    some = engines.run(Request("reference", str(STORIES), STORIES_PROMPT, taps="l_out-1", fingerprint=True, steps=True))
    assert set(some.taps) == {"l_out-1"}


# ---- Engines with a fault, and dying ones ------------------------------------------------------------------------------------


def changed_child(folder: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    """The child process runs this code before it begins."""
    code = f"{change}\nimport runpy\nrunpy.run_module('quantscope.engines.isolated', run_name='__main__', alter_sys=True)"
    (folder / "child.py").write_text(code)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} {folder}/child.py "$@"\n')
    os.chmod(python, 0o755)
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    monkeypatch.setattr(sys, "executable", str(python))


LOSES_ITS_CACHE = """
import llama_cpp
from quantscope.engines.llama_session import LlamaSession
decode = LlamaSession.decode
def forgetful(self, ids, observer=None, n_past=0):
    if n_past:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
    return decode(self, ids, observer, n_past)
LlamaSession.decode = forgetful
"""
SEES_WHAT_FOLLOWS = """
import transformers.masking_utils, torch
from transformers.models.llama import modeling_llama
modeling_llama.create_causal_mask = lambda **more: None
"""
DIES_OF_STEPS = """
import os
from quantscope.engines import llama_cpp
llama_cpp._step_by_step = lambda *a, **m: os.abort()
"""


def test_a_lost_cache_shows_in_decoding_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed_child(tmp_path, monkeypatch, LOSES_ITS_CACHE)
    found = by_name(run_probes(Request("llama.cpp", str(demo_file("Q4_K_M")), (), threads=1), PROMPT))
    assert {name: r.conclusion for name, r in found.items() if r.probe.alone} == {
        "repeated": "agrees",
        "prefix": "agrees",
        "decode": "differs",
    }
    assert found["decode"].first == "kqv_out-0"


def test_a_missing_mask_shows_in_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_hf(tmp_path / "hf", "llama", seed=2)
    changed_child(tmp_path, monkeypatch, SEES_WHAT_FOLLOWS)
    found = by_name(run_probes(Request("transformers", str(tmp_path / "hf"), ()), (5, 17, 99, 3)))
    assert {name for name, r in found.items() if r.conclusion == "differs"} == {"prefix", "decode"}
    assert found["prefix"].first == "kqv_out-0"


def test_an_engine_that_dies_of_one_probe_does_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed_child(tmp_path, monkeypatch, DIES_OF_STEPS)
    found = by_name(run_probes(Request("llama.cpp", str(STORIES), (), threads=1), STORIES_PROMPT))
    assert found["decode"].conclusion == "failed"
    assert "died of SIGABRT" in found["decode"].error
    assert found["prefix"].conclusion == "agrees"
    steps = Request("llama.cpp", str(STORIES), STORIES_PROMPT, threads=1, steps=True)
    plain = Request("llama.cpp", str(STORIES), STORIES_PROMPT, threads=1)
    results = run_several(
        [steps, plain, Request("llama.cpp", str(STORIES), (1, 100_000)), steps, Request("reference", str(STORIES), (1,)), plain]
    )
    kinds: list[type] = [EngineError, Trace, PromptError, EngineError, Trace, Trace]
    assert [type(r) for r in results] == kinds
    assert isinstance(results[2], QuantscopeError)
    assert isinstance(results[1], Trace)
    logits = results[1].find("result_output", Full)
    assert logits is not None
    assert torch.isfinite(logits.values).all()
