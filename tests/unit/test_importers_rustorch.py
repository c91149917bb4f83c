"""RusTorch's log and dumps: its published figures in its own format, and every form of a line."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantscope.errors import ImportFormatError
from quantscope.findings.traces import study_of
from quantscope.importers.base import AT_LAST, Imported, choose, with_known
from quantscope.importers.read import read as read_file
from quantscope.importers.rustorch import read_rustorch
from quantscope.importers.rustorch_dumps import read_dumps
from quantscope.results import Study
from quantscope.trace import Full, Sample, Stats, Trace
from quantscope.wording import times

DATA = Path(__file__).parents[1] / "data" / "rustorch"


def read(text: str) -> Imported:
    return read_rustorch(text, "x.log")


def one(text: str) -> Trace:
    (run,) = read(text).runs
    return run.trace


def logged(name: str) -> Trace:
    return one((DATA / f"{name}.log").read_text("utf-8"))


def stats(trace: Trace, tap: str) -> dict[str, float]:
    (found,) = trace.all_of(tap, Stats)
    return dict(found.values)


# ---- The published figures ----------------------------------------------------------------------------------------------


def seed_study() -> Study:
    study = study_of([(name, logged(name.lower())) for name in ("Q4_K_M", "Q4_0", "Q6_K")])
    assert study is not None
    return study


@pytest.mark.parametrize(
    ("variant", "printed"),
    [("Q4_K_M", "1.0x 10.3x 21.2x 33.1x 74.9x"), ("Q4_0", "1.0x 10.0x 19.9x 32.4x 72.1x")],
)
def test_growth_as_the_note_prints_it(variant: str, printed: str) -> None:
    rows = seed_study().variant(variant).layers
    assert [r.layer for r in rows] == [0, 5, 10, 15, 21]
    assert [times(r.rms_growth) for r in rows] == printed.replace("x", "×").split()


def test_drift_and_flag_as_the_note_prints_them() -> None:
    study = seed_study()
    text = {f.id: f.text for f in study.findings}
    assert "Q4_K_M −0.000174 → −0.0366 (211×, negative direction); Q4_0 0.0000890 → 0.0233 (262×, positive direction)" in text["mean-drift"]
    assert "All numbers come from RusTorch" in text["limits"]
    assert [(v.name, r.layer) for v in study.variants for r in v.layers if r.flags] == [("Q4_K_M", 0), ("Q4_0", 21)]
    assert "non-finite" not in text  # what Q6_K's notes do not give is unknown, not broken


def test_rows_of_the_short_form() -> None:
    rows = seed_study().variant("Q6_K").layers
    assert [(r.layer, r.output_rms, r.mean) for r in rows][::4] == [(0, 0.011214, 0.000046), (21, 1.25988, -0.009707)]
    assert all(np.isnan(r.input_rms) and r.swiglu_rms is None for r in rows)


def test_input_is_the_output_of_the_layer_before() -> None:
    trace = logged("q4_k_m")
    assert stats(trace, "embd") == {"rms": 0.009276}
    assert stats(trace, "l_out-4") == {"rms": 0.101459}
    (piece,) = trace.all_of("l_out-5", Stats)
    assert (dict(piece.values), piece.digits) == ({"rms": 0.15494, "mean": -0.001946}, {"rms": 6, "mean": 6})
    assert piece.positions is None


def test_selected_token_and_rank() -> None:
    trace = logged("q4_0")
    assert "Selected token 1001: logit 9.6904, rank 1." in trace.origin.notes
    assert "Selected token 13487: logit 7.3169, rank 6." in logged("q4_k_m").origin.notes
    assert trace.all_of("result_norm", Stats) == []
    assert logged("q4_k_m").find("result_norm", Stats) == Stats({"rms": 1.920277}, AT_LAST, {"rms": 6})


def test_logits_of_one_token() -> None:
    trace = logged("one-token")
    assert trace.origin.tokens == (29896,)
    assert trace.find("result_output", Stats) == Stats(
        {"max": 9.8548, "min": -12.1258, "mean": -0.0778}, (0,), {"max": 4, "min": 4, "mean": 4}
    )
    top = trace.find("result_output", Sample)
    assert top is not None
    assert dict(zip(top.index.tolist(), top.values.tolist(), strict=True)) == pytest.approx(
        {6397: 9.8548, 2339: 8.4625, 31695: 8.4066, 4387: 8.3331, 7014: 8.3292}
    )
    assert (top.shape, top.positions, top.digits) == ((1, 31696), (0,), 4)


# ---- Every form of a line -----------------------------------------------------------------------------------------------

HEAD = """🔍 [FORWARD START] input_ids.len=3, start_position=0
🔍 [INPUT TOKENS] [1, 15043, 3186]
🔍 [GET_EMB] token=1 embedding[0..10]=[-0.001099706, 0.001935482, -0.0016715527]
           rms=0.002200, min=-0.010000, max=0.010000 (non_zero=2048/2048)
🔍 [POSITION] Forward call 0: seq_len=3, current_position=0, will apply RoPE positions: 0..2
"""
LAYER_3 = """🔍 [LAYER 3] Input: rms=0.100000, min=-1.500000, max=1.250000, mean=0.000100
🔧 [LAYER 0] attn_norm.weight stats: rms=9.000000, max=9.000000
🔍 [LAYER 3] After Attn RMSNorm: rms=0.200000, min=-2.000000, max=2.000000, mean=0.000200
🎯 [LAYER 0] Q before reshape: rms=0.096568000, max=1.645751000, shape=[3, 2048], first 10: [0.5, -0.25, 1e-5]
🎯 [LAYER 0] Q after RoPE: rms=0.096568001, max=1.645751000, first 10: [0.5, -0.125]
🔍 [LAYER 3] Attention Output: rms=0.300000, min=-3.000000, max=3.000000, mean=0.000300
🔍 [LAYER 3] After Attn Residual: rms=0.400000, min=-4.000000, max=4.000000, mean=0.000400
🔍 [LAYER 3] After FFN RMSNorm: rms=0.500000, min=-5.000000, max=5.000000, mean=0.000500
🔧 [LAYER 3] FFN down_weight stats: rms=8.000000, min=-8.000000, max=8.000000, mean=0.000000001
🔧 [LAYER 3] gate projection: rms=0.600000, max=6.000000, mean=0.000600000
🔧 [LAYER 3] up projection: rms=0.700000, max=7.000000, mean=0.000700000
🔧 [LAYER 3] gate first 10: [0.100000000, 0.200000000]
🔧 [LAYER 3] up first 10: [0.300000000, 0.400000000]
🔧 [LAYER 3] SwiGLU output: rms=0.800000, max=8.000000, mean=0.000800000
🔧 [LAYER 3] SwiGLU first 10: [0.500000000]
🔍 [LAYER 3] FFN Output: rms=0.900000, min=-9.000000, max=9.000000, mean=0.000900
🔍 [LAYER 3] After FFN Residual (Layer Output): rms=1.100000, min=-1.000000, max=1.000000, mean=0.001100
🔍 [LAYER 3] First 10 values: [0.123456789, -0.987654321]

📊 [LAYER 3] Output: rms=1.100000, min=-1.000000, max=1.000000, first_10=[0.125, -0.5]
🔬 [LAYER 3 OUTPUT] Last token (pos=2): first 10: [1.5, 2.5]
   📊 Stats: mean=0.012345678, rms=1.234567890, min=-0.500000, max=0.750000
"""
TAIL = """🔍 [FINAL NORM] After output_norm (last token): rms=1.920277, min=-4.000000, max=5.000000, mean=0.010000
🔍 [FINAL NORM] First 10 values: [0.614511000, 0.592867000]
🔍 [LM HEAD INFO] lm_head total_elements=65536000, hidden_size=2048, vocab_size=32000
🔍 [LOGITS STEP 0] max=9.8548, min=-12.1258, mean=-0.0778
🔍 [LOGITS STEP 0] Top 5 tokens:
  #1: token_id=6397 logit=9.8548
  #2: token=2339 logit=8.4625
🎯 [STEP 0] Selected token 2339 (sampled, normalized_prob=0.1698, original_prob=0.1613)
"""


def test_every_form_of_a_line() -> None:
    trace = one(HEAD + LAYER_3 + TAIL)
    rms = {tap: s.values["rms"] for tap in trace.taps for s in trace.all_of(tap, Stats) if s.positions is None}
    assert rms == pytest.approx(
        {"Qcur_pre-0": 0.096568, "Qcur-0": 0.096568001, "l_out-2": 0.1, "attn_norm-3": 0.2, "attn_out-3": 0.3, "ffn_inp-3": 0.4}
        | {"ffn_norm-3": 0.5, "ffn_gate-3": 0.6, "ffn_up-3": 0.7, "ffn_swiglu-3": 0.8, "ffn_out-3": 0.9, "l_out-3": 1.1}
    )
    assert trace.find("l_out-2", Stats) == Stats(
        {"rms": 0.1, "min": -1.5, "max": 1.25, "mean": 0.0001}, None, {"rms": 6, "min": 6, "max": 6, "mean": 6}
    )
    assert trace.find("ffn_gate-3", Stats).digits == {"rms": 6, "max": 6, "mean": 9}  # type: ignore[union-attr]
    last = [s for s in trace.all_of("l_out-3", Stats) if s.positions is not None]
    assert [(s.positions, s.values["rms"]) for s in last] == [((2,), 1.23456789)]
    assert trace.find("result_norm", Stats).positions == (2,)  # type: ignore[union-attr]


def test_printed_values_and_where_they_stand() -> None:
    trace = one(HEAD + LAYER_3 + TAIL)
    seen = {(tap, s.positions): (s.values.tolist(), s.shape, s.digits) for tap in trace.taps for s in trace.all_of(tap, Sample)}
    f32 = lambda *x: [float(np.float32(v)) for v in x]  # noqa: E731
    assert seen["embd", (0,)] == (f32(-0.001099706, 0.001935482, -0.0016715527), (1, 2048), None)
    assert seen["Qcur_pre-0", (0,)] == (f32(0.5, -0.25, 1e-5), (1, 2048), None)
    assert seen["ffn_gate-3", (0,)] == (f32(0.1, 0.2), (1, 2), 9)
    assert seen["l_out-3", (2,)] == (f32(1.5, 2.5), (1, 2048), 1)
    assert seen["result_norm", (2,)] == (f32(0.614511, 0.592867), (1, 2048), 9)
    assert seen["result_output", (2,)] == (f32(8.4625, 9.8548), (1, 32000), 4)
    assert [s.values.tolist() for s in trace.all_of("l_out-3", Sample) if s.positions == (0,)] == [
        f32(0.123456789, -0.987654321),
        f32(0.125, -0.5),
    ]
    assert "Selected token 2339: logit 8.4625, rank 2." in trace.origin.notes
    assert any("how many channels" in note for note in trace.origin.notes)  # those of the FFN


def test_copies_in_notes() -> None:
    trace = one("- Layer 0: RMS=0.011214, Mean=0.000046\n- Layer 1 Input: RMS=0.011214\n**Layer 1 Output**: RMS=0.02, Max=−0.5\n")
    assert stats(trace, "l_out-0") == {"rms": 0.011214, "mean": 0.000046}
    assert stats(trace, "l_out-1") == {"rms": 0.02, "max": -0.5}
    assert one("Layer 1 last token: RMS=0.25\n").find("l_out-1", Stats) == Stats({"rms": 0.25}, AT_LAST, {"rms": 2})


def test_lines_in_a_note_with_other_tables(tmp_path: Path) -> None:
    (tmp_path / "note.md").write_text("| engine | token |\n|--|--|\n| a | 1 |\n\n```\n🔍 [LAYER 0] Input: rms=0.5\n```\n")
    found = read_file(tmp_path / "note.md")
    assert (found.kind, stats(found.runs[0].trace, "embd")) == ("rustorch", {"rms": 0.5})


def test_top_tokens_of_the_metal_build() -> None:
    text = "🔍 [LOGITS] Stats: max=5.0000, min=-1.0000, mean=0.1000\n"
    text += "🔍 [LOGITS] Top-5 tokens:\n   1. Token 77: 5.0000\n   2. Token 3: 4.5000\n"
    top = one(text).find("result_output", Sample)
    assert top is not None
    assert (top.index.tolist(), top.values.tolist(), top.positions) == ([3, 77], [4.5, 5.0], AT_LAST)


def test_nan_is_noted_and_infinity_kept() -> None:
    trace = one("🔍 [LAYER 0] Input: rms=NaN, min=-inf, max=inf, mean=NaN\n🔍 [LAYER 0] First 10 values: [NaN, 1.0]\n")
    assert stats(trace, "embd") == {"min": -np.inf, "max": np.inf}
    with pytest.raises(ImportFormatError, match="none with a number"):
        read("Layer 0: RMS=NaN\n")
    assert "embd: rms, mean is NaN." in trace.origin.notes
    assert any("l_out-0: 1 of 2 values are NaN or infinite, the first at printed value 0 (nan)" in n for n in trace.origin.notes)


def test_infinity_makes_no_false_number() -> None:
    """``rms=1.5x`` is no number of the format."""
    with pytest.raises(ImportFormatError, match="found none with a number"):
        read("🔍 [LAYER 0] Input: rms=1.5x\n")


# ---- Calls --------------------------------------------------------------------------------------------------------------


def call(n: int, ids: list[int], start: int, rms: float, selected: int) -> str:
    return (
        f"🔍 [FORWARD START] input_ids.len={len(ids)}, start_position={start}\n🔍 [INPUT TOKENS] {ids}\n"
        f"🔍 [GET_EMB] token={ids[-1]} embedding[0..10]=[0.5, 0.25]\n"
        f"🔍 [POSITION] Forward call {n}: seq_len={len(ids)}, current_position={start}, will apply RoPE positions: {start}..{start}\n"
        f"🔍 [LAYER 0] Input: rms={rms:.6f}, min=0.000000, max=0.000000, mean=0.000000\n"
        f"🔍 [FINAL NORM] After output_norm (last token): rms={rms:.6f}, min=0.000000, max=0.000000, mean=0.000000\n"
        f"🎯 [STEP {n}] Selected token {selected} (sampled)\n"
    )


def test_generation_with_a_cache() -> None:
    imported = read(call(0, [1, 5, 5], 0, 0.1, 9) + call(1, [9], 3, 0.2, 8) + call(2, [8], 4, 0.3, 7))
    origins = [r.trace.origin for r in imported.runs]
    assert [o.tokens for o in origins] == [(1, 5, 5), (1, 5, 5, 9), (1, 5, 5, 9, 8)]
    assert [o.positions for o in origins] == [None, (3,), (4,)]
    assert [r.trace.find("result_norm", Stats).positions for r in imported.runs] == [(2,), (3,), (4,)]  # type: ignore[union-attr]
    assert [r.trace.find("embd", Sample).positions for r in imported.runs] == [(1,), (3,), (4,)]  # type: ignore[union-attr]
    assert "call 1, the prompt, is taken" in (choose(imported, None, "x.log")[1] or "")


def test_generation_without_a_cache() -> None:
    imported = read(call(0, [1, 5], 0, 0.1, 9) + call(1, [1, 5, 9], 0, 0.2, 8))
    assert [r.continues for r in imported.runs] == [False, True]


def test_two_runs() -> None:
    imported = read(call(0, [1, 5], 0, 0.1, 9) + call(1, [9], 2, 0.2, 8) + call(0, [1, 6], 0, 0.3, 7))
    with pytest.raises(ImportFormatError, match=r"2 runs in one file.*call 1 \(tokens 1, 5\).*call 3 \(tokens 1, 6\)"):
        choose(imported, None, "x.log")


def test_embeddings_of_equal_tokens_stand_at_their_positions() -> None:
    lines = "🔍 [INPUT TOKENS] [1, 5, 5]\n" + "🔍 [GET_EMB] token=5 embedding[0..10]=[0.5, 0.25]\n" * 2
    assert [s.positions for s in one(lines).all_of("embd", Sample)] == [(1,), (2,)]


def test_an_embedding_after_a_layer_is_the_next_calls() -> None:
    lines = "🔍 [GET_EMB] token=5 embedding[0..10]=[0.5, 0.25]\n🔍 [LAYER 0] Input: rms=0.1\n"
    first, second = read("🔍 [INPUT TOKENS] [5, 5]\n" + lines + lines).runs
    assert len(first.trace.all_of("embd", Sample)) == 1
    assert list(second.trace.taps) == ["embd"]


def test_calls_of_which_only_the_embeddings_were_printed() -> None:
    lines = "".join(f"🔍 [INPUT TOKENS] [{t}]\n🔍 [GET_EMB] token={t} embedding[0..10]=[0.{t}, 0.5]\n" for t in (1, 2))
    assert [r.trace.origin.tokens for r in read(lines).runs] == [(1,), (2,)]


def test_without_opening_lines_a_repeated_line_is_another_call() -> None:
    imported = read("Layer 0: RMS=0.1\nLayer 1: RMS=0.2\nLayer 0: RMS=0.3\nLayer 1: RMS=0.4\n")
    assert [stats(r.trace, "l_out-1") for r in imported.runs] == [{"rms": 0.2}, {"rms": 0.4}]


@pytest.mark.parametrize(
    "end",
    [
        "🔍 [LAYER 1] Input: rms=0.100000, min=-1.500000, max=1.25",
        "🔍 [LAYER 1] Input: rms=0.100000, min=",
        "🔍 [LAYER 1] First 10 values: [0.123456789, -0.98",
        "🔍 [INPUT TOKENS] [1, 2",
    ],
)
def test_a_cut_last_line_is_left_out_and_said(end: str) -> None:
    imported = read("Layer 0: RMS=0.1\n" + end)
    assert list(imported.runs[0].trace.taps) == ["l_out-0"]
    assert "last line is cut short" in imported.warnings[0]


def test_a_last_line_without_its_line_break_is_kept_when_it_is_whole() -> None:
    imported = read("Layer 0: RMS=0.011214, Mean=0.000046\nLayer 5: RMS=0.175816, Mean=0.002492")
    assert imported.warnings == ()
    assert stats(imported.runs[0].trace, "l_out-5") == {"rms": 0.175816, "mean": 0.002492}


def test_ids_from_the_command_line_give_the_last_position_its_number() -> None:
    trace = with_known(logged("q4_k_m"), {"tokens": (1, 15043, 7)})
    assert trace.find("result_norm", Stats).positions == (2,)  # type: ignore[union-attr]
    with pytest.raises(ImportFormatError, match="written from other ids"):
        with_known(logged("one-token"), {"tokens": (1, 15043)})


forms = st.sampled_from([*HEAD.splitlines(), *LAYER_3.splitlines(), *TAIL.splitlines()])


@given(st.lists(forms | st.text(max_size=40), max_size=30), st.integers(0, 40))
def test_lines_in_any_order_and_cut_anywhere(lines: list[str], cut: int) -> None:
    text = "\n".join(lines)
    with suppress(ImportFormatError):
        assert all(r.trace.taps for r in read(text[: len(text) - cut]).runs)


# ---- Dumps --------------------------------------------------------------------------------------------------------------


def write(path: Path, values: torch.Tensor) -> None:
    path.write_text("".join(f"{v!r}\n" for v in values.tolist()))


def test_a_folder_of_dumps(tmp_path: Path) -> None:
    x = {n: torch.randn(8, generator=torch.Generator().manual_seed(n)) for n in range(5)}
    write(tmp_path / "rustorch_embedding.txt", x[0])
    write(tmp_path / "rustorch_layer_0.txt", x[1])
    write(tmp_path / "rustorch_layer_21.txt", x[2])
    write(tmp_path / "hidden_state_call_0.txt", x[3])
    write(tmp_path / "hidden_state_call_1.txt", x[4])
    (tmp_path / "rustorch_logits.txt").write_text("0 0.500000\n1 -1.250000\n2 NaN\n")
    first, second = read_dumps(tmp_path).runs
    assert list(first.trace.taps) == ["embd", "l_out-0", "l_out-21", "result_norm", "result_output"]
    found = {tap: first.trace.find(tap, Full) for tap in first.trace.taps}
    for tap, n in (("embd", 0), ("l_out-0", 1), ("l_out-21", 2), ("result_norm", 3)):
        assert torch.equal(found[tap].values, x[n][None])  # type: ignore[union-attr]
        assert found[tap].positions == AT_LAST  # type: ignore[union-attr]
    assert "result_output: 1 of 3 values are NaN or infinite, the first at channel 2 (nan)." in first.trace.origin.notes
    assert second.continues
    assert list(second.trace.taps) == ["result_norm"]
    numbered = with_known(first.trace, {"tokens": (1, 2, 3)})
    assert numbered.find("l_out-0", Full).positions == (2,)  # type: ignore[union-attr]


def test_a_log_beside_the_dumps_says_which_position_they_are(tmp_path: Path) -> None:
    write(tmp_path / "rustorch_layer_0.txt", torch.ones(4))
    write(tmp_path / "hidden_state_call_1.txt", torch.ones(4))
    (tmp_path / "run.log").write_text(call(0, [1, 5, 5], 0, 0.1, 9) + call(1, [9], 3, 0.2, 8))
    first, second = read_dumps(tmp_path).runs
    assert first.trace.find("l_out-0", Full).positions == (2,)  # type: ignore[union-attr]
    assert second.trace.find("result_norm", Full).positions == (3,)  # type: ignore[union-attr]


@pytest.mark.parametrize(("content", "found"), [("0.5\nabc\n", "'abc' in line 2"), ("", "an empty file"), ("0.5\n0.25 1\n", "line 2")])
def test_damaged_dumps(tmp_path: Path, content: str, found: str) -> None:
    (tmp_path / "rustorch_layer_0.txt").write_text(content)
    with pytest.raises(ImportFormatError, match=found):
        read_dumps(tmp_path)
    (tmp_path / "rustorch_layer_0.txt").unlink()
    (tmp_path / "rustorch_logits.txt").write_text("0 0.5\n2 0.5\n")
    with pytest.raises(ImportFormatError, match="line 2: expected `1 LOGIT`"):
        read_dumps(tmp_path)
