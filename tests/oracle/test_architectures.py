"""Every architecture of the table against the real llama.cpp: logits, every tap that both have, and every operation by itself.

Small random models (``tests/arch_models.py``) in F32 with an F32 cache.  ggml computes GELU with a table of float16, so a model with GELU
is held against the emulated arithmetic as well, which has that table.  The models of llama.cpp's own ``test-llama-archs`` are slow: its
program must be built.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.llama_programs import arch_models
from quantscope.arch.table import ARCHS
from quantscope.diagnose.replay import replay
from quantscope.engines.llama_session import LlamaSession, Values
from quantscope.metrics import nmse
from quantscope.model.arithmetic import EXACT, Arithmetic
from quantscope.model.forward import forward
from quantscope.model.ggml_arithmetic import ggml_arithmetic
from quantscope.model.taps import Recorder
from quantscope.model.wiring import model_taps
from quantscope.qtypes import KVType
from quantscope.sources.resolve import open_source
from quantscope.trace import Full, Origin, Trace
from quantscope.weights import Weights
from tests.arch_models import CASES, arch_of, make_arch
from tests.oracle.llama_quant import quantized_types

MAX_LOGITS = 1e-8  # NMSE
MAX_TAP = 5e-8
TABLE_OF_GELU = 5e-7  # what a table of float16 does to exact GELU, in the worst tap
N_TOKENS = 40
NOT_OURS = {"stablelm-parallel": ("ffn_inp",)}  # taps that only llama.cpp has


def ids_of(n_vocab: int) -> list[int]:
    return np.random.default_rng(7).integers(0, n_vocab, N_TOKENS).tolist()


def their_taps(path: Path, ids: list[int]) -> dict[str, Values]:
    with LlamaSession(path, n_ctx=len(ids)) as llama:
        return llama.taps(ids)[0]


def our_taps(weights: Weights, ids: list[int], arithmetic: Arithmetic = EXACT) -> dict[str, torch.Tensor]:
    recorder = Recorder()
    forward(torch.tensor([ids]), weights, recorder, arithmetic=arithmetic)
    return {name: x[0] for name, x in recorder.taps.items()}


def errors(theirs: dict[str, Values], ours: dict[str, torch.Tensor]) -> dict[str, float]:
    """NMSE of every tap that both have; of the numbers of experts, the share that differs."""
    found = {}
    for name in theirs.keys() & ours.keys():
        a, b = torch.from_numpy(theirs[name]).double().flatten(), ours[name].double().flatten()
        found[name] = float((a != b).double().mean()) if name.startswith("ffn_moe_topk") else float(nmse(a, b))
    return found


def worst(found: dict[str, float]) -> tuple[str, float]:
    name = max(found, key=found.__getitem__)
    return name, found[name]


def test_every_architecture_has_a_case() -> None:
    assert {arch_of(case) for case in CASES} == set(ARCHS)


@pytest.mark.parametrize("case", CASES)
def test_taps_and_logits_equal_llama_cpp(case: str, tmp_path: Path) -> None:
    path = make_arch(tmp_path / "m.gguf", case)
    weights, ids = Weights(open_source(path)), ids_of(288)
    assert weights.unused == ()
    assert weights.config.ignored_keys == ()
    theirs, exact, emulated = their_taps(path, ids), our_taps(weights, ids), our_taps(weights, ids, ggml_arithmetic("F32"))
    assert set(exact) == set(model_taps(weights))
    assert {name.partition("-")[0] for name in theirs.keys() - exact.keys()} == set(NOT_OURS.get(case, ()))
    assert len(theirs) > 10 * weights.config.n_layer
    rounded, table = errors(theirs, emulated), weights.config.block.activation == "gelu"
    assert rounded["result_output"] <= MAX_LOGITS
    assert worst(rounded)[1] <= MAX_TAP, worst(rounded)
    found = errors(theirs, exact)
    assert worst(found)[1] <= (TABLE_OF_GELU if table else MAX_TAP), worst(found)
    assert table or found["result_output"] <= MAX_LOGITS
    assert worst(found)[1] > 0


@pytest.mark.parametrize("case", CASES)
def test_replay_clears_every_operation_of_llama_cpp(case: str, tmp_path: Path) -> None:
    path = make_arch(tmp_path / "m.gguf", case, seed=1)
    weights, ids = Weights(open_source(path)), ids_of(288)
    taps = {name: (Full(torch.from_numpy(x).float()),) for name, x in their_taps(path, ids).items()}
    origin = Origin("llama.cpp", "", "ggml, F32 cache", "m.gguf", None, arch_of(case), tuple(ids))
    found = replay(Trace(origin, taps), weights, predicted=ggml_arithmetic("F32"))
    assert [(row.tap, row.nmse, row.floor) for row in found.those("convicted")] == []
    judged = {row.tap.partition("-")[0] for row in found.those("cleared")}
    assert {"kq_soft_max", "kqv_out", "attn_out", "l_out", "result_output"} <= judged
    written_out = weights.config.n_layer * 3 if "attn_k_b.weight" in weights.layer_names(0) else 0  # q, k and v that llama.cpp does without
    assert len(found.those("cleared")) >= 0.9 * (len(found.rows) - written_out)


@pytest.mark.parametrize("case", ["llama", "qwen2moe", "gemma2", "phi2", "gpt-oss", "deepseek2", "bloom"])
def test_a_wrong_weight_is_found_in_any_architecture(case: str, tmp_path: Path) -> None:
    """What replay convicts when the engine read another output projection and another feed-forward matrix."""
    path = make_arch(tmp_path / "m.gguf", case)
    weights, ids = Weights(open_source(path)), ids_of(288)
    down = "blk.1.ffn_down_exps.weight" if "blk.1.ffn_down_exps.weight" in weights.names() else "blk.1.ffn_down.weight"
    edit = {name: np.roll(weights.get(name).numpy(), 1, axis=-2) for name in ("blk.0.attn_output.weight", down)}
    engine = make_arch(tmp_path / "engine.gguf", case, edit=edit)
    taps = {name: (Full(torch.from_numpy(x).float()),) for name, x in their_taps(engine, ids).items()}
    origin = Origin("llama.cpp", "", "ggml, F32 cache", "m.gguf", None, arch_of(case), tuple(ids))
    found = replay(Trace(origin, taps), weights, predicted=ggml_arithmetic("F32"))
    assert [row.tap for row in found.those("convicted")] == ["attn_out-0", "ffn_moe_down-1" if "exps" in down else "ffn_out-1"]


@pytest.mark.parametrize("kv", ["F32", "F16"])
def test_experts_in_mxfp4(kv: KVType, tmp_path: Path) -> None:
    """gpt-oss as llama-quantize writes it: experts in MXFP4, the other matrices in Q8_0."""
    path = tmp_path / "mxfp4.gguf"
    types = quantized_types(make_arch(tmp_path / "m.gguf", "gpt-oss"), path, "MXFP4_MOE")
    assert types is not None
    assert {str(kind) for name, kind in types.items() if name.endswith("exps.weight")} == {"MXFP4"}
    weights, ids = Weights(open_source(path)), ids_of(288)
    with LlamaSession(path, n_ctx=len(ids), kv=kv) as llama:
        theirs = llama.taps(ids)[0]
    emulated, exact = errors(theirs, our_taps(weights, ids, ggml_arithmetic(kv))), errors(theirs, our_taps(weights, ids))
    assert emulated["result_output"] <= MAX_LOGITS
    assert worst(emulated)[1] <= MAX_TAP, worst(emulated)
    assert exact["result_output"] > 1e3 * MAX_LOGITS  # the bound tells rounded activations from exact ones


def test_a_layer_that_predicts_further_tokens_is_left_out(tmp_path: Path) -> None:
    """GLM-4.5 files have one layer more than the graph, for speculative decoding."""
    plain = Weights(open_source(make_arch(tmp_path / "plain.gguf", "glm4moe")))
    last = plain.config.n_layer
    more = {f"blk.{last}.{local}": plain.get(name).numpy() for local, name in plain.layer_names(last - 1).items()}
    E = plain.config.n_embd
    more |= {
        f"blk.{last}.nextn.{name}.weight": np.ones(shape, np.float32)
        for name, shape in (("eh_proj", (E, 2 * E)), ("enorm", E), ("hnorm", E))
    }
    path = make_arch(tmp_path / "m.gguf", "glm4moe", edit=more, keys={"block_count": last + 1, "nextn_predict_layers": 1})
    weights, ids = Weights(open_source(path)), ids_of(288)
    assert set(weights.unused) == set(more)
    assert errors(their_taps(path, ids), our_taps(weights, ids))["result_output"] <= MAX_LOGITS


@pytest.mark.parametrize("case", CASES)
def test_steps_over_the_cache_equal_one_batch(case: str, tmp_path: Path) -> None:
    from quantscope.golden.record import step_by_step

    weights, ids = Weights(open_source(make_arch(tmp_path / "m.gguf", case)), keep=True), ids_of(288)[:12]
    whole, stepped = our_taps(weights, ids), step_by_step(weights, ids)
    assert float(nmse(whole["result_output"].flatten(), stepped["result_output"].flatten())) <= 1e-10


@pytest.mark.slow
def test_models_of_llama_cpps_own_test(tmp_path: Path) -> None:
    """Every model that ``test-llama-archs`` makes of an architecture of the table."""
    checked = set()
    for path in sorted(arch_models(tmp_path, seed=1234).glob("*.gguf")):
        source = open_source(path)
        if source.metadata["general.architecture"] not in ARCHS or path.stem in NO_GRAPH:
            continue
        weights, ids = Weights(source), ids_of(128)
        theirs = their_taps(path, ids)
        rounded, exact = errors(theirs, our_taps(weights, ids, ggml_arithmetic("F32"))), errors(theirs, our_taps(weights, ids))
        assert rounded["result_output"] <= MAX_LOGITS, (path.name, rounded["result_output"])
        assert worst(rounded)[1] <= MAX_TAP, (path.name, worst(rounded))
        assert worst(exact)[1] <= TABLE_OF_GELU, (path.name, worst(exact))
        checked.add(weights.config.arch)
    assert checked == set(ARCHS)


NO_GRAPH = ("refact-moe",)  # llama.cpp loads its experts and computes without them
