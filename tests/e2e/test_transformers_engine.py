"""Transformers beside the reference on folders of other model types: trace, compare, diagnose and study as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from tests.e2e.commands import Capture, fitting, ran, refused
from tests.hf_arch_models import make_hf_arch

IDS = "1,5,17,99,3,200,17,8"
CLEAN = [("gemma2", 39), pytest.param("gpt2", 31, marks=pytest.mark.long), pytest.param("qwen2_moe", 45, marks=pytest.mark.long)]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("case", "n_taps"), CLEAN)
def test_diagnose_finds_nothing(case: str, n_taps: int, capsys: Capture) -> None:
    make_hf_arch(Path("model"), case)
    out, _ = ran(capsys, "diagnose", "model", "--against", "transformers", "--tokens", IDS, "--quick", "--json")
    found = fitting("diagnosis", out)
    assert f"Nothing found beyond the expected arithmetic of transformers at {n_taps} taps" in " ".join(found["answer"].split())


@pytest.mark.long
@pytest.mark.parametrize("case", ["gpt2", "hunyuan_v1_dense", "gpt_oss", "deepseek_v3"])
def test_nor_do_its_probes(case: str, capsys: Capture) -> None:
    """Positions in the stream, q and k normed after RoPE, sinks: rows of a repeated token that differ, and are right."""
    make_hf_arch(Path("model"), case)
    out, _ = ran(capsys, "diagnose", "model", "--against", "transformers", "--tokens", IDS, "--json")
    found = fitting("diagnosis", out)
    assert {row["id"]: row["conclusion"] for row in found["evidence"]} == dict.fromkeys(
        ("file", "ids", "one-token", "two-tokens", "repeated", "prefix", "decode", "weights", "taps", "replay"), "agrees"
    )


def test_another_rope_base_on_one_side_is_located(capsys: Capture) -> None:
    make_hf_arch(Path("model"), "gpt_neox")
    ran(capsys, "trace", "model", "--tokens", IDS, "-o", "ref.safetensors")
    config = json.loads(Path("model/config.json").read_text("utf-8"))
    config["rope_parameters"]["rope_theta"] = 500000.0
    Path("model/config.json").write_text(json.dumps(config), "utf-8")
    ran(capsys, "trace", "model", "--engine", "transformers", "--tokens", IDS, "-o", "test.safetensors")
    out, _ = ran(capsys, "compare", "ref.safetensors", "test.safetensors", "--different-files", "--json", code=1)
    assert json.loads(out)["first_divergence"] == "Qcur-0"


def test_what_no_module_shows_is_said(capsys: Capture) -> None:
    make_hf_arch(Path("model"), "deepseek_v3")
    out, _ = ran(capsys, "trace", "model", "--engine", "transformers", "--tokens", IDS, "-o", "test.safetensors")
    said = " ".join(out.split())
    assert "38 taps at 8 positions" in said
    assert (
        "Transformers has no module that shows ffn_moe_probs, ffn_moe_gate, ffn_moe_up, ffn_moe_swiglu and ffn_moe_down of this model: "
        "these taps are left out." in said
    )


def test_study_beside_transformers(capsys: Capture) -> None:
    make_hf_arch(Path("model"), "gpt_neox")
    ran(capsys, "study", "model", "--engine", "transformers", "--tokens", IDS, "--out", "out")
    (run,) = json.loads(Path("out/study.json").read_text("utf-8"))["engines"]
    assert (run["engine"], run["failure"]) == ("transformers", None)
    assert max(row["engine"] for row in run["rows"]) < 1e-11


def test_a_type_it_does_not_know_is_refused_by_name(capsys: Capture) -> None:
    config = AutoConfig.for_model(
        "opt", hidden_size=16, num_hidden_layers=1, ffn_dim=16, num_attention_heads=2, vocab_size=32, word_embed_proj_dim=16
    )
    AutoModelForCausalLM.from_config(config).save_pretrained("model")
    said = refused(capsys, "trace", "model", "--engine", "transformers", "--tokens", "1,2,3", "-o", "test.safetensors")
    assert "the architecture (model_type) is 'opt', expected one of llama, " in said
    assert "`quantscope inspect model` lists what it holds" in said
