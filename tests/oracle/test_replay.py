"""Local replay of the real llama.cpp and Transformers: every operation of a clean run is cleared, planted faults are convicted alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers.models.llama.modeling_llama as modeling
from torch import Tensor

from quantscope import engines
from quantscope.diagnose.replay import Replay, replay
from quantscope.engines import KVType, Request
from quantscope.model.ggml_arithmetic import ggml_arithmetic
from quantscope.model.taps import tap_names
from quantscope.sources.resolve import open_source
from quantscope.trace import Trace
from quantscope.weights import Weights
from tests.hf_models import make_hf
from tests.models import LINEARS, make_gguf
from tests.oracle.ggml_cpu import SAME_ORDER
from tests.oracle.quantized_files import demo_file

PROMPT = (1, 620, 315, 261, 1311, 284, 3965, 12, 77, 1024)  # "It was a dark and stormy", and some more
IDS = (5, 17, 99, 3, 200, 31, 8, 100, 2)
OPERATIONS = [name for name in tap_names(10) if "_normed" not in name]


def run(engine: str, model: Path, tokens: tuple[int, ...] = PROMPT, kv: KVType = "F16") -> Trace:
    return engines.run(Request(engine, str(model), tokens, kv=kv, threads=1))


def convicted(r: Replay) -> list[str]:
    return [row.tap for row in r.those("convicted")]


@pytest.mark.parametrize(("preset", "kv"), [("F16", "F16"), ("Q8_0", "F16"), ("Q4_K_M", "F16"), ("Q4_0", "F16"), ("Q4_K_M", "F32")])
def test_llama_cpp_is_cleared(preset: str, kv: KVType) -> None:
    path = demo_file(preset)
    weights, trace, ggml = Weights(open_source(path)), run("llama.cpp", path, kv=kv), ggml_arithmetic(kv)
    r = replay(trace, weights, predicted=ggml)
    assert [row.tap for row in r.rows] == OPERATIONS
    assert {row.verdict for row in r.rows} == {"cleared"}, convicted(r)
    again = [row.nmse for row in replay(trace, weights, arithmetic=ggml, predicted=None).rows]
    assert all(error is not None and error <= 1e-9 for error in again)
    if SAME_ORDER:
        assert set(again) == {0}
    # the floors are needed: in float32 alone the products, which round activations, would be convicted
    assert "result_output" in convicted(replay(trace, weights, predicted=None))


def test_llama_cpp_on_another_file_than_said() -> None:
    """The products and the embedding of a Q4_0 file are not those of the F16 file; norms, sums and attention are still right."""
    r = replay(run("llama.cpp", demo_file("Q4_0")), Weights(open_source(demo_file("F16"))))
    products = ("embd", "Qcur_pre", "Kcur_pre", "Vcur", "attn_out", "ffn_gate", "ffn_up", "ffn_out", "result_output")
    assert set(convicted(r)) == {tap for tap in OPERATIONS if tap.partition("-")[0] in products}


@pytest.mark.parametrize(
    "model", [{"arch": "qwen2"}, {"arch": "qwen3"}, {"n_head_kv": 1, "head_dim": 32, "tied": True}, {"biases": LINEARS, "scales": LINEARS}]
)
@pytest.mark.parametrize("dtype", ["F32", "Q8_0"])
def test_llama_cpp_on_other_architectures(dtype: str, model: dict[str, Any], tmp_path: Path) -> None:
    path = make_gguf(tmp_path / "m.gguf", dtype=dtype, seed=5, **model)
    weights, trace = Weights(open_source(path)), run("llama.cpp", path, IDS)
    r = replay(trace, weights)
    assert {row.verdict for row in r.rows} == {"cleared"}, (convicted(r), r.those("not recorded"))
    assert len(r.rows) == len(trace.taps)


def test_transformers_is_cleared_without_a_prediction() -> None:
    path = demo_file("Q4_K_M")
    r = replay(run("transformers", path), Weights(open_source(path)), predicted=None)
    assert [row.tap for row in r.rows] == OPERATIONS
    assert {row.verdict for row in r.rows} == {"cleared"}, convicted(r)
    assert {row.floor for row in r.rows} == {1e-9}


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_transformers_on_a_folder(arch: str, tmp_path: Path) -> None:
    make_hf(tmp_path, arch, seed=4)
    r = replay(run("transformers", tmp_path, IDS), Weights(open_source(tmp_path)), predicted=None)
    assert {row.verdict for row in r.rows} == {"cleared"}, convicted(r)


def test_two_faults_in_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Key/value heads tiled where they are to be repeated, and a norm whose weight counts twice: in every layer, and nothing else."""
    make_hf(tmp_path, seed=4)

    def tiled(x: Tensor, n_rep: int) -> Tensor:
        return x.repeat(1, n_rep, 1, 1)  # [B,K,S,D] → [B,H,S,D]

    norm = modeling.LlamaRMSNorm.forward
    monkeypatch.setattr(modeling, "repeat_kv", tiled)
    monkeypatch.setattr(modeling.LlamaRMSNorm, "forward", lambda self, x: self.weight * norm(self, x))
    r = replay(run("transformers", tmp_path, IDS), Weights(open_source(tmp_path)))
    stems = ("attn_norm", "kq_soft_max", "kqv_out", "ffn_norm")
    assert set(convicted(r)) == {*(f"{stem}-{i}" for stem in stems for i in range(2)), "result_norm"}
    assert r.those("not recorded") == ()
