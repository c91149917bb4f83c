"""The fault benchmark: its counts are those of its cases, and a verdict that is wrong lowers them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import fault_cases, faults
from benchmarks.fault_cases import KINDS, Case, File, Model, Run
from benchmarks.fault_report import FIGURES, Judged, Report, markdown, rate, wrong
from benchmarks.planted import Planted
from quantscope.diagnose.causes import Causes, Named
from quantscope.diagnose.faults import FAULTS, Instance
from quantscope.diagnose.search import Candidate, Search
from quantscope.trace import Origin, Sample, Stats, full_trace
from tests.models import make_gguf

ASKED = ["--cases", "3", "--pairs", "0", "--clean", "1", "--engines", "numpy", "--kinds", "full,statistics", "--seed", "5"]
SHAPES = {"embd": (7, 16), "kq_soft_max-0": (5, 7, 7), "result_output": (7, 300)}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[File]:
    """One small model that two engines can run."""
    monkeypatch.setitem(fault_cases.MODELS, "tiny", Model(lambda to: make_gguf(to, dtype="Q8_0"), ("Q8_0",), ("numpy", "reference")))
    monkeypatch.setattr(faults, "machine", lambda: "a machine")
    return fault_cases.make_files(tmp_path, ["tiny"])


def run(files: list[File], *asked: str) -> Report:
    return faults.measured(files, faults.parser().parse_args([*ASKED, *asked]))


def row(**fields: Any) -> Judged:
    """A verdict on a fault that the evidence shows, all of it wrong."""
    return Judged("numpy", "tiny", "Q8_0", "mask-missing", ("mask-missing",), 8, "full", "kq_soft_max-0", True).but(**fields)


def figure(kind: str, name: str) -> tuple[Any, ...]:
    return next((f, kind) for f in FIGURES if kind in f.kinds and f.name == name)


def figures(report: Report) -> dict[str, tuple[int, int]]:
    return {f"{kind} {f.name}": rate(report.faulty, f, [kind]) for f in FIGURES for kind in f.kinds}


def test_every_case_is_counted_once(files: list[File]) -> None:
    report = run(files)
    assert len(report.rows) == (3 + 1) * 2
    assert {(r.engine, r.model, r.type) for r in report.rows} == {("numpy", "tiny", "Q8_0"), ("clean", "tiny", "Q8_0")}
    assert not [r.error for r in report.rows if r.error]
    assert not report.false_alarms
    counted = figures(report)
    for kind in ("full", "statistics"):
        shown = sum(r.kind == kind and r.visible for r in report.rows if r.engine != "clean")
        assert counted[f"{kind} detection"] == (shown, shown)
        assert shown >= 2
    assert counted["full convicted operation"] == counted["full cause, top 1"] == counted["full detection"]
    assert counted["fingerprints detection"] == (0, 0)
    text = markdown(report)
    assert "| full | detection | ≥ 0.99 | 1.000 (3/3) |" in text
    assert "Clean comparisons: 1 " in text
    assert "**0 false alarms**" in text


def test_a_wrong_verdict_lowers_the_rates(files: list[File], monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_one = Candidate((Instance(next(f for f in FAULTS if f.name == "rope-stuck")),), None, 1.0, 1.0, True)
    found = Search("values", ("embd",), (wrong_one,), 1)
    monkeypatch.setattr(faults, "search", lambda *args, **more: found)
    monkeypatch.setattr(faults, "find", lambda *args, **more: Causes(5, (Named(wrong_one.faults[0], "embd"),), searched=found))
    report = run(files)
    counted = figures(report)
    assert counted["full detection"] == (3, 3)  # that something is wrong is right, of a fault
    assert counted["full first bad tap"] == counted["full cause, top 1"] == (0, 3)
    assert len(report.false_alarms) == 1  # and an alarm where there is none, on the one kind that is searched
    assert "| rope-stuck |" in markdown(report)
    monkeypatch.setattr(faults, "find", lambda *args, **more: Causes(1))
    assert figures(run(files, "--clean", "0"))["full detection"] == (0, 3)


def test_a_search_that_fails_has_found_nothing(files: list[File], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **more: Any) -> Search:
        raise RuntimeError("no")

    monkeypatch.setattr(faults, "search", fails)
    report = run(files, "--clean", "0", "--kinds", "statistics")
    assert figures(report)["statistics detection"][0] == 0
    assert [wrong(r) for r in report.rows] == ["error"] * 3


def test_a_fault_within_the_floor_is_not_counted(files: list[File]) -> None:
    case = Case(Run("numpy", files[0], (1, 5, 9)), (Planted("norm-eps", ("attn_norm",), detail="attn_norm 1.00001e-05"),))
    (found,) = faults.judge(case, ["full"])
    assert not found.visible
    assert wrong(found) == ""


def test_faults_of_the_reference_are_planted_by_name(files: list[File]) -> None:
    run_of_it = Run("reference", files[0], (1, 5, 9, 40))
    planted = next(p for p in fault_cases.plantable(run_of_it) if p.cause == "rope-missing-k")
    (found,) = faults.judge(Case(run_of_it, (planted,)), ["full"])
    assert (found.first, found.convicted_right, found.top1) == ("Kcur-0", True, True)


@pytest.mark.parametrize(
    ("place", "cause", "taps", "layers", "same"),
    [
        ("attn_q", "weight-transposed", ("Qcur_pre",), None, True),
        ("attn_k", "weight-transposed", ("Qcur_pre",), None, False),
        ("attn_q", "weight-reinterpreted", ("Qcur_pre",), None, False),
        ("1", "layer-skipped", ("l_out",), (1,), True),
        ("0", "layer-skipped", ("l_out",), (1,), False),
    ],
)
def test_a_cause_is_right_at_its_place_only(place: str, cause: str, taps: tuple[str, ...], layers: Any, same: bool) -> None:
    name = cause if cause.startswith("layer") else "weight-transposed"
    found = Candidate((Instance(next(f for f in FAULTS if f.name == name), place),), None, 1.0, 1.0, True)
    assert faults.names(found, [Planted(cause, taps, layers)]) == same
    assert not faults.names(found, [Planted(cause, taps, layers), Planted("mask-self", ("kq_soft_max",))])


def test_kinds_of_evidence() -> None:
    generator = torch.Generator().manual_seed(0)
    taps = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    weak = {kind: make(full_trace(Origin("x"), taps)).taps for kind, make in KINDS.items()}
    (printed,), (of_map,) = weak["samples"]["embd"], weak["samples"]["kq_soft_max-0"]
    assert isinstance(printed, Sample)
    assert isinstance(of_map, Sample)
    assert printed.index.reshape(6, 6)[:, 0].tolist() == [row * 16 for row in (0, 1, 2, 4, 5, 6)]
    assert len(of_map.values) == 5 * 6 * 6
    assert (printed.values - taps["embd"].flatten()[printed.index]).abs().max() <= 0.5001e-4
    assert "kq_soft_max-0" not in weak["first-ten"]
    (ten,), (stats,) = weak["first-ten"]["result_output"], weak["statistics"]["embd"]
    assert isinstance(ten, Sample)
    assert isinstance(stats, Stats)
    torch.testing.assert_close(ten.values, taps["result_output"][-1, :10])
    assert set(stats.values) == set(stats.digits) == {"rms", "mean", "min", "max"}


def test_misses_and_targets() -> None:
    report = Report("a machine", {"seed": 0}, [row(), row(detected=True, first_right=True, top1=True, convicted_right=True)])
    assert [rate(report.faulty, figure("full", name)[0]) for name in ("detection", "convicted operation")] == [(1, 2), (1, 2)]
    assert wrong(report.rows[0]) == "missed: detection, first bad tap, convicted operation, cause, top 1"
    assert wrong(report.rows[1]) == ""
    assert "0.500 (1/2) **missed**" in markdown(report)
    assert "| mask-missing | nothing | 1 | full |" in markdown(report)
