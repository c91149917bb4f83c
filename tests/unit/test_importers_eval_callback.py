"""The log of llama-eval-callback: a real one, and the printing rules written again for made-up tensors."""

from __future__ import annotations

import gzip
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import quantscope
from quantscope.engines.reference import trace
from quantscope.errors import ImportFormatError
from quantscope.importers.base import Imported, choose, decoded
from quantscope.importers.eval_callback import read_eval_callback
from quantscope.importers.printed import PrintedReader
from quantscope.metrics import nmse
from quantscope.trace import Sample, Stats, Trace, rows_of
from tests.unit.printed_logs import NEW, OLD, body, ids_lines, kept, node

DEMO = Path(quantscope.__file__).parent / "data" / "demo-f16.gguf"
DATA = Path(__file__).parents[1] / "data" / "eval_callback"
IDS = (1, 1156, 327, 771, 261, 607)


@cache
def log_text(name: str = "demo-f16") -> str:
    return decoded(gzip.decompress((DATA / f"{name}.log.gz").read_bytes()))


@cache
def real() -> Trace:
    (run,) = read_eval_callback(log_text(), "demo.log").runs
    return run.trace


def read(text: str) -> Imported:
    return read_eval_callback(text, "x.log")


def one(text: str) -> Trace:
    (run,) = read(text).runs
    return run.trace


def tensor(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# ---- A real log ---------------------------------------------------------------------------------------------------------


def test_every_tap_of_a_real_log_has_the_values_of_the_reference() -> None:
    """The log is of an F16 file: llama.cpp rounds activations to F16, which is an error of about 1e-6."""
    reference = trace(str(DEMO), IDS)
    assert list(real().taps) == list(reference.taps)
    for tap in real().taps:
        sample = real().find(tap, Sample)
        assert sample is not None
        wanted = sample.positions or range(len(IDS))
        full = reference.find(tap, type(reference.taps[tap][0]))  # type: ignore[type-var]
        values = rows_of(full, reference.origin, wanted)  # type: ignore[arg-type]
        assert sample.shape == tuple(values.shape), tap
        assert nmse(values.flatten()[sample.index], sample.values) < 1e-5, tap


def test_sums_of_a_real_log_are_those_of_all_values() -> None:
    reference = trace(str(DEMO), IDS)
    compared = 0
    for tap, pieces in real().taps.items():
        stats = next(e for e in pieces if isinstance(e, Stats))
        values = rows_of(reference.taps[tap][0], reference.origin, stats.positions or range(len(IDS)))  # type: ignore[arg-type]
        size = float(values.double().abs().sum())
        assert abs(stats.values["sum"] - float(values.double().sum())) < 2e-3 * size, tap
        assert stats.digits == {"sum": 6}
        compared += 1
    assert compared == 163


def test_a_real_log_says_tokens_and_the_position_that_the_last_layer_keeps() -> None:
    assert real().origin.tokens == IDS
    assert real().origin.engine == "llama.cpp"
    cut = {tap for tap, pieces in real().taps.items() if any(e.positions == (5,) for e in pieces)}
    stems = ("ffn_inp", "ffn_norm", "ffn_gate", "ffn_up", "ffn_swiglu", "ffn_out", "l_out")
    assert cut == {f"{stem}-9" for stem in stems} | {"result_norm", "result_output"}
    assert real().find("attn_out-9", Sample).shape == (6, 256)  # type: ignore[union-attr]


def test_attention_maps_lose_their_padding() -> None:
    sample = real().find("kq_soft_max-0", Sample)
    assert sample is not None
    assert sample.shape == (8, 6, 6)
    first_row = sample.values[(sample.index // 36 == 0) & (sample.index // 6 % 6 == 0)]
    assert first_row[0] == 1  # position 0 sees only itself


@pytest.mark.parametrize("name", ["demo-f16", "demo-q4_k_m"])
def test_a_log_from_which_the_end_is_missing_gives_nothing_else_than_the_whole(name: str) -> None:
    """Also where the cut is in the middle of a tensor, a number or a sum."""
    text = log_text(name)
    (run,) = read(text).runs
    rng = np.random.default_rng(1)
    for at in sorted(rng.integers(2000, len(text), 12)):
        cut = read(text[:at])
        assert len(cut.runs) == 1
        for tap, pieces in cut.runs[0].trace.taps.items():
            if tap.startswith(("Qcur", "Kcur", "attn_out")):
                continue  # of several nodes of one tap the last one may be missing
            whole = run.trace.taps[tap]
            for piece in pieces:
                assert any(same(piece, w) for w in whole), (at, tap)


def same(a: object, b: object) -> bool:
    if isinstance(a, Sample) and isinstance(b, Sample):
        return a.shape == b.shape and torch.equal(a.index, b.index) and torch.equal(a.values, b.values) and a.positions == b.positions
    return a == b


def test_a_cut_tensor_is_said() -> None:
    text = node("l_out-0", "ADD", tensor(1, 2, 9)) + node("l_out-1", "ADD", tensor(1, 2, 9))
    cut = read(text[: text.index("sum", text.index("l_out-1")) - 20])
    assert list(cut.runs[0].trace.taps) == ["l_out-0"]
    assert "l_out-1 are incomplete" in cut.warnings[0]
    with pytest.raises(ImportFormatError, match="cut short or filtered"):
        read(text[: text.index("sum") - 20])


@pytest.mark.parametrize("at", [-2, -7, -8])
def test_a_cut_sum_is_left_out_and_its_values_are_kept(at: int) -> None:
    """A sum has six decimals, so that one with fewer was cut."""
    whole = node("l_out-0", "ADD", tensor(1, 2, 9))
    assert len(one(whole).taps["l_out-0"]) == len(one(whole[:-1]).taps["l_out-0"]) == 2
    (sample,) = one(whole[:at]).taps["l_out-0"]
    assert isinstance(sample, Sample)


# ---- The printing rules -------------------------------------------------------------------------------------------------

shapes = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))


@given(shapes, st.sampled_from([NEW, OLD]), st.integers(0, 99))
def test_printed_tensors_are_read_back(shape: tuple[int, int, int], style: dict[str, str], seed: int) -> None:
    x = tensor(*shape, seed=seed) * 10
    reader = PrintedReader()
    for line in body(x, style).splitlines():
        assert reader.line(line.strip()), line
    found = reader.printed(shape[::-1])
    assert found is not None
    places = [[i for i in kept(n) if i is not None] for n in shape]
    wanted = [x[k, j, i] for k in places[0] for j in places[1] for i in places[2]]
    assert found.values.tolist() == [np.float32(f"{v:.4f}") for v in wanted]
    assert found.index.tolist() == [(k * shape[1] + j) * shape[2] + i for k in places[0] for j in places[1] for i in places[2]]
    assert found.digits == 4
    assert found.sum == pytest.approx(float(x.sum()), abs=1e-4)


noise = st.text(st.characters(blacklist_characters="[]\r\n", blacklist_categories=["Cs", "Zl", "Zp", "Cc"]), max_size=30)


@given(st.lists(noise, min_size=1, max_size=8), st.integers(0, 9), st.sampled_from(["", "2026-11-25T22:00:0{}Z ", "[pod-3] 0.00.1{}.4 I "]))
@settings(max_examples=60)
def test_other_lines_prefixes_and_colours_do_not_hurt(lines: list[str], seed: int, prefix: str) -> None:
    x = tensor(1, 5, 8, seed=seed)
    plain = node("embd", "GET_ROWS", x) + node("l_out-0", "ADD", x + 1)
    rng, out = np.random.default_rng(seed), ""
    for n, line in enumerate(plain.splitlines()):
        out += "\x1b[34m" + prefix.format(n) + "\x1b[0m" + line + "\n"
        if rng.random() < 0.4:
            out += f"load: {rng.choice(lines)}\n"
    found = read(decoded(out.encode())).runs[0].trace
    wanted = one(plain)
    assert list(found.taps) == list(wanted.taps)
    assert all(same(a, b) for tap in wanted.taps for a, b in zip(found.taps[tap], wanted.taps[tap], strict=True))


@given(
    st.text(max_size=300)
    | st.lists(st.sampled_from([*node("l_out-0", "ADD", tensor(1, 2, 8)).splitlines(), "[", "]", "..."])).map("\n".join)
)
def test_garbage_is_refused_not_crashed_on(text: str) -> None:
    with suppress(ImportFormatError):
        assert read(text).runs


def test_not_a_number_and_infinity() -> None:
    x = tensor(1, 2, 8)
    x[0, 1, 0], x[0, 1, 7] = np.nan, -np.inf
    found = one(node("l_out-0", "ADD", x))
    sample = found.find("l_out-0", Sample)
    assert sample is not None
    assert int((~sample.values.isfinite()).sum()) == 2
    assert "2 of 12 values are NaN or infinite, the first at printed value 6 (nan)" in " ".join(found.origin.notes)
    assert "l_out-0: sum is NaN" in " ".join(found.origin.notes)


# ---- Other builds -------------------------------------------------------------------------------------------------------


def test_sums_of_printed_values_only_are_left_out() -> None:
    """Builds before September 2025."""
    text = "".join(node(f"l_out-{i}", "ADD", tensor(1, 9, 9, seed=i), OLD, sum_of_printed=True) for i in range(3))
    found = one(text)
    assert not any(isinstance(e, Stats) for pieces in found.taps.values() for e in pieces)
    assert "added up the printed values only" in found.origin.notes[0]


def test_names_of_2024() -> None:
    """kqv_merged_cont was what kqv_out is today, and kqv_out the output projection."""
    x, big = tensor(1, 5, 8), tensor(1, 5, 12)
    steps = [("inp_embd", "GET_ROWS", x), ("attn_norm-0", "MUL", x), ("Qcur-0", "MUL_MAT", x), ("Qcur-0 (reshaped)", "RESHAPE", x)]
    steps += [("Qcur-0", "ROPE", x.reshape(5, 2, 4) + 1), ("kqv_merged_cont-0", "CONT", x + 2), ("kqv_out-0", "MUL_MAT", x + 3)]
    steps += [("ffn_inp-0", "ADD", x + 4), ("ffn_gate_par-0", "MUL", big), ("l_out-0", "ADD", x + 5)]
    found = one("".join(node(n, op, v, OLD) for n, op, v in steps))
    assert list(found.taps) == [
        "embd",
        "attn_norm-0",
        "Qcur_pre-0",
        "Qcur-0",
        "kqv_out-0",
        "attn_out-0",
        "ffn_inp-0",
        "ffn_swiglu-0",
        "l_out-0",
    ]
    first = {tap: round(float(found.find(tap, Sample).values[0] - x[0, 0, 0])) for tap in ("Qcur-0", "kqv_out-0", "attn_out-0", "l_out-0")}  # type: ignore[union-attr]
    assert first == {"Qcur-0": 1, "kqv_out-0": 2, "attn_out-0": 3, "l_out-0": 5}
    assert found.find("Qcur-0", Sample).shape == (5, 8)  # type: ignore[union-attr]


def test_the_first_values_only_and_no_sum() -> None:
    """The very first build, as its README shows it."""
    text = (
        "ggml_debug:    inp_embd = (f32)   GET_ROWS(token_embd.weight{2560, 51200, 1, 1}, inp_tokens{1, 1, 1, 1}}) = {2560, 1, 1, 1}\n"
        "      [\n       [\n        [ -0.0181,   0.0272,   0.0273, ...],\n       ],\n      ]\n"
    )
    sample = one(text).find("embd", Sample)
    assert sample is not None
    assert (sample.shape, sample.index.tolist(), sample.digits) == ((1, 2560), [0, 1, 2], 4)


def test_flash_attention_names_a_view() -> None:
    x = tensor(1, 5, 8)
    found = one(node("embd", "GET_ROWS", x) + node("kqv_out-0", "RESHAPE", x) + node("attn_out-0", "MUL_MAT", x))
    assert list(found.taps) == ["embd", "kqv_out-0", "attn_out-0"]


# ---- Several evaluations ------------------------------------------------------------------------------------------------


def evaluation(n: int, seed: int = 0) -> str:
    x = tensor(1, n, 8, seed=seed)
    return node("embd", "GET_ROWS", x) + node("l_out-0", "ADD", x + 1)


def test_prompt_and_decoding() -> None:
    imported = read(ids_lines([5, 6, 7]) + evaluation(3) + evaluation(1, 1) + evaluation(1, 2))
    assert [r.trace.origin.positions for r in imported.runs] == [None, (3,), (4,)]
    assert [r.trace.origin.tokens for r in imported.runs] == [(5, 6, 7), None, None]
    run, said = choose(imported, None, "x.log")
    assert run is imported.runs[0]
    assert said is not None
    assert "3 forward calls of one generation; call 1, the prompt, is taken" in said
    assert choose(imported, 3, "x.log") == (imported.runs[2], None)


def test_a_prompt_in_several_parts() -> None:
    imported = read(ids_lines([5, 6, 7, 8, 9]) + evaluation(3) + evaluation(2, 1))
    assert [r.continues for r in imported.runs] == [False, True]
    assert imported.runs[1].trace.origin.tokens == (5, 6, 7, 8, 9)
    assert imported.runs[1].trace.origin.positions == (3, 4)


def test_a_prompt_of_one_token_after_another_run_is_no_continuation() -> None:
    assert [r.continues for r in read(ids_lines([5, 6]) + evaluation(2) + ids_lines([9]) + evaluation(1, 1)).runs] == [False, False]
    again = "llama_model_loader: loaded meta data with 26 key-value pairs and 93 tensors from b.gguf (version GGUF V3 (latest))\n"
    assert [r.continues for r in read(evaluation(2) + again + evaluation(1, 1)).runs] == [False, False]


def test_two_runs_in_one_log() -> None:
    imported = read(ids_lines([5, 6]) + evaluation(2) + ids_lines([5, 8]) + evaluation(2, 1))
    with pytest.raises(ImportFormatError, match=r"2 runs in one file.*call 1 \(tokens 5, 6\), call 2 \(tokens 5, 8\).*--call N"):
        choose(imported, None, "x.log")
    assert choose(imported, 2, "x.log")[0].trace.origin.tokens == (5, 8)
    with pytest.raises(ImportFormatError, match="there is no call 3, expected 1 to 2"):
        choose(imported, 3, "x.log")


def test_a_warm_up_is_no_run() -> None:
    """llama-debug evaluates BOS and EOS before the prompt; only a verbose log says so."""
    said = "common_init_: warming up the model with an empty run - please wait ... (--no-warmup to disable)\n"
    assert one(said + evaluation(2) + evaluation(3, 1)).find("l_out-0", Sample).shape == (3, 8)  # type: ignore[union-attr]
    imported = read(evaluation(2) + evaluation(3, 1))
    with pytest.raises(ImportFormatError, match=r"call 1 \(2 tokens, ids not known\), call 2 \(3 tokens, ids not known\)"):
        choose(imported, None, "x.log")


def test_llama_debug_names_the_ids_after_the_evaluation() -> None:
    text = evaluation(2) + 'Model add_bos: true\nInput prompt: "Hi"\nToken ids (2):\n<s>(1) Hi(15043) \n'
    assert one(text).origin.tokens == (1, 15043)


def test_model_and_architecture_are_taken_from_the_loader() -> None:
    head = "llama_model_loader: loaded meta data with 26 key-value pairs and 93 tensors from /a/b/demo.gguf (version GGUF V3 (latest))\n"
    head += "llama_model_loader: - kv   0:                       general.architecture str              = llama\n"
    origin = one(head + evaluation(2)).origin
    assert (origin.model, origin.arch) == ("demo.gguf", "llama")
