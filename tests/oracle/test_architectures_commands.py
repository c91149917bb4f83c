"""trace, compare, diagnose, study and quantize on models that are no Llama, with the real llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from quantscope.engines import Request, run
from quantscope.engines.llama_session import LlamaSession
from quantscope.errors import CorruptFileError, UnsupportedFeatureError
from quantscope.metrics import nmse
from quantscope.model.forward import forward
from quantscope.model.ggml_arithmetic import ggml_arithmetic
from quantscope.remedy.supported import check_convertible, check_remediable
from quantscope.sources.resolve import open_source
from quantscope.trace import Full, Trace
from quantscope.weights import Weights
from tests.arch_models import make_arch
from tests.e2e.commands import Capture, ran, refused
from tests.hf_arch_models import make_hf_arch

IDS = (1, 17, 250, 31, 99, 42, 8, 77, 120, 5)
TOKENS = ("--tokens", ",".join(map(str, IDS)))
FAMILIES = ("qwen2moe", "gemma2", "phi2")


def values(trace: Trace, tap: str) -> torch.Tensor:
    found = trace.find(tap, Full)
    assert found is not None
    return found.values


@pytest.mark.parametrize("case", FAMILIES)
def test_an_engine_without_a_fault_is_within(case: str, tmp_path: Path, capsys: Capture) -> None:
    model = make_arch(tmp_path / "m.gguf", case)
    ran(capsys, "trace", model, *TOKENS, "-o", tmp_path / "ref.safetensors")
    ran(capsys, "trace", model, *TOKENS, "--engine", "llama.cpp", "-o", tmp_path / "test.safetensors")
    found = json.loads(ran(capsys, "compare", tmp_path / "ref.safetensors", tmp_path / "test.safetensors", "--json")[0])
    assert found["first_divergence"] is None
    assert len(found["taps"]) > 30
    found = json.loads(ran(capsys, "diagnose", model, *TOKENS, "--against", "llama.cpp", "--quick", "--json")[0])
    assert found["verdict"] == "within"
    assert found["causes"]["convicted"] == []


def test_steps_have_a_row_a_token(tmp_path: Path) -> None:
    """llama.cpp names a node of a biased product twice, before and after the bias."""
    trace = run(Request("llama.cpp", str(make_arch(tmp_path / "m.gguf", "qwen2")), IDS, steps=True, threads=1))
    assert {values(trace, tap).shape[0] for tap in trace.taps} == {len(IDS)}


@pytest.mark.parametrize("case", ["llama-moe", "phi2"])
@pytest.mark.parametrize("dtype", ["Q4_0", "Q8_0"])
def test_emulated_arithmetic_of_quantized_experts(case: str, dtype: str, tmp_path: Path) -> None:
    path = make_arch(tmp_path / "m.gguf", case, dtype=dtype)
    with LlamaSession(path, n_ctx=len(IDS)) as llama:
        theirs = torch.from_numpy(llama.decode(list(IDS))).flatten()
    weights = Weights(open_source(path))
    assert float(nmse(theirs, forward(torch.tensor([IDS]), weights, arithmetic=ggml_arithmetic("F32")).flatten())) <= 1e-8


def test_experts_that_no_token_reaches_are_named(tmp_path: Path, capsys: Capture) -> None:
    model = make_arch(tmp_path / "m.gguf", "qwen2moe")
    out, _ = ran(capsys, "trace", model, "--tokens", "1", "-o", tmp_path / "t.safetensors")
    assert "No token reaches some of the experts (ffn_moe_topk-0: 4/6, ffn_moe_topk-1: 4/6" in " ".join(out.split())
    trace = run(Request("reference", str(model), IDS * 4))
    assert all(torch.isfinite(values(trace, tap)).all() for tap in trace.taps)


def test_what_is_not_emulated_is_refused_by_name(tmp_path: Path, capsys: Capture) -> None:
    model = make_arch(tmp_path / "m.gguf", "deepseek2")
    said = refused(capsys, "trace", model, *TOKENS, "--arithmetic", "bf16", "-o", tmp_path / "t.safetensors")
    assert "latent attention with a matrix of each head" in said
    ran(capsys, "trace", model, *TOKENS, "--arithmetic", "ggml", "-o", tmp_path / "t.safetensors")


@pytest.mark.parametrize(
    ("case", "feature"),
    [
        ("minicpm3", "latent attention"),
    ],
)
def test_remedies_name_what_they_do_not_know(case: str, feature: str, tmp_path: Path) -> None:
    weights = Weights(open_source(make_arch(tmp_path / "m.gguf", case)))
    with pytest.raises(UnsupportedFeatureError, match=f"has {feature}, expected"):
        check_remediable(weights, "sensitivity")


def test_a_folder_without_a_header_here_names_the_converter(tmp_path: Path) -> None:
    make_hf_arch(tmp_path, "gemma")
    with pytest.raises(UnsupportedFeatureError, match=r"convert_hf_to_gguf\.py"):
        check_convertible(Weights(open_source(tmp_path)))


def test_more_experts_used_than_there_are(tmp_path: Path) -> None:
    with pytest.raises(CorruptFileError, match=r"expert_used_count.* is 9 and .*expert_count.* is 6"):
        Weights(open_source(make_arch(tmp_path / "m.gguf", "qwen2moe", keys={"expert_used_count": 9})))


def test_quantize_and_study_experts(tmp_path: Path, capsys: Capture) -> None:
    model, q8 = make_arch(tmp_path / "m.gguf", "qwen3moe"), tmp_path / "q8.gguf"
    ran(capsys, "quantize", model, q8, "--type", "Q8_0")
    assert Weights(open_source(q8)).source.tensors["blk.0.ffn_up_exps.weight"].qtype.name == "Q8_0"
    out, _ = ran(capsys, "study", model, q8, "--tokens", ",".join(map(str, IDS)), "--out", tmp_path / "found")
    assert "q8" in out


@pytest.mark.parametrize(
    ("case", "name", "formula"),
    [
        ("gpt2", "GELU", "gelu(up)"),
        ("gemma", "GeGLU", "gelu(gate)·up"),
        ("nemotron", "ReLU²", "relu(up)²"),
        ("llama-moe", "SwiGLU", "silu(gate)·up"),
    ],
)
def test_reports_name_the_activation(case: str, name: str, formula: str, tmp_path: Path, capsys: Capture) -> None:
    model = make_arch(tmp_path / "m.gguf", case)
    ran(capsys, "study", model, *TOKENS, "--types", "Q8_0", "-o", tmp_path / "out")
    report = (tmp_path / "out" / "report.md").read_text("utf-8")
    assert f"## {name}\n\nRMS and mean of {formula}, the widest signal of a layer." in report
    assert f"### {name} mean" in report
    assert ("SwiGLU" in report) == (name == "SwiGLU")
