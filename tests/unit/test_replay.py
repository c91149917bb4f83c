"""Local replay without another engine: clean traces of every architecture, planted faults one and several at a time, gaps, NaN."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from quantscope.compare import EXACT_FLOOR, PREDICTED_TIMES
from quantscope.diagnose.replay import Replay, replay
from quantscope.errors import PromptError, TraceContentError
from quantscope.fingerprint import fingerprint
from quantscope.model.arithmetic import EXACT, Arithmetic
from quantscope.model.forward import KVCache, forward
from quantscope.model.ggml_arithmetic import ggml_arithmetic
from quantscope.model.ops import PLAIN, Scores
from quantscope.model.rope import RopeTables
from quantscope.model.taps import Recorder, tap_names
from quantscope.sources.resolve import open_source
from quantscope.trace import Full, Origin, Trace, full_trace
from quantscope.weights import WeightProvider, Weights
from tests.models import LINEARS, make_gguf

IDS = (1, 17, 250, 31, 99, 42, 8)
N = len(IDS)
ORIGIN = Origin("engine", tokens=IDS)
MODELS: dict[str, dict[str, Any]] = {
    "shared heads": {},
    "one key head": {"n_head_kv": 1, "tied": True},
    "no shared heads, wide": {"n_head_kv": 4, "head_dim": 32},
    "biases and scales": {"biases": LINEARS, "scales": LINEARS},
    "rope_freqs": {"rope_freqs": (1, 1, 1, 1.5, 2.5, 4, 8, 8)},
    "qwen2": {"arch": "qwen2"},
    "qwen3": {"arch": "qwen3"},
    "Q8_0": {"dtype": "Q8_0"},
}


def weights(tmp_path: Path, **model: Any) -> Weights:
    return Weights(open_source(make_gguf(tmp_path / "m.gguf", seed=3, **model)), keep=True)


def taps_of(w: WeightProvider, arithmetic: Arithmetic = EXACT, ids: tuple[int, ...] = IDS) -> dict[str, Tensor]:
    recorder = Recorder()
    forward(torch.tensor([ids]), w, recorder, arithmetic=arithmetic)
    return {name: x[0] for name, x in recorder.taps.items()}


def trace_of(w: WeightProvider, arithmetic: Arithmetic = EXACT) -> Trace:
    return full_trace(ORIGIN, taps_of(w, arithmetic))


def model_and_taps(tmp_path: Path) -> tuple[Weights, dict[str, Tensor]]:
    w = weights(tmp_path)
    return w, taps_of(w)


def without(trace: Trace, *names: str) -> Trace:
    return Trace(trace.origin, {name: pieces for name, pieces in trace.taps.items() if name not in names})


def convicted(r: Replay) -> list[str]:
    return [row.tap for row in r.those("convicted")]


class Faulty(Arithmetic):
    """The exact operations, some of them replaced: (method or name of the matrix, layer; None at the head) → what is done to the result."""

    def __init__(self, faults: Mapping[tuple[str, int | None], Callable[[Tensor], Tensor]]) -> None:
        self.faults, self.i = faults, -1

    def done(self, name: str, y: Tensor) -> Tensor:
        return self.faults.get((name, self.i), lambda x: x)(y)

    def layer(self, weights: WeightProvider, i: int, dtype: torch.dtype) -> Mapping[str, Tensor]:
        self.i: int | None = i
        return super().layer(weights, i, dtype)

    def top(self, weights: WeightProvider, dtype: torch.dtype) -> Mapping[str, Tensor]:
        self.i = None
        return super().top(weights, dtype)

    def rms_norm(self, x: Tensor, w: Mapping[str, Tensor], name: str, eps: float) -> Tensor:
        return self.done("rms_norm", super().rms_norm(x, w, name, eps))

    def linear(self, x: Tensor, w: Mapping[str, Tensor], name: str, *, scale_last: bool = False) -> Tensor:
        return self.done(name, super().linear(x, w, name, scale_last=scale_last))

    def rotate(self, x: Tensor, tables: RopeTables, which: Literal["q", "k"]) -> Tensor:
        return self.done("rotate", super().rotate(x, tables, which))

    def attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float, how: Scores = PLAIN) -> Tensor:
        return self.done("attention", super().attention(q, k, v, self.done("scale", torch.tensor(scale)).item(), how))

    def attention_map(self, q: Tensor, k: Tensor, scale: float, how: Scores = PLAIN) -> Tensor:
        return super().attention_map(q, k, self.done("scale", torch.tensor(scale)).item(), how)

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.done("swiglu", super().swiglu(gate, up))


def rolled(y: Tensor) -> Tensor:
    return y.roll(1, -1)


def twice(y: Tensor) -> Tensor:
    return y * 2


def not_a_number(y: Tensor) -> Tensor:
    """NaN in one channel of the last position."""
    y = y.clone()
    y[:, -1, 3] = math.nan
    return y


# --- clean traces ---


@pytest.mark.parametrize("model", MODELS)
def test_every_operation_of_an_exact_trace_is_cleared(model: str, tmp_path: Path) -> None:
    w = weights(tmp_path, **MODELS[model])
    trace = trace_of(w)
    r = replay(trace, w, predicted=None)
    assert [row.tap for row in r.rows] == list(trace.taps)
    assert {row.verdict for row in r.rows} == {"cleared"}
    assert max(row.nmse for row in r.rows if row.nmse is not None) < 1e-12
    assert all(row.floor == EXACT_FLOOR and row.n == trace.taps[row.tap][0].values.numel() for row in r.rows)  # type: ignore[union-attr]
    assert all(set(row.inputs) <= set(trace.taps) for row in r.rows)


@pytest.mark.parametrize(("model", "kv"), [*((model, "F16") for model in MODELS), ("shared heads", "F32"), ("Q8_0", "F32")])
def test_rounded_operations_are_within_their_floor_and_the_same_bits_when_rounded_again(model: str, kv: Any, tmp_path: Path) -> None:
    w, ggml = weights(tmp_path, **MODELS[model]), ggml_arithmetic(kv)
    trace = trace_of(w, ggml)
    assert {row.nmse for row in replay(trace, w, arithmetic=ggml, predicted=None).rows} == {0}
    r = replay(trace, w, predicted=ggml)
    assert {row.verdict for row in r.rows} == {"cleared"}
    for row in r.rows:
        assert row.predicted is not None
        assert row.floor == PREDICTED_TIMES * row.predicted + EXACT_FLOOR
    if kv == "F16" or model == "Q8_0":  # the floor is what clears them
        assert convicted(replay(trace, w, predicted=None)) != []


def test_a_floor_is_that_of_its_operation(tmp_path: Path) -> None:
    """8-bit activations are in the products, a 16-bit cache in the attention, and nothing is in the sums and norms."""
    w = weights(tmp_path, dtype="Q8_0")
    r = replay(trace_of(w), w)
    rounded = {row.tap.partition("-")[0] for row in r.rows if row.floor is not None and row.floor > 2 * EXACT_FLOOR}
    assert rounded == {
        *("Qcur_pre", "Kcur_pre", "Vcur", "kq_soft_max", "kqv_out"),
        *("attn_out", "ffn_gate", "ffn_up", "ffn_out", "result_output"),
    }


# --- faults ---

READERS = {  # tap → what is computed from it, by the forward's formulas
    "embd": ("attn_norm-0", "ffn_inp-0"),
    "attn_norm-0": ("Qcur_pre-0", "Kcur_pre-0", "Vcur-0"),
    "Qcur_pre-0": ("Qcur_normed-0",),
    "Kcur_pre-0": ("Kcur_normed-0",),
    "Vcur-0": ("kqv_out-0",),
    "Qcur_normed-0": ("Qcur-0",),
    "Kcur_normed-0": ("Kcur-0",),
    "Qcur-0": ("kq_soft_max-0",),
    "Kcur-0": ("kq_soft_max-0",),
    "kq_soft_max-0": ("kqv_out-0",),
    "kqv_out-0": ("attn_out-0",),
    "attn_out-0": ("ffn_inp-0",),
    "ffn_inp-0": ("ffn_norm-0", "l_out-0"),
    "ffn_norm-0": ("ffn_gate-0", "ffn_up-0"),
    "ffn_gate-0": ("ffn_swiglu-0",),
    "ffn_up-0": ("ffn_swiglu-0",),
    "ffn_swiglu-0": ("ffn_out-0",),
    "ffn_out-0": ("l_out-0",),
    "l_out-0": ("attn_norm-1", "ffn_inp-1"),
    "l_out-1": ("result_norm",),
    "result_norm": ("result_output",),
    "result_output": (),
}


def test_a_changed_tap_accuses_what_makes_it_and_what_reads_it(tmp_path: Path) -> None:
    w = weights(tmp_path, arch="qwen3")
    taps = taps_of(w)
    assert {name.partition("-")[0] for name in READERS} == {name.partition("-")[0] for name in tap_names(2)}
    for tap, readers in READERS.items():
        changed = {**taps, tap: taps[tap].roll(1, 0 if tap == "kq_soft_max-0" else -1)}
        assert set(convicted(replay(full_trace(ORIGIN, changed), w, predicted=None))) == {tap, *readers}, tap


TWO_FAULTS: dict[str, tuple[dict[tuple[str, int | None], Callable[[Tensor], Tensor]], set[str]]] = {
    "product and activation": ({("attn_q", 0): rolled, ("swiglu", 1): rolled}, {"Qcur_pre-0", "ffn_swiglu-1"}),
    "rotation and head": ({("rotate", 0): rolled, ("output", None): rolled}, {"Qcur-0", "Kcur-0", "result_output"}),
    "scale and product": ({("scale", 1): twice, ("ffn_down", 0): rolled}, {"kq_soft_max-1", "ffn_out-0"}),
    "heads and norm": ({("attention", 0): lambda y: y.roll(1, 2), ("rms_norm", 1): twice}, {"kqv_out-0", "attn_norm-1", "ffn_norm-1"}),
    "one after the other": ({("attn_v", 0): rolled, ("attn_output", 0): rolled}, {"Vcur-0", "attn_out-0"}),
    "in every layer": (
        {("ffn_gate", 0): rolled, ("ffn_gate", 1): rolled, ("rms_norm", None): twice},
        {"ffn_gate-0", "ffn_gate-1", "result_norm"},
    ),
}


@pytest.mark.parametrize("dtype", ["F32", "Q8_0"])
@pytest.mark.parametrize("case", TWO_FAULTS)
def test_two_faults_in_one_run_are_both_convicted_and_nothing_else(case: str, dtype: str, tmp_path: Path) -> None:
    w = weights(tmp_path, dtype=dtype)
    faults, expected = TWO_FAULTS[case]
    r = replay(trace_of(w, Faulty(faults)), w)
    assert set(convicted(r)) == expected
    assert r.those("not recorded") == ()


def test_weights_of_another_file_convict_the_products_that_differ(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    w = weights(tmp_path)
    down = w.get("blk.1.ffn_down.weight").roll(1, 0).numpy()
    other = weights(tmp_path / "other", edit={"blk.1.ffn_down.weight": down})
    assert convicted(replay(trace_of(other), w)) == ["ffn_out-1"]
    assert convicted(replay(trace_of(other), other)) == []


def test_the_worst_element_is_named_by_its_position(tmp_path: Path) -> None:
    w = weights(tmp_path)
    taps = taps_of(w)
    taps["ffn_out-1"][4, 9] += 3
    taps["kq_soft_max-0"][2, 5, 1] += 0.5
    rows = tuple(range(2, N))
    trace = full_trace(ORIGIN, taps)
    trace = Trace(ORIGIN, {**trace.taps, "ffn_out-1": (Full(taps["ffn_out-1"][2:], rows),)})
    r = replay(trace, w)
    worst = r.row("ffn_out-1").worst
    assert worst is not None
    assert worst.index == (4, 9)
    assert worst.test == taps["ffn_out-1"][4, 9].item()
    assert worst.test - worst.ref == pytest.approx(3, abs=1e-5)
    assert r.row("kq_soft_max-0").worst.index == (2, 5, 1)  # type: ignore[union-attr]


# --- values that are not finite ---


@pytest.mark.parametrize("predicted", [None, ggml_arithmetic("F16")])
def test_what_reads_a_nan_is_not_convicted_for_it_and_later_faults_are_still_found(predicted: Arithmetic | None, tmp_path: Path) -> None:
    w = weights(tmp_path, dtype="Q8_0")
    r = replay(trace_of(w, Faulty({("ffn_gate", 0): not_a_number, ("ffn_down", 0): rolled})), w, predicted=predicted)
    assert convicted(r) == ["ffn_gate-0", "ffn_out-0"]
    row = r.row("ffn_gate-0")
    assert (row.nmse, row.note) == (math.inf, "1 value not finite, though the inputs are")
    assert row.worst is not None
    assert row.worst.index == (N - 1, 3)
    assert math.isnan(row.worst.test)
    read, after = r.row("ffn_swiglu-0"), r.row("ffn_out-0")
    assert (read.verdict, read.n, after.n) == ("cleared", N * 96 - 1, (N - 1) * 64)
    assert after.note == f"64 values of {N * 64} not judged: computed again from these inputs, they are not finite"


def test_an_overflow_that_the_expected_rounding_has_too_is_no_fault(tmp_path: Path) -> None:
    """Activations over 65504 become infinite before a product with F16 weights."""
    normal = weights(tmp_path).get("blk.1.ffn_up.weight").numpy()
    w, ggml = weights(tmp_path, dtype="F16", edit={"blk.1.ffn_up.weight": normal * 20_000}), ggml_arithmetic("F16")
    trace = trace_of(w, ggml)
    out = trace.find("ffn_out-1", Full)
    assert out is not None
    n_finite = int(out.values.isfinite().sum())
    assert 0 < n_finite < out.values.numel()
    row = replay(trace, w, predicted=ggml).row("ffn_out-1")
    assert (row.verdict, row.n) == ("cleared", n_finite)
    assert replay(trace, w, predicted=None).row("ffn_out-1").verdict == "convicted"


def test_nothing_is_said_where_every_input_is_nan(tmp_path: Path) -> None:
    w = weights(tmp_path)
    taps = taps_of(w)
    taps["ffn_swiglu-0"] = torch.full_like(taps["ffn_swiglu-0"], math.nan)
    r = replay(full_trace(ORIGIN, taps), w)
    assert convicted(r) == ["ffn_swiglu-0"]
    assert r.row("ffn_out-0").verdict == "not recorded"
    assert "not finite" in r.row("ffn_out-0").note


# --- gaps ---


def test_missing_taps_cost_the_operations_that_need_them(tmp_path: Path) -> None:
    w = weights(tmp_path)
    r = replay(without(trace_of(w), "ffn_norm-0"), w)
    gaps = {row.tap: row.note for row in r.those("not recorded")}
    assert set(gaps) == {"ffn_norm-0", "ffn_gate-0", "ffn_up-0"}
    assert set(gaps.values()) == {"ffn_norm-0 is not recorded"}
    assert convicted(r) == []


@pytest.mark.parametrize("arithmetic", [EXACT, ggml_arithmetic("F16")])
def test_the_attention_is_replayed_whole_where_its_probabilities_are_missing(arithmetic: Arithmetic, tmp_path: Path) -> None:
    w = weights(tmp_path)
    fine, wrong = (without(trace_of(w, m), "kq_soft_max-0") for m in (arithmetic, Faulty({("scale", 0): twice})))
    row = replay(fine, w, arithmetic=arithmetic, predicted=None).row("kqv_out-0")
    assert (row.inputs, row.verdict) == (("Qcur-0", "Kcur-0", "Vcur-0"), "cleared")
    assert convicted(replay(wrong, w)) == ["kqv_out-0"]
    assert replay(without(fine, "Qcur-0"), w).row("kqv_out-0").verdict == "not recorded"


def test_a_part_of_the_positions(tmp_path: Path) -> None:
    """Attention needs every earlier key; everything else is judged where it was recorded."""
    w, taps = model_and_taps(tmp_path)
    late = {name: (Full(x[..., 4:, :]),) for name, x in taps.items()}
    r = replay(Trace(replace(ORIGIN, positions=(4, 5, 6)), late), w, predicted=None)
    assert {row.tap.partition("-")[0] for row in r.those("not recorded")} == {"kq_soft_max", "kqv_out"}
    assert r.row("kq_soft_max-0").note == "attention sees all positions from 0 to 6, and Kcur-0 lacks some of them"
    assert convicted(r) == []
    keys = {name: (Full(x),) for name, x in taps.items() if name.startswith(("Kcur", "Vcur"))}
    whole = replay(Trace(ORIGIN, {name: (Full(x[..., 4:, :], (4, 5, 6)),) for name, x in taps.items()} | keys), w, predicted=None)
    assert {row.verdict for row in whole.rows} == {"cleared"}
    some = [1, 5]
    apart = {name: (Full(x[..., some, :], tuple(some)),) for name, x in taps.items()} | keys
    assert "do not follow one another" in replay(Trace(ORIGIN, apart), w).row("kqv_out-0").note


def test_only_the_last_position_of_the_last_layer(tmp_path: Path) -> None:
    """What llama.cpp computes when only the last logits are asked for."""
    w, taps = model_and_taps(tmp_path)
    last = {name: (Full(x[-1:], (-1,)),) for name, x in taps.items() if name in ("ffn_norm-1", "ffn_gate-1", "l_out-1", "result_norm")}
    trace = Trace(ORIGIN, {**full_trace(ORIGIN, taps).taps, **last})
    r = replay(trace, w)
    assert {row.verdict for row in r.rows} == {"cleared"}
    assert r.row("ffn_gate-1").n == 96


def test_unknown_ids_and_positions(tmp_path: Path) -> None:
    w, taps = model_and_taps(tmp_path)
    r = replay(full_trace(Origin("engine"), taps), w)
    assert [(row.tap, row.note) for row in r.those("not recorded")] == [("embd", "the token ids are not recorded")]
    last = Trace(Origin("engine", positions=(-1,)), {name: (Full(x[..., -1:, :]),) for name, x in taps.items()})
    unknown = replay(last, w)
    assert {row.tap.partition("-")[0] for row in unknown.those("not recorded")} == {"embd", "Qcur", "Kcur", "kq_soft_max", "kqv_out"}
    assert "which position" in unknown.row("Qcur-0").note
    assert convicted(unknown) == []


def test_a_decoding_step_by_step_is_joined(tmp_path: Path) -> None:
    w, cache = weights(tmp_path), KVCache()
    taps: dict[str, tuple[Full, ...]] = {}
    for first, last in ((0, 4), (4, 5), (5, 7)):
        recorder = Recorder()
        forward(torch.tensor([IDS[first:last]]), w, recorder, cache=cache)
        for name, x in recorder.taps.items():
            taps[name] = (*taps.get(name, ()), Full(x[0], tuple(range(first, last))))
    r = replay(Trace(ORIGIN, taps), w, predicted=None)
    assert {(row.verdict, row.nmse is not None and row.nmse < 1e-12) for row in r.rows} == {("cleared", True)}


def test_a_wrong_shape_convicts_what_made_it_and_is_nobodys_input(tmp_path: Path) -> None:
    w, taps = model_and_taps(tmp_path)
    taps["Vcur-0"] = taps["Vcur-0"].repeat(1, 2)
    r = replay(full_trace(ORIGIN, taps), w)
    assert convicted(r) == ["Vcur-0"]
    assert r.row("Vcur-0").note == "shape [7, 64], expected [7, 32]"
    assert r.row("kqv_out-0").note == "Vcur-0 has the shape [7, 64], expected [7, 32]"


def test_a_trace_that_shows_no_operation_is_refused(tmp_path: Path) -> None:
    w, taps = model_and_taps(tmp_path)
    with pytest.raises(TraceContentError, match="no operation can be replayed"):
        replay(full_trace(Origin("engine"), {"l_out-0": taps["l_out-0"]}), w)
    with pytest.raises(TraceContentError, match="no operation can be replayed"):
        replay(Trace(ORIGIN, {name: (fingerprint(x),) for name, x in taps.items()}), w)
    with pytest.raises(PromptError, match="token id 5000"):
        replay(full_trace(replace(ORIGIN, tokens=(1, 5000)), taps), w)


def test_taps_that_the_model_lacks_are_listed(tmp_path: Path) -> None:
    w = weights(tmp_path)
    trace = trace_of(w)
    assert replay(trace, w).others == ()
    more = Trace(ORIGIN, {**trace.taps, "l_out-7": trace.taps["l_out-1"], "rope": trace.taps["embd"]})
    assert replay(more, w).others == ("l_out-7", "rope")


# --- only the stream between layers ---


def test_layers_are_judged_whole_where_only_the_stream_was_recorded(tmp_path: Path) -> None:
    """The usual dump: one tensor a layer.  Each layer is judged by itself, from the one before it."""
    w = weights(tmp_path)
    stream = {"embd", "l_out-0", "l_out-1"}
    for arithmetic, bad in ((EXACT, []), (Faulty({("swiglu", 1): twice}), ["l_out-1"]), (Faulty({("attn_q", 0): twice}), ["l_out-0"])):
        taps = taps_of(w, arithmetic)
        r = replay(full_trace(ORIGIN, {name: x for name, x in taps.items() if name in stream}), w, predicted=None)
        assert convicted(r) == bad
        assert {row.tap for row in r.those("cleared")} == stream - set(bad)
        assert r.row("l_out-1").operation == "the whole layer"
    ggml = ggml_arithmetic("F16")
    rounded = {name: x for name, x in taps_of(w, ggml).items() if name in stream}
    assert convicted(replay(full_trace(ORIGIN, rounded), w, predicted=ggml)) == []


def test_a_layer_of_the_last_position_alone_cannot_be_judged(tmp_path: Path) -> None:
    """Attention looks back: the stream of all positions is needed."""
    w, taps = model_and_taps(tmp_path)
    last = {name: (Full(x[-1:], (N - 1,)),) for name, x in taps.items() if name in ("embd", "l_out-0", "result_norm", "result_output")}
    r = replay(Trace(ORIGIN, last), w, predicted=None)
    assert r.row("l_out-0").verdict == "not recorded"
