"""Tables of statistics, and whether their rows belong together."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantscope.errors import ImportFormatError
from quantscope.findings.traces import study_of
from quantscope.importers.base import Imported, Run
from quantscope.importers.consistency import mixed_warning, origins, residual_mismatches
from quantscope.importers.rustorch import read_rustorch
from quantscope.importers.table import quantity, read_table
from quantscope.trace import Full, Origin, Stats, Trace, full_trace
from quantscope.wording import times

DATA = Path(__file__).parents[1] / "data" / "rustorch"


def read(text: str) -> Imported:
    return read_table(text, "x.md", default="x")


def traces(text: str) -> dict[str, Trace]:
    return {r.name: r.trace for r in read(text).runs}


def stats(trace: Trace, tap: str) -> dict[str, float]:
    (found,) = trace.all_of(tap, Stats)
    return dict(found.values)


def seed() -> dict[str, Trace]:
    return traces((DATA / "seed-tables.md").read_text("utf-8"))


def run(name: str) -> Run:
    (found,) = read_rustorch((DATA / f"{name}.log").read_text("utf-8"), name).runs
    return Run(f"{name}.log", found.trace)


# ---- The seed's tables --------------------------------------------------------------------------------------------------


def test_seed_tables() -> None:
    found = seed()
    assert list(found) == ["Q4_K_M", "Q4_0"]
    assert {t.origin.engine for t in found.values()} == {"RusTorch"}
    study = study_of(list(found.items()))
    assert study is not None
    growth = {v.name: [times(r.rms_growth) for r in v.layers] for v in study.variants}
    assert growth == {"Q4_K_M": ["1.0×", "10.3×", "21.2×", "33.1×", "74.9×"], "Q4_0": ["1.0×", "10.0×", "19.9×", "32.4×", "72.1×"]}
    last = study.variant("Q4_0").layers[-1]
    assert (last.input_rms, last.output_rms, last.mean, last.swiglu_rms, last.swiglu_mean) == (
        0.890467,
        1.0547,
        0.023314,
        0.181741,
        0.015373,
    )


def test_seed_tables_and_its_log_are_the_same_numbers() -> None:
    for name in ("q4_k_m", "q4_0"):
        table, log = seed()[name.upper()], run(name).trace
        for tap, pieces in table.taps.items():
            (own,) = pieces
            assert isinstance(own, Stats)
            (other,) = log.all_of(tap, Stats)
            assert (dict(own.values), dict(own.digits)) == (dict(other.values), dict(other.digits)), tap


def test_a_table_of_tokens_is_not_read_and_counted() -> None:
    assert read((DATA / "seed-tables.md").read_text("utf-8")).warnings == ("x.md: 1 table without layers or statistics not read.",)


# ---- Forms of tables ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heading", "found"),
    [
        ("Input RMS", ("input", "rms")),
        ("入力RMS", ("input", "rms")),
        ("出力RMS", ("l_out", "rms")),
        ("RMS", ("l_out", "rms")),
        ("Mean値", ("l_out", "mean")),
        ("平均値", ("l_out", "mean")),
        ("SwiGLU Mean", ("ffn_swiglu", "mean")),
        ("SwiGLU平均", ("ffn_swiglu", "mean")),
        ("RMS成長率", ("", "")),
        ("RMS growth", ("", "")),
        ("max", ("l_out", "max")),
        ("tokens", None),
    ],
)
def test_headings(heading: str, found: tuple[str, str] | None) -> None:
    assert quantity(heading) == found


def test_a_column_a_variant() -> None:
    found = traces(
        "## Output RMS\n\n| Layer | Q4_K_M | **Q4_0** | F16 |\n|--|--|--:|:-:|\n| 0 | 0.5 | **.25** ⚠️ | 1 |\n| 1 | 1.0x | – | −2.5e-3 |\n"
    )
    assert {n: {tap: stats(t, tap)["rms"] for tap in t.taps} for n, t in found.items()} == {
        "Q4_K_M": {"l_out-0": 0.5, "l_out-1": 1.0},
        "Q4_0": {"l_out-0": 0.25},
        "F16": {"l_out-0": 1.0, "l_out-1": -0.0025},
    }
    assert found["F16"].find("l_out-1", Stats).digits == {}  # type: ignore[union-attr]


def test_a_heading_with_two_names_compares_them() -> None:
    table = "| Layer | Output RMS |\n|--|--|\n| 0 | 0.5 |\n"
    assert list(traces(f"# Q4_0 against Q6_K\n\n{table}")) == ["x"]
    assert list(traces(f"# Q6_K\n\n## Q4_0 against Q6_K\n\n{table}")) == ["Q6_K"]


def test_a_row_a_variant() -> None:
    found = traces("量子化,レイヤー,入力RMS,出力RMS,平均\nQ4_0,0,0.1,0.2,0.01\nQ6_K,0,0.3,0.4,\n")
    assert stats(found["Q4_0"], "embd") == {"rms": 0.1}
    assert stats(found["Q6_K"], "l_out-0") == {"rms": 0.4}


def test_several_quantities_in_a_cell() -> None:
    found = traces(
        "Each cell: input RMS / output RMS / SwiGLU mean.\n\n"
        "| L | Q4_0 | Q6_K (output RMS / mean) |\n|-|-|-|\n| 1 | .1/.2/−.03 | .4/.05 |\n"
    )
    assert (stats(found["Q4_0"], "l_out-0"), stats(found["Q4_0"], "ffn_swiglu-1")) == ({"rms": 0.1}, {"mean": -0.03})
    assert stats(found["Q6_K"], "l_out-1") == {"rms": 0.4, "mean": 0.05}


def test_a_row_a_tap_with_semicolons() -> None:
    found = traces("tap;rms;mean;min;max\nl_out-0;1.5;0.1;-3;4\nresult_norm;2;0;;\nnothing;1;1;1;1\n")["x"]
    assert list(found.taps) == ["l_out-0", "result_norm"]
    assert stats(found, "l_out-0") == {"rms": 1.5, "mean": 0.1, "min": -3, "max": 4}


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "| a | b |\n|--|--|\n| 1 | 2 |\n", "layer,name\n0,x\n"])
def test_no_table_of_statistics(text: str) -> None:
    with pytest.raises(ImportFormatError, match="expected a table with a column `layer`"):
        read(text)


cells = st.sampled_from(["|", "---", "Layer", "RMS", "0", "1.5", "\n", "#", "Q4_0", ",", '"', "**", "/", "−", "\\"]) | st.text(max_size=5)


@given(st.lists(cells, max_size=60).map("".join))
def test_garbage(text: str) -> None:
    with suppress(ImportFormatError):
        assert read(text).runs


# ---- Which run a row is from --------------------------------------------------------------------------------------------

RUNS = [run("q4_k_m-hello"), run("q4_k_m-test")]


def test_row_0_of_the_seed_mixes_two_runs() -> None:
    rows = origins("Q4_K_M", seed()["Q4_K_M"], RUNS)
    assert [(r.layer, r.mixed) for r in rows] == [(0, True), (5, False), (10, False), (15, False), (21, False)]
    warning = mixed_warning(rows[0], RUNS)
    assert "Row 0 mixes two runs" in warning
    assert "input RMS 0.009276 from q4_k_m-hello.log, where the output RMS is 0.015113" in warning
    assert "output RMS 0.015003 from q4_k_m-test.log, where the input RMS is 0.009120" in warning
    assert all(c.runs == ("q4_k_m-hello.log",) for r in rows[1:] for c in r.cells)


def test_one_run_alone_gives_no_warning_and_another_file_none_either() -> None:
    assert not any(r.mixed for r in origins("Q4_K_M", seed()["Q4_K_M"], RUNS[:1]))
    rows = origins("Q4_0", seed()["Q4_0"], RUNS)
    assert not any(r.mixed or r.found for r in rows)


def test_between_two_layers_the_output_and_the_next_input_are_looked_up_apart() -> None:
    table = traces("layer,input RMS,output RMS\n0,0.1,0.200\n1,0.250,0.3\n")["x"]
    a, b = traces("layer,output RMS\n0,0.200\n1,0.3\n")["x"], traces("layer,output RMS\n0,0.250\n")["x"]
    found = {(r.layer, c.what): c.runs for r in origins("x", table, [Run("a", a), Run("b", b)]) for c in r.cells}
    assert found == {(0, "input RMS"): (), (0, "output RMS"): ("a",), (1, "input RMS"): ("b",), (1, "output RMS"): ("a",)}


def test_numbers_agree_to_the_digits_that_were_printed() -> None:
    table = traces("layer,output RMS,mean\n0,0.0151,0.00\n")["x"]
    whole = Run("run", Trace(Origin("e"), {"l_out-0": (Stats({"rms": 0.015113, "mean": 0.004}, None, {"rms": 6}),)}))
    (row,) = origins("x", table, [whole])
    assert [c.runs for c in row.cells] == [("run",), ("run",)]
    far = Run("run", Trace(Origin("e"), {"l_out-0": (Stats({"rms": 0.01516, "mean": 0.006}, None, {"rms": 5}),)}))
    (row,) = origins("x", table, [far])
    assert [c.runs for c in row.cells] == [(), ()]


def test_a_trace_of_whole_tensors_is_a_run_too() -> None:
    x = torch.tensor([[3.0, 4.0]])
    table = traces("layer,output RMS\n0,3.536\n")["x"]
    (row,) = origins("x", table, [Run("ours", full_trace(Origin("reference"), {"l_out-0": x}))])
    assert row.cells[0].runs == ("ours",)


# ---- One residual stream ------------------------------------------------------------------------------------------------


def test_output_is_the_next_input() -> None:
    good = "layer,input RMS,output RMS\n0,0.1,0.20\n1,0.204,0.3\n"  # 0.20 and 0.204: the same to two digits
    assert residual_mismatches(traces(good)["x"]) == []
    (said,) = residual_mismatches(traces(good.replace("0.204", "0.25"))["x"])
    assert said.startswith("The RMS of layer 0's output is 0.20, but 0.25 where it is layer 1's input")
    rows = study_of([("x", traces(good.replace("0.204", "0.25"))["x"])])
    assert rows is not None
    assert [(r.input_rms, r.output_rms) for r in rows.variants[0].layers] == [(0.1, 0.2), (0.25, 0.3)]


def test_whole_tensors_make_layer_rows() -> None:
    x, y = torch.tensor([[3.0, -4.0]]), torch.tensor([[6.0, 8.0]])
    study = study_of([("ours", Trace(Origin("reference"), {"embd": (Full(x),), "l_out-0": (Full(y),), "l_out-1": (Full(2 * y, (0,)),)}))])
    assert study is not None
    (row,) = study.variants[0].layers
    assert (row.layer, row.input_rms, row.output_rms, row.mean) == (0, pytest.approx(12.5**0.5), pytest.approx(50**0.5), 7.0)
    assert study_of([("none", Trace(Origin("e"), {"embd": (Full(x),)}))]) is None
