"""Latent attention beside the real llama.cpp: its roundings, its steps over the cache, and planted errors in it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from torch import Tensor

from quantscope.diagnose.activation_rounding import activation_rounding
from quantscope.diagnose.altered import Altered, attending, turning
from quantscope.diagnose.local import causes
from quantscope.diagnose.replay import replay
from quantscope.engines import Request, run
from quantscope.engines.llama_session import LlamaSession
from quantscope.model.arithmetic import Arithmetic
from quantscope.model.forward import KVCache, forward
from quantscope.model.ggml_arithmetic import ggml_arithmetic
from quantscope.model.taps import Recorder, stem_of
from quantscope.qtypes import KVType
from quantscope.sources.resolve import open_source
from quantscope.trace import Full, Origin, Trace
from quantscope.weights import Weights
from tests.arch_models import make_arch
from tests.e2e.commands import Capture, ran
from tests.oracle.ggml_cpu import SAME_ORDER
from tests.oracle.llama_quant import quantized_types
from tests.oracle.test_arithmetic import MAX_NMSE, next_logits, nmse, traces

BY_HEAD, IN_ONE = "deepseek2-wide", "deepseek2-wide-one-matrix"
PRESETS = ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q4_K_M", "Q4_0")


@cache
def _folder() -> TemporaryDirectory[str]:
    return TemporaryDirectory(prefix="quantscope-latent-")


@cache
def model(case: str, preset: str = "F32") -> Path:
    """The random model of a case as llama-quantize stores it."""
    path = Path(_folder().name) / f"{case}-{preset}.gguf"
    if preset == "F32":
        return make_arch(path, case)
    assert quantized_types(model(case), path, preset) is not None
    return path


def ids_of(n: int) -> list[int]:
    return np.random.default_rng(7).integers(0, 288, n).tolist()


@pytest.mark.parametrize("kv", ["F16", "F32"])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("case", [BY_HEAD, IN_ONE])
def test_every_tap_of_a_model(case: str, preset: str, kv: KVType) -> None:
    """Bit for bit where the order of summation is the same; elsewhere what attends agrees to it, from inputs that agree to it."""
    theirs, ours, exact = traces_of(model(case, preset), ids_of(40), kv)
    if SAME_ORDER:
        assert [name for name in theirs if not np.array_equal(theirs[name], ours[name])] == []
    keys = "Kcur_latent-0" if case == BY_HEAD else "Kcur-0"
    assert nmse(theirs[keys], ours[keys]) <= MAX_NMSE
    if (preset, kv) != ("F32", "F32"):
        assert nmse(theirs["kqv_out-0"], ours["kqv_out-0"]) < nmse(theirs["kqv_out-0"], exact["kqv_out-0"]) / 4
        assert nmse(theirs["result_output"], ours["result_output"]) < nmse(theirs["result_output"], exact["result_output"]) * 2


def traces_of(path: Path, ids: list[int], kv: KVType) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """``traces`` of the taps that llama.cpp has; it may do without q, k and v of every head."""
    return traces(path, ids, kv, missing=("Qcur", "Kcur", "Vcur"))


@pytest.mark.parametrize("n_tokens", [1, 2, 5])
@pytest.mark.parametrize("preset", ["F16", "Q8_0", "Q6_K", "Q4_K_M"])
def test_short_prompts(preset: str, n_tokens: int) -> None:
    """Fewer than eight rows go one by one through the matrices of K types, one row through all of them."""
    theirs, ours, exact = traces_of(model(BY_HEAD, preset), ids_of(n_tokens), "F16")
    if SAME_ORDER:
        assert [name for name in theirs if not np.array_equal(theirs[name], ours[name])] == []
    assert nmse(theirs["l_out-0"], ours["l_out-0"]) < nmse(theirs["l_out-0"], exact["l_out-0"]) / 4


@pytest.mark.parametrize("case", [BY_HEAD, IN_ONE])
def test_decoding_step_by_step(case: str) -> None:
    """A prompt, then one token after the other over an F16 cache of latent vectors, or of keys and values."""
    path, ids = model(case, "Q4_K_M"), ids_of(12)
    with LlamaSession(path, kv="F16") as llama:
        theirs = [llama.decode(ids[:9]), *(next_logits(llama, ids[t], t) for t in range(9, 12))]
    weights, held, arithmetic = Weights(open_source(path)), KVCache(), ggml_arithmetic("F16")
    parts = [ids[:9], *([token] for token in ids[9:])]
    ours = [forward(torch.tensor([part]), weights, cache=held, arithmetic=arithmetic)[0].numpy() for part in parts]
    for a, b in zip(theirs, ours, strict=True):
        if SAME_ORDER:
            assert np.array_equal(a, b)
        assert nmse(a, b) < 1e-3


# ---- diagnosis -----------------------------------------------------------------------------------------------------------------------

TOKENS = "1,17,250,31,99,42,8,77,120,5"
SHOWN = ("Qcur", "Kcur", "Vcur")  # not by an engine that attends to latent vectors


def replayed_engine(path: Path, m: Arithmetic) -> Trace:
    """What an engine that computes by m shows of a file, as llama.cpp would show it."""
    recorder, ids = Recorder(), ids_of(24)
    forward(torch.tensor([ids]), Weights(open_source(path)), recorder, arithmetic=m)
    taps = {name: (Full(x[0]),) for name, x in recorder.taps.items() if stem_of(name) not in SHOWN}
    return Trace(Origin("engine", "", "ggml, F16 cache", path.name, None, "deepseek2", tuple(ids)), taps)


@pytest.mark.parametrize(("case", "preset"), [(BY_HEAD, "Q4_0"), (BY_HEAD, "F16"), (IN_ONE, "Q4_0")])
def test_every_operation_of_llama_cpp_is_cleared(case: str, preset: str) -> None:
    """By a floor that is needed: in float32 alone the products with k_b and v_b, which round activations, would be convicted."""
    path, ids = model(case, preset), tuple(ids_of(24))
    weights, trace = Weights(open_source(path), keep=True), run(Request("llama.cpp", str(path), ids, kv="F16", threads=1))
    found = replay(trace, weights)
    assert found.those("convicted") == ()
    assert {stem_of(row.tap) for row in found.those("not recorded")} == (set(SHOWN) if case == BY_HEAD else set())
    convicted = {stem_of(row.tap) for row in replay(trace, weights, predicted=None).those("convicted")}
    assert ({"Qcur_latent", "kqv_out"} if case == BY_HEAD else {"Kcur", "Vcur", "kqv_out"}) <= convicted


@pytest.mark.long
@pytest.mark.parametrize("case", [BY_HEAD, IN_ONE])
def test_diagnose_clears_llama_cpp(case: str, capsys: Capture) -> None:
    """The quantization is what changed, the engine rounds as expected, and every operation is right by itself."""
    path = model(case, "Q4_0")
    command = ("diagnose", path, "--against", "llama.cpp", "--original", model(case), "--tokens", TOKENS, "--quick", "--json")
    found = json.loads(ran(capsys, *command)[0])
    assert found["verdict"] in ("within", "quantization")
    assert found["causes"]["convicted"] == []
    assert found["taps"]
    for row in found["split"]:
        if row["tap"].startswith("l_out"):
            assert 0.3 < row["engine"] / row["predicted"] < 3 < row["quantization"] / row["engine"]


def without_norm(m: Arithmetic, x: Tensor, w: Mapping[str, Tensor], name: str, eps: float) -> Tensor:
    return x if name == "attn_kv_a_norm" else m.rms_norm(x, w, name, eps)


PLANTED: dict[str, tuple[Callable[[Arithmetic], Arithmetic], str, str]] = {
    "does not turn the key's part": (lambda m: turning(m, never="k"), "Kcur_latent", "rope-missing-k"),
    "turns q one position further": (lambda m: turning(m, positions=lambda p: p + 1, only="q"), "Qcur_latent", "rope-offset-q"),
    "turns in half-split pairs": (lambda m: turning(m, config=lambda c: replace(c, layout="half")), "Qcur_latent", "rope-layout"),
    "scales by what a latent key is long": (lambda m: attending(m, factor=(192 / 320) ** 0.5), "kq_soft_max", ""),
    "does not norm the latent vector": (lambda m: Altered(m, rms_norm=without_norm), "Kcur_latent", "norm-missing"),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_error_is_convicted(fault: str) -> None:
    path, (wrong, stem, name) = model(BY_HEAD, "Q8_0"), PLANTED[fault]
    weights = Weights(open_source(path), keep=True)
    assert replay(replayed_engine(path, ggml_arithmetic("F16")), weights).those("convicted") == ()
    trace = replayed_engine(path, wrong(ggml_arithmetic("F16")))
    convicted = replay(trace, weights).those("convicted")
    assert {stem} <= {stem_of(row.tap) for row in convicted} <= {stem, *(("Kcur_latent",) if name == "rope-layout" else ())}
    if name:
        assert all(name in {c.instance.fault.name for c in own} for own in causes(trace, weights, convicted[:1]).values())


def test_another_matrix_of_the_values_is_convicted(tmp_path: Path) -> None:
    """An engine that gives every head its neighbour's attn_v_b."""
    original = Weights(open_source(model(BY_HEAD)))
    edit = {"blk.1.attn_v_b.weight": np.roll(original.get("blk.1.attn_v_b.weight").numpy(), 1, axis=0)}
    path = make_arch(tmp_path / "engine.gguf", BY_HEAD, edit=edit)
    found = replay(replayed_engine(path, ggml_arithmetic("F16")), original)
    assert [row.tap for row in found.those("convicted")] == ["kqv_out-1"]


def test_a_token_that_activation_rounding_changes() -> None:
    """The search for the products that do it, some of which a model like Llama does not have."""
    weights, ids = Weights(open_source(model(BY_HEAD, "Q4_0")), keep=True), torch.tensor([[133, 185, 222, 246]])
    found = activation_rounding(weights, ids)
    assert found is not None
    assert "attn_norm-1" in found.places
    assert found.left < 0.5
