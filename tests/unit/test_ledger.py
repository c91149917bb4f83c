"""The ledger: what supports, what refutes, and above all what leaves a hypothesis untested."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import product

import pytest

from quantscope.diagnose.activation_rounding import ActivationRounding, Channel
from quantscope.diagnose.attribution import LogitSplit
from quantscope.diagnose.ledger import TEXTS, Divergence, Facts, Hypothesis, ledger, split_facts

NOTHING = Facts()
# the same file on the same ids, everything measured, everything within expected arithmetic
CLEAN = Facts(
    model="m.gguf",
    engine="llama.cpp",
    original="f16.gguf",
    same_file=True,
    same_ids=True,
    same_tokenization=True,
    kl_quantization=0.030,
    kl_expected=0.031,
    kl_engine=0.0312,
    kl_own_expected=0.0004,
    kl_own_engine=0.0005,
    token_original=5,
    token_quantized=5,
    token_expected=5,
    token_engine=5,
    growth_original=72.1,
    growth_quantized=74.9,
    compared_taps=163,
    convicted=(),
    other_tensors=(),
)
ROUNDING = ActivationRounding(5, 7, 0.8, -0.3, ("ffn_norm-3",), 0.02, ("ffn_norm-3",), (Channel("ffn_norm-3", 100, 256, 18.0, 0.93),), 12)


def entry(facts: Facts, name: str) -> Hypothesis:
    return next(h for h in ledger(facts) if h.id == name)


def statuses(facts: Facts) -> dict[str, str]:
    return {h.id: h.status for h in ledger(facts)}


def said(facts: Facts, name: str) -> str:
    return " ".join(entry(facts, name).evidence)


def test_without_facts_everything_is_untested_and_every_entry_says_why_and_how() -> None:
    entries = ledger(NOTHING)
    assert [h.id for h in entries] == list(TEXTS)
    for h in entries:
        assert h.status == "untested"
        assert h.evidence
        assert all(e.endswith(".") for e in h.evidence)
        assert h.command.startswith("quantscope ")


def test_all_measured_and_clean() -> None:
    assert statuses(CLEAN) == dict.fromkeys(TEXTS, "refuted") | {"architecture-amplifies": "supported"}


def test_nothing_found_is_not_called_the_absence_of_a_bug() -> None:
    text = said(replace(CLEAN, excluded=("gate-up-swapped", "rope-layout"), untestable=("cache-stale",)), "engine-bug")
    assert text == (
        "Nothing found beyond expected arithmetic (local replay, 163 taps and KL 0.000500 nats with 0.000400 expected); excluded: "
        "gate-up-swapped, rope-layout; not testable with this evidence: cache-stale."
    )
    for h in ledger(CLEAN):
        assert "no bug" not in " ".join((*h.evidence, h.text)).lower()
    assert "not testable with this evidence: what other prompts" in said(CLEAN, "engine-bug")


# ---- Engine -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"same_file": None}, "nothing shows that both ran the same file"),
        ({"same_file": False}, "it ran another file"),
        ({"same_ids": None}, "nothing shows that both ran the same token ids"),
        ({"same_ids": False}, "it ran other token ids"),
    ],
)
def test_an_engine_is_not_judged_across_files_or_ids(change: dict[str, bool | None], why: str) -> None:
    """However bad its numbers look."""
    bad = replace(CLEAN, kl_own_engine=9.0, convicted=("ffn_out-3",), first_divergence=Divergence("embd", 1.0, 1e-9), **change)  # type: ignore[arg-type]
    assert entry(bad, "engine-bug").status == "untested"
    assert why in said(bad, "engine-bug")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"convicted": ("ffn_out-3", "l_out-4")},
            "Recomputed from the engine's own inputs, 2 operations wrong by themselves: ffn_out-3, l_out-4.",
        ),
        ({"first_divergence": Divergence("Qcur-0", 0.05, 2e-4)}, "The first tap beyond its floor is Qcur-0: NMSE 5.00e−2, floor 2.00e−4."),
        ({"kl_own_engine": 0.36}, "raises KL to 0.000400 nats, the engine measures 0.360: more than 4 times, unexplained, implementation."),
        ({"kl_own_engine": None, "kl_own_expected": None, "kl_engine": 0.41}, "From the original the engine's expected arithmetic"),
    ],
)
def test_each_kind_of_evidence_supports_a_bug_alone(change: dict[str, object], sentence: str) -> None:
    facts = replace(CLEAN, **change)  # type: ignore[arg-type]
    assert entry(facts, "engine-bug").status == "supported"
    assert sentence in said(facts, "engine-bug")


def test_the_divergence_from_its_own_file_decides_where_it_is_known() -> None:
    """Beside a coarse quantization the engine's fault hardly shows in the divergence from the original."""
    hidden = replace(CLEAN, kl_quantization=0.5, kl_expected=0.5, kl_engine=0.52, kl_own_engine=0.05)
    assert entry(hidden, "engine-bug").status == "supported"
    assert entry(replace(hidden, kl_own_engine=None, kl_own_expected=None), "engine-bug").status == "refuted"


def test_without_anything_compared_the_engine_is_untested() -> None:
    facts = Facts(same_file=True, same_ids=True)
    assert entry(facts, "engine-bug").status == "untested"
    assert "neither taps nor logits" in said(facts, "engine-bug")


# ---- Quantization -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kl", "tokens", "status"),
    [
        (None, (None, 5), "untested"),
        (0.03, (None, None), "refuted"),
        (0.03, (5, 5), "refuted"),
        (0.03, (5, 6), "supported"),
        (0.10, (5, 5), "refuted"),
        (0.11, (5, 5), "supported"),
        (None, (5, 6), "supported"),
        (float("nan"), (5, 5), "supported"),
    ],
)
def test_quantization_is_tested_by_the_exact_execution_of_the_file(
    kl: float | None, tokens: tuple[int | None, int | None], status: str
) -> None:
    facts = Facts(kl_quantization=kl, token_original=tokens[0], token_quantized=tokens[1], token_engine=9)
    assert entry(facts, "quantization-too-coarse").status == status


def test_what_quantization_does_not_explain_is_said() -> None:
    facts = replace(CLEAN, kl_engine=0.41, token_engine=9)
    assert said(facts, "quantization-too-coarse") == (
        "Quantization alone raises KL from 0 to 0.0300 nats (0.100 counts as coarse); with the engine it is 0.410, which quantization does "
        "not explain. Computed exactly, the quantized file keeps the original's token 5; the engine gives 9."
    )
    assert "does not explain" not in said(replace(facts, kl_engine=0.12), "quantization-too-coarse")


# ---- Architecture -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("growths", "status"),
    [
        ((None, None, None), "untested"),
        ((72.1, None, None), "untested"),
        ((72.1, float("inf"), None), "untested"),
        ((72.1, 74.9, None), "supported"),
        ((72.1, 112.0, None), "refuted"),
        ((72.1, 74.9, 112.0), "refuted"),
        ((None, 74.9, 72.1), "supported"),
    ],
)
def test_growth_is_the_models_nature_where_float32_grows_the_same(growths: tuple[float | None, ...], status: str) -> None:
    original, quantized, engine = growths
    assert (
        entry(Facts(growth_original=original, growth_quantized=quantized, growth_engine=engine), "architecture-amplifies").status == status
    )


def test_the_sentence_on_growth() -> None:
    assert said(CLEAN, "architecture-amplifies") == (
        "RMS grows 72.1× in the original in float32, 74.9× in the quantized file computed exactly: the same growth without quantization is "
        "the model's nature, no evidence of an error."
    )


# ---- Tokenizer, file, activation rounding -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("same_ids", "own", "status", "sentence"),
    [
        (None, None, "untested", "not known"),
        (True, None, "untested", "given its token ids, so its own tokenizer was not used"),
        (True, True, "refuted", "same token ids of the same text"),
        (False, None, "supported", "The token ids differ, first at position 1: id 15043 expected, no token in the engine."),
        (True, False, "supported", "The token ids differ, first at position 1"),
    ],
)
def test_tokenizer(same_ids: bool | None, own: bool | None, status: str, sentence: str) -> None:
    facts = Facts(same_ids=same_ids, same_tokenization=own, first_other_id=(1, 15043, None))
    assert entry(facts, "tokenizer").status == status
    assert sentence in said(facts, "tokenizer")


def test_a_shared_file_does_not_clear_the_file() -> None:
    facts = Facts(same_file=True)
    assert entry(facts, "file-damaged").status == "untested"
    assert "would damage both alike" in said(facts, "file-damaged")


def test_tensors_that_differ_name_themselves() -> None:
    facts = replace(CLEAN, other_tensors=tuple(f"blk.{i}.ffn_down.weight" for i in range(8)))
    assert entry(facts, "file-damaged").status == "supported"
    assert "8 tensors differ from the original's beyond their types: blk.0.ffn_down.weight" in said(facts, "file-damaged")
    assert said(facts, "file-damaged").endswith("and 2 more.")
    assert entry(facts, "file-damaged").command == "quantscope weights f16.gguf m.gguf"


@pytest.mark.parametrize(
    ("expected", "engine", "rounding", "status"),
    [
        (None, 7, None, "untested"),
        (5, 5, None, "refuted"),
        (7, None, None, "untested"),
        (7, 8, ROUNDING, "refuted"),
        (7, 5, ROUNDING, "refuted"),
        (7, 7, None, "untested"),
        (7, 7, ROUNDING, "supported"),
        (7, 7, replace(ROUNDING, rounded_token=8), "untested"),
        (7, 7, replace(ROUNDING, places=()), "refuted"),
    ],
)
def test_activation_rounding_needs_both_proofs(
    expected: int | None, engine: int | None, rounding: ActivationRounding | None, status: str
) -> None:
    facts = replace(CLEAN, token_expected=expected, token_engine=engine, rounding=rounding)
    assert entry(facts, "activation-rounding").status == status


def test_the_proof_of_activation_rounding() -> None:
    assert said(replace(CLEAN, token_expected=7, token_engine=7, rounding=ROUNDING), "activation-rounding") == (
        "The expected arithmetic changes the token from 5 to 7 as in the engine; exact activations at ffn_norm-3 restore 5. Channel 100 of "
        "ffn_norm-3 makes 93% of the rounding error there."
    )


# ---- As a whole ---------------------------------------------------------------------------------------------------------


def test_several_hold_at_once() -> None:
    """Coarse quantization, a broken engine, a wrong tokenizer and a damaged file: one does not hide another."""
    facts = replace(
        CLEAN,
        kl_quantization=0.6,
        same_tokenization=False,
        other_tensors=("output.weight",),
        convicted=("kqv_out-0",),
        growth_quantized=140.0,
    )
    expected = dict.fromkeys(("quantization-too-coarse", "engine-bug", "tokenizer", "file-damaged"), "supported")
    assert statuses(facts) == expected | {"architecture-amplifies": "refuted", "activation-rounding": "refuted"}


def test_any_subset_of_the_facts_gives_every_entry_and_a_missing_fact_never_convicts() -> None:
    groups = (
        ("same_file", "same_ids", "same_tokenization"),
        ("kl_quantization", "kl_expected", "kl_engine"),
        ("kl_own_expected", "kl_own_engine"),
        ("token_original", "token_quantized", "token_expected", "token_engine"),
        ("growth_original", "growth_quantized"),
        ("compared_taps", "convicted", "other_tensors"),
    )
    assert {name for group in groups for name in group} <= {f.name for f in fields(Facts)}
    for kept in product((True, False), repeat=len(groups)):
        missing = {name: None for keep, group in zip(kept, groups, strict=True) if not keep for name in group}
        found = statuses(replace(CLEAN, **missing))  # type: ignore[arg-type]
        assert list(found) == list(TEXTS)
        assert {name for name, status in found.items() if status == "supported"} <= {"architecture-amplifies"}


def test_a_split_of_the_logits_gives_its_facts() -> None:
    split = LogitSplit(40, 0.030, 0.031, 0.41, 0.0004, 0.36, (5, 5, 5, 9), 2, 1, 30)
    facts = Facts(same_file=True, same_ids=True, **split_facts(split))  # type: ignore[arg-type]
    assert statuses(facts)["engine-bug"] == "supported"
    assert statuses(facts)["quantization-too-coarse"] == "refuted"
    alone = replace(split, quantization=None, tokens=(None, 5, 5, 9), changed_by_quantization=None)
    assert statuses(Facts(same_file=True, same_ids=True, **split_facts(alone)))["quantization-too-coarse"] == "untested"  # type: ignore[arg-type]


def test_names_of_files_are_quoted_for_the_shell() -> None:
    assert entry(replace(CLEAN, model="my model.gguf"), "engine-bug").command == (
        "quantscope diagnose 'my model.gguf' --against llama.cpp --original f16.gguf"
    )
