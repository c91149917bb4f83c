"""The note of 2025-10-08 as a ledger of its own data: its four conclusions, each with what its tables show and what they leave open.

The note concluded that 4 bits are too few.  Every cause turned out to be in the engine; its tables alone support neither.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from quantscope.diagnose.ledger import Hypothesis
from quantscope.diagnose.table_ledger import ledger_of_tables
from quantscope.findings.traces import study_of
from quantscope.importers.answers import Answer, answers
from quantscope.importers.table import read_table
from quantscope.results import Study

TEXT = (Path(__file__).parents[1] / "data" / "rustorch" / "seed-tables.md").read_text("utf-8")
ANSWERS = answers(TEXT)


def study(text: str = TEXT) -> Study:
    found = study_of([(r.name, r.trace) for r in read_table(text, "x", default="x").runs])
    assert found is not None
    return found


def entry(name: str, of: Study | None = None, answered: tuple[Answer, ...] = ANSWERS) -> Hypothesis:
    return next(h for h in ledger_of_tables(of or study(), answered) if h.id == name)


def said(name: str, of: Study | None = None, answered: tuple[Answer, ...] = ANSWERS) -> str:
    return " ".join(entry(name, of, answered).evidence)


def test_one_thing_is_supported_and_nothing_refuted() -> None:
    found = {h.id: h.status for h in ledger_of_tables(study(), ANSWERS)}
    assert found == {
        "quantization-too-coarse": "untested",
        "architecture-amplifies": "supported",
        "mean-drift": "untested",
        "engine-bug": "untested",
        "tokenizer": "untested",
        "file-damaged": "untested",
        "activation-rounding": "untested",
    }
    assert all(h.evidence and h.command.startswith("quantscope ") for h in ledger_of_tables(study(), ANSWERS))


def test_conclusion_1_different_tokens_say_nothing_about_which_is_right() -> None:
    assert said("quantization-too-coarse") == (
        'RusTorch gives "diplom" (id 13487, rank 6) in Q4_K_M and "ER" (id 1001, rank 1) in Q4_0. That types disagree does not say which '
        "of them is right, or whether one is: there is no original, and no exact execution of the same file. Rank 6 in Q4_K_M is no greedy "
        "choice."
    )
    assert entry("quantization-too-coarse").command == "quantscope study ORIGINAL.gguf --types Q4_K_M,Q4_0"


def test_conclusion_2_the_growth_is_not_the_quantizations_and_no_error() -> None:
    text = said("architecture-amplifies")
    assert "RMS grows 74.9× (Q4_K_M) and 72.1× (Q4_0), at most 4.0% apart" in text
    assert "by itself it is no evidence of an error" in text


def test_conclusion_3_the_drift_is_shown_and_not_its_cause() -> None:
    text = said("mean-drift")
    assert "−0.000174 → −0.0366 (Q4_K_M) and 0.0000890 → 0.0233 (Q4_0): opposite signs at the end" in text
    assert "|mean|/RMS is 3.3% (Q4_K_M) and 2.2% (Q4_0)" in text
    assert "the SwiGLU mean of Q4_0 in layer 21, 8.5% of its RMS, and 1 more." in text
    assert "that quantization is the cause is not" in text


def test_conclusion_4_a_comma_of_llama_cpp_clears_nobody() -> None:
    text = said("engine-bug")
    assert "All statistics come from RusTorch: nothing independent ran the same file on the same token ids." in text
    assert 'llama.cpp gave "," in Q4_0: one token, its id not known, of another run' in text
    assert "does not clear RusTorch" in text
    assert entry("engine-bug").command == "quantscope diagnose FILE.gguf --against TRACE --original ORIGINAL.gguf"


# ---- Other tables -------------------------------------------------------------------------------------------------------


def test_types_that_agree_are_no_proof_either() -> None:
    """Three quantizations agreed on token 24155 in that case, and all were wrong."""
    same = tuple(Answer("RusTorch", v, id=24155) for v in ("Q8_0", "Q6_K", "Q5_K_M"))
    assert "That types agree does not say that they are right" in said("quantization-too-coarse", answered=same)
    assert "One token alone" in said("quantization-too-coarse", answered=same[:1])
    assert "No token of RusTorch is known" in said("quantization-too-coarse", answered=())


def test_growths_that_differ_leave_it_open() -> None:
    """Q6_K grew 112× while its decoder was wrong."""
    apart = study(TEXT.replace("1.054700", "1.639900"))
    assert entry("architecture-amplifies", apart).status == "untested"
    assert "74.9× (Q4_K_M) and 112× (Q4_0), at most 50% apart: something beside the architecture" in said("architecture-amplifies", apart)


def test_one_variant_alone_is_compared_with_nothing() -> None:
    alone = study("# Q4_0 (RusTorch)\n\n| Layer | Output RMS | Mean |\n|-|-|-|\n| 0 | 0.01 | 0.1 |\n| 5 | 0.5 | 0.2 |\n")
    assert {h.status for h in ledger_of_tables(alone, ())} == {"untested"}
    assert "not known for two variants" in said("architecture-amplifies", alone)
    assert "not known for two variants" in said("mean-drift", alone)


def test_other_last_layers_are_not_compared() -> None:
    one, two = study().variants
    shorter = replace(study(), variants=(one, replace(two, layers=two.layers[:-1])))
    assert "RMS of the same first and last layer is not known" in said("architecture-amplifies", shorter)


def test_names_of_files_do_not_become_types_of_a_command() -> None:
    one, two = study().variants
    renamed = replace(study(), variants=(replace(one, name="my run"), replace(two, name="q4_0")))
    assert entry("mean-drift", renamed).command.endswith("--types Q4_0")
