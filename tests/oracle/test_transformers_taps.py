"""What ``--engine transformers`` shows of every model type: the taps of the reference, in its order of channels, and no fewer."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from quantscope.compare import compare
from quantscope.engines import IN_STEPS, Request, run
from quantscope.engines import transformers as engine
from quantscope.errors import EngineError, UnsupportedArchitectureError
from quantscope.metrics import nmse
from quantscope.model.taps import stem_of
from quantscope.trace import Full, Trace
from tests.arch_models import make_arch
from tests.hf_arch_models import CASES, make_hf_arch

MAX_NMSE = 1e-10
IDS = tuple(np.random.default_rng(3).integers(0, 288, 40).tolist())
ALWAYS = {"embd", "l_out-0", "l_out-1", "kqv_out-0", "kq_soft_max-1", "attn_out-1", "Vcur-0", "result_norm", "result_output"}

INSIDE = frozenset({"ffn_moe_gate", "ffn_moe_up", "ffn_moe_swiglu", "ffn_moe_down"})  # of the experts: one module computes them all
MOE = INSIDE | {"ffn_moe_probs"}
# case → taps of the reference that no module of the loaded model shows
LEFT_OUT: dict[str, frozenset[str]] = {
    **dict.fromkeys(CASES, frozenset[str]()),
    **{case: MOE for case in CASES if case.startswith(("mixtral", "dots1", "deepseek")) or "moe" in case},
    "gpt_oss": INSIDE,  # it has no probabilities of all experts
    "qwen2_moe": MOE | {"ffn_shexp_out"},
    "olmo": frozenset({"Qcur_pre", "Kcur_pre"}),  # clamped after the module
}


def traces(model: Path, ids: Sequence[int] = IDS, *, steps: bool = False) -> tuple[Trace, Trace]:
    ref, test = (run(Request(name, str(model), tuple(ids), steps=steps)) for name in ("reference", "transformers"))
    return ref, test


def values(trace: Trace) -> dict[str, Full]:
    return {tap: full for tap in trace.taps if (full := trace.find(tap, Full)) is not None}


def assert_alike(ref: Trace, test: Trace) -> None:
    """Every tap of ``test`` is that of ``ref``, in shape and values."""
    theirs, ours = values(test), values(ref)
    assert {tap: x.values.shape for tap, x in theirs.items()} == {tap: ours[tap].values.shape for tap in theirs}
    errors = {tap: float(nmse(ours[tap].values.flatten(), x.values.flatten())) for tap, x in theirs.items()}
    assert max(errors.values()) <= MAX_NMSE, {tap: f"{e:.1e}" for tap, e in errors.items() if not e <= MAX_NMSE}
    assert max(errors.values()) > 0  # two programs with another order of sums


@pytest.mark.parametrize("case", CASES)
def test_every_tap_is_the_reference_s(case: str, tmp_path: Path) -> None:
    make_hf_arch(tmp_path, case)
    ref, test = traces(tmp_path)
    assert_alike(ref, test)
    assert {stem_of(tap) for tap in ref.taps.keys() - test.taps.keys()} == LEFT_OUT[case]
    assert {tap for tap in ref.taps if stem_of(tap) not in LEFT_OUT[case]} == set(test.taps)
    assert set(test.taps) >= ALWAYS
    (said,) = test.origin.notes if LEFT_OUT[case] else ("",)
    assert {stem for stem in map(stem_of, ref.taps) if f" {stem}," in said or f" {stem} " in said} == LEFT_OUT[case]


@pytest.mark.parametrize("case", ["gpt2", "gemma2", "exaone4", "deepseek_v3", "falcon, two norms", "ministral3", "gpt_oss", "bloom"])
def test_step_by_step_over_its_cache(case: str, tmp_path: Path) -> None:
    make_hf_arch(tmp_path, case)
    ref, test = traces(tmp_path, IDS[:6], steps=True)
    assert_alike(ref, test)
    assert {stem_of(tap) for tap in ref.taps.keys() - test.taps.keys()} == LEFT_OUT[case]
    assert test.origin.notes[-1] == IN_STEPS
    assert len(test.origin.notes) == 1 + bool(LEFT_OUT[case])


@pytest.mark.parametrize("case", ["exaone4", "gemma3_text", "hunyuan_v1_moe", "qwen3", "glm4_moe", "olmo2", "phi"])
def test_as_many_positions_as_heads(case: str, tmp_path: Path) -> None:
    """Where the shape does not say which axis is which."""
    make_hf_arch(tmp_path, case)
    ref, test = traces(tmp_path, IDS[:4])
    assert_alike(ref, test)


def test_the_modelling_functions_are_as_before(tmp_path: Path) -> None:
    modeling = importlib.import_module("transformers.models.gemma2.modeling_gemma2")
    before = modeling.apply_rotary_pos_emb, modeling.eager_attention_forward
    make_hf_arch(tmp_path, "gemma2")
    run(Request("transformers", str(tmp_path), IDS))
    assert (modeling.apply_rotary_pos_emb, modeling.eager_attention_forward) == before


# ---- Planted: one side reads another config ------------------------------------------------------------------------------------

PLANTED = {
    "cohere": ({"logit_scale": 0.5}, "result_output"),
    "gemma2": ({"attn_logit_softcapping": None}, "kq_soft_max-0"),
    "glm4": ({"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "partial_rotary_factor": 0.5}}, "Qcur-0"),
    "granite": ({"residual_multiplier": 1.0}, "ffn_inp-0"),
    "gpt_neox": ({"layer_norm_eps": 0.3}, "attn_norm-0"),
    "phi": ({"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "partial_rotary_factor": 0.5}}, "Qcur-0"),
    "qwen3_moe": ({"norm_topk_prob": False}, "ffn_moe_weights-0"),
    "deepseek_v3": ({"routed_scaling_factor": 1.0}, "ffn_moe_weights-1"),
}


@pytest.mark.parametrize("case", PLANTED)
def test_another_value_in_the_config_is_located(case: str, tmp_path: Path) -> None:
    changes, first = PLANTED[case]
    make_hf_arch(tmp_path, case)
    ref = run(Request("reference", str(tmp_path), IDS))
    assert compare(ref, run(Request("transformers", str(tmp_path), IDS))).first_divergence is None
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changes), "utf-8")
    found = compare(ref, run(Request("transformers", str(tmp_path), IDS)), same_file=False).first_divergence
    assert found is not None
    assert found.tap == first


# ---- GGUF files, which Transformers' own loader reads --------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "first"), [("qwen2", None), ("starcoder2", None), ("nemotron", "Qcur-0")])
def test_a_gguf_file(arch: str, first: str | None, tmp_path: Path) -> None:
    """Nemotron's loader does not read rope.dimension_count: it turns half a head, where the file says all of it."""
    file = tmp_path / "m.gguf"
    make_arch(file, arch)
    ref, test = traces(file)
    assert set(test.taps) == set(ref.taps)
    found = compare(ref, test).first_divergence
    assert (found.tap if found else None) == first


# ---- bfloat16 ------------------------------------------------------------------------------------------------------------------

TO_THE_BIT = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "seed_oss", "hunyuan_v1_dense", "glm4", "phi3", "phi3, longrope")
NEARLY = ("olmo2", "granite", "ernie4_5", "ministral3", "minicpm3")


@pytest.mark.parametrize("case", [*TO_THE_BIT, *NEARLY])
def test_what_is_not_emulated_to_the_bit_is_said(case: str, tmp_path: Path) -> None:
    make_hf_arch(tmp_path, case)
    ours = run(Request("reference", str(tmp_path), IDS, arithmetic="bf16"))
    theirs = run(Request("transformers", str(tmp_path), IDS, dtype="bfloat16"))
    expected, found = values(ours), values(theirs)
    equal = [bool((x.values == expected[tap].values).all()) for tap, x in found.items()]
    assert sum(equal) >= 0.9 * len(equal) if case in TO_THE_BIT else not all(equal)
    for trace in (ours, theirs):
        said = [note for note in trace.origin.notes if "emulated to the bit" in note]
        assert len(said) == (case in NEARLY)
        assert all(f"not for {trace.origin.arch}:" in note for note in said)


# ---- Refused -------------------------------------------------------------------------------------------------------------------


def test_a_type_that_the_forward_does_not_know_is_named(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "opt", hidden_size=16, num_hidden_layers=1, ffn_dim=16, num_attention_heads=2, vocab_size=32, word_embed_proj_dim=16
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedArchitectureError, match=r"model_type\) is 'opt', expected one of llama, .*`quantscope inspect"):
        run(Request("transformers", str(tmp_path), (1, 2, 3)))


def test_a_model_with_other_modules_than_its_type_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_hf_arch(tmp_path / "llama", "llama")
    other: PreTrainedModel = make_hf_arch(tmp_path / "gpt2", "gpt2")
    other.config.model_type = "llama"
    monkeypatch.setattr(engine, "_load", lambda *_: other)
    with pytest.raises(EngineError, match=r"as GPT2LMHeadModel, whose layers are not where those of a llama are .*--engine llama\.cpp"):
        run(Request("transformers", str(tmp_path / "llama"), (1, 2, 3)))
