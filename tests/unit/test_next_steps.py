"""What to record next: the exact taps, their size, and commands that do what they say."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from quantscope import engines
from quantscope.compare import Kind
from quantscope.diagnose.next_steps import SKELETON, layer_bytes, layer_taps, skeleton_taps, what_to_record
from quantscope.engines import Request
from quantscope.model.taps import tap_names
from quantscope.sources.resolve import open_source
from quantscope.trace import Full
from quantscope.weights import Weights
from tests.models import STORIES, make_gguf

CONFIG = Weights(open_source(STORIES)).config  # 5 layers
TINYLLAMA = replace(
    CONFIG, n_layer=22, n_embd=2048, n_head=32, n_head_kv=4, head_dim=64, n_ff=5632, n_vocab=32000
)  # the model of the case that started it
ALL_TAPS = tuple(name for name in tap_names(CONFIG.n_layer) if "normed" not in name)


def test_statistics_ask_for_fingerprints_first_and_a_layer_then() -> None:
    said = what_to_record("RusTorch", {"statistics"}, ("l_out-0",), None, TINYLLAMA)
    assert "token ids, the sha256" in said[0]
    assert said[1].startswith(
        "First record fingerprints of `embd`, `l_out-0` to `l_out-21`, `result_norm` and `result_output` on two prompts"
    )
    assert "64 bytes a tap, 1.60 kB a prompt" in said[1]
    assert "`qsfp` of docs/fingerprints.md" in said[2]
    assert "[LAYER i] First 10 values" in said[3]
    assert said[4].startswith("Then record the first layer whose `l_out` differs in full")
    assert "8 tokens, 1.23 MB a layer" in said[4]


def test_the_size_is_that_of_the_recorded_tensors() -> None:
    tokens = tuple(range(1, 9))
    trace = engines.run(Request("reference", str(STORIES), tokens))
    for layer in (0, 2):
        taps = layer_taps(layer, CONFIG)
        assert set(taps) <= set(trace.taps)
        pieces = [trace.find(tap, Full) for tap in taps]
        assert layer_bytes(taps, CONFIG) == sum(4 * p.values.numel() for p in pieces if p is not None)
    assert layer_bytes(layer_taps(3, TINYLLAMA), TINYLLAMA) == pytest.approx(1.2e6, rel=0.05)


def test_the_first_bad_layer_in_the_order_of_the_graph() -> None:
    said = what_to_record("candle", {"fingerprint"}, ALL_TAPS, 3, CONFIG)
    assert len(said) == 2
    assert said[0].startswith("Record layer 3 in full on 8 tokens")
    assert re.findall(r"`([\w-]+)`", said[0]) == ["l_out-2", *(name for name in ALL_TAPS if name.endswith("-3"))]
    assert "safetensors or npz" in said[1]
    assert layer_taps(0, CONFIG)[0] == "embd"
    assert layer_taps(5, CONFIG) == ("l_out-4", "result_norm", "result_output")
    assert "the head in full" in what_to_record(None, {"fingerprint"}, ALL_TAPS, 5, CONFIG)[0]


def test_norms_of_q_and_k_only_where_they_are(tmp_path: Path) -> None:
    qwen3 = Weights(open_source(make_gguf(tmp_path / "m.gguf", arch="qwen3"))).config
    assert "Qcur_normed-1" in layer_taps(1, qwen3)
    assert "Qcur_normed-1" not in layer_taps(1, CONFIG)


def test_nothing_where_everything_is_there() -> None:
    assert what_to_record("llama.cpp", {"values"}, ALL_TAPS, 3, CONFIG) == []
    assert what_to_record("llama.cpp", {"values"}, ALL_TAPS, None, CONFIG) == []
    some = [tap for tap in ALL_TAPS if not tap.startswith(("kqv_out-3", "l_out-1"))]
    said = what_to_record("llama.cpp", {"values"}, some, 3, CONFIG)
    assert "`l_out-1`" in said[0]
    assert "(1 tap, 2.05 kB), in this order: `kqv_out-3`" in said[3]


@pytest.mark.parametrize("engine", ["llama.cpp", "transformers"])
@pytest.mark.parametrize("layer", [0, 3, 5])
def test_commands_select_the_taps_they_speak_of(engine: str, layer: int) -> None:
    kinds: set[Kind] = {"sample"}
    said = " ".join(what_to_record(engine, kinds, (), layer, CONFIG, "a model.gguf"))
    commands = [shlex.split(c) for c in re.findall(r"`(quantscope trace [^`]*)`", said)]
    assert len(commands) == 2
    for command, wanted in zip(commands, (skeleton_taps(CONFIG), layer_taps(layer, CONFIG)), strict=True):
        assert command[:5] == ["quantscope", "trace", "a model.gguf", "--engine", engine]
        pattern = command[command.index("--taps") + 1]
        assert [name for name in ALL_TAPS if re.search(pattern, name)] == list(wanted)
    assert "--fingerprint" in commands[0]
    assert "--fingerprint" not in commands[1]
    assert ("llama-eval-callback -m 'a model.gguf' -p TEXT" in said) == (engine == "llama.cpp")


def test_without_the_sizes_of_the_model() -> None:
    said = what_to_record(None, {"statistics"}, (), None)
    assert any("`l_out-i`" in s for s in said)
    assert not any("MB" in s or "kB" in s for s in said)
    assert re.search(SKELETON, "l_out-12")
