"""Transformers in bfloat16: its arithmetic is the emulated one, a clean run is cleared, planted faults are convicted alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import transformers.models.llama.modeling_llama as modeling
from torch import Tensor

from quantscope import engines
from quantscope.cli.demo import MODEL, bundled
from quantscope.compare import compare
from quantscope.diagnose.convictions import replayed
from quantscope.diagnose.replay import Replay, replay
from quantscope.engines import Request
from quantscope.model.bf16_arithmetic import Bf16Arithmetic
from quantscope.sources.resolve import open_source
from quantscope.trace import Full, Trace
from quantscope.weights import Weights
from tests.hf_models import make_hf
from tests.models import STORIES, STORIES_PROMPT
from tests.oracle.quantized_files import demo_file

PROMPT = (1, 620, 315, 261, 1311, 284, 3965, 12, 77, 1024)
IDS = (5, 17, 99, 3, 200, 31, 8, 100, 2)
LLAMA_3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_3 |= {"original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
MODELS: dict[str, Callable[[Path], tuple[Path, tuple[int, ...]]]] = {
    "demo": lambda _: (bundled(MODEL), PROMPT),
    "demo Q4_K_M": lambda _: (demo_file("Q4_K_M"), PROMPT),
    "demo, one token": lambda _: (bundled(MODEL), PROMPT[:1]),
    "demo, 120 tokens": lambda _: (bundled(MODEL), tuple(PROMPT * 12)),
    "stories": lambda _: (STORIES, STORIES_PROMPT),
    "llama": lambda folder: hf(folder, "llama"),
    "llama 3 RoPE": lambda folder: hf(folder, "llama", rope_parameters=LLAMA_3),
    "YaRN": lambda folder: hf(folder, "llama", rope_parameters=YARN),
    "biases": lambda folder: hf(folder, "llama", attention_bias=True, mlp_bias=True),
    "mistral": lambda folder: hf(folder, "mistral"),
    "qwen2": lambda folder: hf(folder, "qwen2"),
    "qwen3": lambda folder: hf(folder, "qwen3"),
}


def hf(folder: Path, arch: str, **config: Any) -> tuple[Path, tuple[int, ...]]:
    make_hf(folder, arch, seed=4, **config)
    return folder, IDS


def run(model: Path, tokens: tuple[int, ...], engine: str = "transformers", **more: Any) -> Trace:
    return engines.run(Request(engine, str(model), tokens, **more))


def in_bf16(model: Path, tokens: tuple[int, ...]) -> Trace:
    return run(model, tokens, dtype="bfloat16")


def convicted(r: Replay) -> list[str]:
    return [row.tap for row in r.those("convicted")]


@pytest.mark.parametrize("model", MODELS)
def test_transformers_is_cleared(model: str, tmp_path: Path) -> None:
    path, ids = MODELS[model](tmp_path)
    trace = in_bf16(path, ids)
    r = replayed(trace, str(path))
    assert len(r.rows) == len(trace.taps) >= 35
    assert {row.verdict for row in r.rows} == {"cleared"}, convicted(r)
    # the emulation is the engine's arithmetic: its error is not a multiple of the predicted one, it is that
    assert all(row.nmse is not None and row.predicted is not None and row.nmse <= 1.1 * row.predicted + 1e-9 for row in r.rows)
    again = replay(trace, Weights(open_source(path)), arithmetic=Bf16Arithmetic(), predicted=None)
    assert sum(row.nmse == 0 for row in again.rows) >= 0.9 * len(again.rows)
    # in float32 alone most operations would be convicted
    assert len(convicted(replay(trace, Weights(open_source(path)), predicted=None))) > len(r.rows) / 2


@pytest.mark.parametrize("model", ["demo", "stories", "qwen3"])
def test_the_whole_forward_follows_transformers(model: str, tmp_path: Path) -> None:
    """Tap by tap to the last layer, though every rounding before it is an input of the next."""
    path, ids = MODELS[model](tmp_path)
    theirs, exact = in_bf16(path, ids), run(path, ids, "reference", predict=True)
    ours = run(path, ids, "reference", arithmetic="bf16")
    c = compare(exact, theirs, predicted=ours)
    assert len(c.rows) == len(theirs.taps)
    assert c.first_divergence is None
    assert all(row.nmse <= 1.5 * row.floor / 4 for row in c.rows)
    equal = [torch.equal(theirs.find(tap, Full).values, ours.find(tap, Full).values) for tap in theirs.taps]  # type: ignore[union-attr]
    assert sum(equal) >= 0.9 * len(equal)


# --- planted faults ---


def hooked(monkeypatch: pytest.MonkeyPatch, place: Callable[[Any], Any], change: Callable[[Tensor], Tensor]) -> None:
    """Every model that Transformers loads from now on has this change of the output of one of its sub-modules."""
    load = transformers.AutoModelForCausalLM.from_pretrained

    def faulty(*args: Any, **more: Any) -> Any:
        model = load(*args, **more)
        place(model).register_forward_hook(lambda _module, _args, out: change(out))
        return model

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", faulty)


@pytest.mark.parametrize("model", ["demo", "llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("path", "tap"), [("mlp.gate_proj", "ffn_gate-1"), ("self_attn.o_proj", "attn_out-1"), ("input_layernorm", "attn_norm-1")]
)
def test_a_rolled_output_is_convicted_alone(model: str, path: str, tap: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, ids = MODELS[model](tmp_path)
    hooked(monkeypatch, lambda m: m.model.layers[1].get_submodule(path), lambda y: y.roll(1, -1))
    assert convicted(replayed(in_bf16(file, ids), str(file))) == [tap]


def test_one_wrong_channel_of_one_position_is_convicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single value, off by half of the RMS of its tap: far below what 8 bits would do to all of them, not below what bfloat16 does."""
    file, ids = MODELS["llama"](tmp_path)

    def changed(y: Tensor) -> Tensor:
        y = y.clone()
        y[0, 4, 7] += 0.5 * y.float().square().mean().sqrt().item()
        return y

    hooked(monkeypatch, lambda m: m.model.layers[0].mlp.gate_proj, changed)
    r = replayed(in_bf16(file, ids), str(file))
    assert convicted(r) == ["ffn_gate-0"]
    worst = r.row("ffn_gate-0").worst
    assert worst is not None
    assert worst.index == (4, 7)


def test_two_faults_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Key/value heads tiled where they are to be repeated, and a norm whose weight counts twice: in every layer, and nothing else."""
    file, ids = MODELS["llama"](tmp_path)
    norm = modeling.LlamaRMSNorm.forward
    monkeypatch.setattr(modeling, "repeat_kv", lambda x, n_rep: x.repeat(1, n_rep, 1, 1))  # [B,K,S,D] → [B,H,S,D]
    monkeypatch.setattr(modeling.LlamaRMSNorm, "forward", lambda self, x: self.weight * norm(self, x))
    r = replayed(in_bf16(file, ids), str(file))
    stems = ("attn_norm", "kq_soft_max", "kqv_out", "ffn_norm")
    assert set(convicted(r)) == {*(f"{stem}-{i}" for stem in stems for i in range(2)), "result_norm"}


def test_the_attention_is_replayed_whole_where_its_probabilities_are_missing() -> None:
    trace = in_bf16(STORIES, STORIES_PROMPT)
    some = Trace(trace.origin, {tap: pieces for tap, pieces in trace.taps.items() if not tap.startswith("kq_soft_max")})
    r = replayed(some, str(STORIES))
    assert convicted(r) == []
    assert r.row("kqv_out-2").inputs == ("Qcur-2", "Kcur-2", "Vcur-2")
