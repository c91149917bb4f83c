"""The tables of the debugging note of 2025-10-08 that this tool began with, fed through the functions a study uses.

The note's input, output, mean and SwiGLU columns go in; its derived column, its drifts and its flagged cell must come out as
printed.  Where the note's prose says something else than its own tables, the tests say so.
"""

from __future__ import annotations

import dataclasses

import pytest

from quantscope import metrics
from quantscope.findings import complete
from quantscope.results import Finding, Generated, LayerRow, Study, Variant
from quantscope.wording import times

# layer, input RMS, output RMS, mean, RMS growth as printed, SwiGLU RMS, SwiGLU mean
Q4_K_M = (
    (0, 0.009276, 0.015003, -0.000174, "1.0×", 0.001932, -0.000018),
    (5, 0.101459, 0.154940, -0.001946, "10.3×", 0.018409, -0.000326),
    (10, 0.240584, 0.317698, -0.005547, "21.2×", 0.036568, 0.000115),
    (15, 0.372846, 0.497063, 0.000272, "33.1×", 0.057476, 0.000129),
    (21, 0.745669, 1.124350, -0.036644, "74.9×", 0.165125, -0.001773),
)
Q4_0 = (
    (0, 0.009303, 0.014637, 0.000089, "1.0×", 0.001841, -0.000003),
    (5, 0.113024, 0.145677, -0.000051, "10.0×", 0.015926, -0.000216),
    (10, 0.259480, 0.290877, 0.007852, "19.9×", 0.030457, -0.000059),
    (15, 0.430935, 0.473644, 0.008226, "32.4×", 0.048314, -0.000174),
    (21, 0.890467, 1.054700, 0.023314, "72.1×", 0.181741, 0.015373),
)
Row = tuple[int, float, float, float, str, float, float]


def variant(name: str, rows: tuple[Row, ...], token: Generated) -> Variant:
    layers = tuple(LayerRow(i, a, b, m, swiglu_rms=s, swiglu_mean=sm) for i, a, b, m, _, s, sm in rows)
    return Variant(name, {}, None, None, (token,), layers)


def seed_study() -> Study:
    variants = (
        variant("Q4_K_M", Q4_K_M, Generated("diplom", 13487, None, 6)),
        variant("Q4_0", Q4_0, Generated("ER", 1001, None, 1)),
    )
    return complete(Study(1, None, variants, provenance={"engine": "RusTorch"}))


STUDY = seed_study()


def finding(study: Study, name: str) -> Finding:
    return next(f for f in study.findings if f.id == name)


@pytest.mark.parametrize(("name", "rows"), [("Q4_K_M", Q4_K_M), ("Q4_0", Q4_0)])
def test_rms_growth_as_printed(name: str, rows: tuple[Row, ...]) -> None:
    """1.124350 / 0.015003 = 74.94, 0.317698 / 0.015003 = 21.18 and so on: all ten agree with the note."""
    assert [times(row.rms_growth) for row in STUDY.variant(name).layers] == [row[4] for row in rows]


@pytest.mark.parametrize(("name", "printed", "exact"), [("Q4_K_M", "211×", 210.598), ("Q4_0", "262×", 261.955)])
def test_mean_drift_as_printed(name: str, printed: str, exact: float) -> None:
    drift = metrics.mean_drift([row.mean for row in STUDY.variant(name).layers])
    assert times(drift) == printed
    assert drift == pytest.approx(exact, abs=5e-4)


def test_drift_directions_differ() -> None:
    text = finding(STUDY, "mean-drift").text
    assert "Q4_K_M −0.000174 → −0.0366 (211×, negative direction)" in text
    assert "Q4_0 0.0000890 → 0.0233 (262×, positive direction)" in text
    assert "drift apart: Q4_0 to the positive side, Q4_K_M to the negative" in text


def test_drift_is_said_to_be_a_small_divisor() -> None:
    """The note takes 262× for damage; 72.1× of it is RMS growth, and the first mean is 0.6% of its RMS."""
    assert "Of the 262× in Q4_0, 72.1× is the growth of RMS and 3.6× the change of |mean|/RMS, from 0.61% to 2.2%." in (
        finding(STUDY, "mean-drift").text
    )
    assert "near zero in every variant" in finding(STUDY, "mean-drift").text


def test_swiglu_mean_of_layer_21_is_flagged() -> None:
    flags = {(v.name, row.layer): row.flags for v in STUDY.variants for row in v.layers if row.flags}
    (flag,) = flags["Q4_0", 21]
    assert flag.cell == "swiglu_mean"
    assert flag.mean_to_rms == pytest.approx(0.015373 / 0.181741)
    assert flag.median_of_others == pytest.approx(0.001773 / 0.165125)
    assert times(flag.times) == "7.9×"
    # By the same rule the tiny mean of Q4_K_M in layer 0 stands out as well, less strongly; the note did not mark it.
    assert set(flags) == {("Q4_0", 21), ("Q4_K_M", 0)}
    assert times(flags["Q4_K_M", 0][0].times) == "5.7×"
    assert finding(STUDY, "standing-out").evidence["cells"][0]["layer"] == 21


def test_about_eight_times_is_the_offset_not_the_mean() -> None:
    """The note calls Q4_0's SwiGLU mean "about 8 times" that of Q4_K_M: the means are 8.7 apart, |mean|/RMS is 7.9."""
    assert abs(0.015373 / -0.001773) == pytest.approx(8.67, abs=5e-3)
    assert STUDY.variant("Q4_0").layers[-1].flags[0].times == pytest.approx(7.88, abs=5e-3)


def test_growth_finding_draws_no_conclusion_about_the_missing_original() -> None:
    text = finding(STUDY, "rms-growth").text
    assert "74.9× (Q4_K_M) and 72.1× (Q4_0) from layer 0 to layer 21" in text
    assert "cannot be told without it" in text


def test_the_notes_false_conclusion_is_not_repeated() -> None:
    """The note blamed 4 bits; the causes were bugs of the engine.  Its tables alone support neither, and that is said."""
    assert "nothing here tells whether the quantization, the engine, the file or the prompt" in STUDY.findings[0].text
    limits = finding(STUDY, "limits").text
    assert "All numbers come from RusTorch" in limits
    assert "neither shown nor ruled out" in limits
    assert "rank 6" in finding(STUDY, "generated").text  # a greedy decoder would have taken rank 1


def test_flags_do_not_depend_on_the_order_of_the_variants() -> None:
    swapped = complete(dataclasses.replace(STUDY, variants=STUDY.variants[::-1]))
    for v in STUDY.variants:
        assert swapped.variant(v.name) == v
