"""Each rule says what the numbers carry, and nothing when they carry nothing."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import pytest

from quantscope.findings import complete, findings
from quantscope.results import Generated, LayerRow, NumericalFloor, Paired, Study, Variant
from tests.unit import studies


def text_of(study: Study, name: str) -> str:
    return next((f.text for f in study.findings if f.id == name), "")


def evidence_of(study: Study, name: str) -> dict[str, Any]:
    return next(f.evidence for f in study.findings if f.id == name)


def changed(study: Study, name: str, **fields: object) -> Study:
    """The study with some fields of one variant replaced, and its findings made anew."""
    variants = tuple(dataclasses.replace(v, **fields) if v.name == name else v for v in study.variants)  # type: ignore[arg-type]
    return complete(dataclasses.replace(study, variants=variants))


def token(text: str, i: int, **fields: Any) -> tuple[Generated, ...]:
    return (Generated(text, i, 1.0, **{"rank": 1, **fields}),)


class TestShape:
    def test_the_answer_comes_first_and_ids_are_unique(self) -> None:
        ids = [f.id for f in studies.study().findings]
        assert ids[0] == "answer"
        assert len(set(ids)) == len(ids)

    def test_every_finding_has_numbers_and_ends_like_a_sentence(self) -> None:
        for f in studies.study().findings:
            assert f.evidence, f.id
            assert f.text.endswith("."), f.text
            assert "  " not in f.text
            assert not re.search(r"\.\.(?!\.)|None|nan|\{", f.text), f.text

    def test_the_answer_is_one_sentence(self) -> None:
        assert len(re.findall(r"\.(\s|$)", studies.study().findings[0].text)) == 1

    def test_repeating_changes_nothing(self) -> None:
        study = studies.study()
        assert complete(study) == study

    def test_an_empty_study_yields_only_its_limits(self) -> None:
        bare = Study(1, None, (Variant("a", {}, None, None),))
        assert [f.id for f in findings(bare)] == ["limits"]


class TestTokens:
    def test_some_keep_it(self) -> None:
        text = studies.study().findings[0].text
        assert "Q8_0, Q6_K, Q5_K_M and Q4_K_M keep the original's next token" in text
        assert 'Q4_0 (" big\\n") changes it' in text
        assert "the smallest that keeps it is Q4_K_M (4.85 MB" in text

    def test_all_keep_it(self) -> None:
        study = changed(studies.study(), "Q4_0", generated=token(" little", 396))
        assert "All 5 variants keep" in study.findings[0].text
        assert "down to the smallest, Q4_0" in study.findings[0].text

    def test_none_keeps_it(self) -> None:
        base = studies.study()
        variants = (base.variants[0], *(dataclasses.replace(v, generated=token("x", 7)) for v in base.quantized))
        study = complete(dataclasses.replace(base, variants=variants))
        assert study.findings[0].text.startswith("No variant keeps the original's next token")
        assert text_of(study, "smallest-top-token") == ""
        assert "share an error" in text_of(study, "agreement")

    def test_a_larger_one_loses_it(self) -> None:
        text = text_of(changed(studies.study(), "Q6_K", generated=token(" big", 512)), "smallest-top-token")
        assert "is Q4_K_M" in text
        assert "Q6_K loses it although larger" in text

    def test_rank_in_the_original_is_told(self) -> None:
        assert "which the original ranks 3" in text_of(studies.study(), "generated")

    def test_length_of_equal_continuations(self) -> None:
        base = studies.study()
        longer = {"F16": (396, 5, 6, 7), "Q8_0": (396, 5, 6, 7), "Q4_0": (396, 5, 9, 7), "Q6_K": (1, 2, 3, 4)}
        variants = tuple(
            dataclasses.replace(v, generated=tuple(Generated(str(i), i, 1.0, 1) for i in longer[v.name]) if v.name in longer else ())
            for v in base.variants
        )
        text = text_of(complete(dataclasses.replace(base, variants=variants)), "generated")
        assert "original's 4 greedy tokens the continuation stays the same in Q8_0 for all of them, Q6_K for 0 and Q4_0 for 2" in text

    def test_agreement_proves_decoding_only(self) -> None:
        assert "does not show that an engine is right" in text_of(studies.study(), "agreement")

    def test_without_an_original_run_by_the_reference(self) -> None:
        base = studies.study()
        study = complete(dataclasses.replace(base, original=None, variants=base.variants[3:]))
        assert "nothing here tells what the unquantized weights would generate" in study.findings[0].text
        assert "No variant is the original" in text_of(study, "limits")
        assert "same reference with exact arithmetic" in text_of(study, "limits")


class TestSameWeights:
    def test_presets_that_fall_back_to_the_same_types(self) -> None:
        base = studies.study()
        types = {v.name: {"output.weight": v.name} for v in base.variants} | {"Q6_K": {"output.weight": "Q8_0"}}
        study = complete(dataclasses.replace(base, variants=tuple(dataclasses.replace(v, types=types[v.name]) for v in base.variants)))
        assert text_of(study, "same-weights").startswith("Q8_0 and Q6_K give every tensor the same type here")
        assert evidence_of(study, "same-weights") == {"groups": [["Q8_0", "Q6_K"]]}

    def test_equal_numbers_are_not_ordered(self) -> None:
        text = text_of(changed(studies.study(), "Q6_K", logits=studies.study().variant("Q8_0").logits), "kl-order")
        assert "Q8_0 0.000400 = Q6_K 0.000400 < Q5_K_M" in text
        assert "not settled" not in text


class TestGrowth:
    def test_in_the_original_too_is_architecture(self) -> None:
        text = text_of(studies.study(), "rms-growth")
        assert "38.4× from layer 0 to layer 9 in the original and 38.4× in the other variants" in text
        assert "belongs to the architecture, it is not quantization damage" in text

    def test_a_deviating_variant_is_named(self) -> None:
        text = text_of(changed(studies.study(), "Q4_0", layers=studies.rows(10, growth=1.6)), "rms-growth")
        assert "38.4× to 68.7×" in text
        assert "Q4_0 by +79% away from the original: the growth itself belongs to the architecture, this deviation does not" in text

    def test_little_growth(self) -> None:
        base = studies.study()
        variants = tuple(dataclasses.replace(v, layers=studies.rows(10, growth=1.01)) for v in base.variants)
        assert "1.1×" in (text := text_of(complete(dataclasses.replace(base, variants=variants)), "rms-growth"))
        assert "which is little" in text
        assert "architecture" not in text


class TestDrift:
    def test_like_the_original(self) -> None:
        text = text_of(studies.study(), "mean-drift")
        assert "F16 0.00100 → 0.0384 (38.4×, positive direction); Q8_0, Q6_K, Q5_K_M, Q4_K_M and Q4_0 likewise (38.4×)" in text
        assert "All end on the original's side of zero" in text

    def test_other_side_of_zero(self) -> None:
        study = changed(studies.study(), "Q4_0", layers=studies.rows(10, offset=-0.1))
        text = text_of(study, "mean-drift")
        assert "Q4_0 ends on the other side of zero than the original" in text
        assert "off by at most 2.6% of its RMS (Q4_0)" in text
        assert evidence_of(study, "mean-drift")["Q4_0"]["last"] == pytest.approx(0.01 * 0.1 * 1.5**9 - 0.1)

    def test_sign_change_is_told(self) -> None:
        rows = (LayerRow(0, 1.0, 1.0, 0.5), LayerRow(1, 1.0, 2.0, -0.25))
        study = complete(Study(1, None, (Variant("a", {}, None, None, layers=rows),)))
        assert "(−0.5×, it changes its sign)" in text_of(study, "mean-drift")
        assert "near zero" not in text_of(study, "mean-drift")

    def test_towards_zero(self) -> None:
        rows = (LayerRow(0, 1.0, 1.0, -0.5), LayerRow(1, 1.0, 2.0, -0.25))
        study = complete(Study(1, None, (Variant("a", {}, None, None, layers=rows),)))
        assert "a −0.500 → −0.250 (0.5×, towards zero)" in text_of(study, "mean-drift")

    def test_from_exactly_zero(self) -> None:
        rows = (LayerRow(0, 1.0, 1.0, 0.0), LayerRow(1, 1.0, 2.0, -0.25))
        study = complete(Study(1, None, (Variant("a", {}, None, None, layers=rows),)))
        assert "from exactly zero, so it has no multiple" in text_of(study, "mean-drift")

    def test_the_multiple_splits_exactly(self) -> None:
        for numbers in evidence_of(studies.study(), "mean-drift").values():
            split = numbers["rms_growth"] * numbers["last_mean_to_rms"] / numbers["first_mean_to_rms"]
            assert abs(numbers["drift"]) == pytest.approx(split)


class TestFlags:
    def lifted(self, times: float) -> Study:
        """Layer 4 of Q4_0 with ``times`` the SwiGLU mean of the other variants."""
        rows = list(studies.rows(10))
        assert rows[4].swiglu_mean is not None
        rows[4] = dataclasses.replace(rows[4], swiglu_mean=-rows[4].swiglu_mean * times)
        return changed(studies.study(), "Q4_0", layers=tuple(rows))

    def test_over_four_times_the_median(self) -> None:
        study = self.lifted(5)
        assert [(v.name, r.layer) for v in study.variants for r in v.layers if r.flags] == [("Q4_0", 4)]
        (flag,) = study.variant("Q4_0").layers[4].flags
        assert (flag.times, flag.n_others, flag.median_of_others) == (pytest.approx(5), 5, pytest.approx(0.008))
        assert "Q4_0 layer 4" in text_of(study, "standing-out")
        assert "which of the two" not in text_of(study, "standing-out")

    def test_not_at_under_four_times(self) -> None:
        study = self.lifted(3.9)
        assert not any(row.flags for v in study.variants for row in v.layers)
        assert text_of(study, "standing-out").startswith("No SwiGLU mean stands out")

    def test_many_flags_are_counted_not_listed(self) -> None:
        study = changed(studies.study(), "Q4_0", layers=tuple(dataclasses.replace(r, swiglu_mean=r.output_rms) for r in studies.rows(10)))
        text = text_of(study, "standing-out")
        assert text.startswith("10 SwiGLU means stand out")
        assert "and 5 more." in text
        assert len(evidence_of(study, "standing-out")["cells"]) == 10


class TestErrorGrowth:
    def test_the_knee_is_found_and_its_rates_are_told(self) -> None:
        rows = tuple(dataclasses.replace(r, sqnr_db=40 - 0.5 * r.layer - 2.0 * max(0, r.layer - 5), nmse=None) for r in studies.rows(10))
        study = changed(studies.study(), "Q4_0", layers=rows)
        assert "Q4_0: from layer 6 on it grows by +2.50 dB a layer, before by +0.50." in text_of(study, "error-growth")
        assert evidence_of(study, "error-growth")["Q4_0"]["knee"]["layer"] == 6

    def test_none(self) -> None:
        assert "In no variant is there a layer from which it grows clearly faster" in text_of(studies.study(), "error-growth")

    def test_too_few_layers(self) -> None:
        assert "5 layers are too few" in text_of(studies.study(5), "error-growth")

    def test_identical_layers_are_left_out(self) -> None:
        rows = tuple(dataclasses.replace(r, sqnr_db=math.inf, nmse=0.0) for r in studies.rows(10))
        assert "Q8_0" not in text_of(changed(studies.study(), "Q8_0", layers=rows), "error-growth")


class TestLogits:
    def test_order_by_kl(self) -> None:
        text = text_of(studies.study(), "kl-order")
        assert "Q8_0 0.000400 < Q6_K 0.00180 < Q5_K_M 0.00710 < Q4_K_M 0.0310 < Q4_0 0.0720 nats" in text
        assert "also the order of the sizes" in text

    def test_smaller_and_closer_is_told(self) -> None:
        text = text_of(changed(studies.study(), "Q4_K_M", file_bytes=6_000_000), "kl-order")
        assert "Q5_K_M is smaller and yet closer than Q4_K_M" in text

    def test_pairs_are_told_apart_by_their_interval(self) -> None:
        text = text_of(studies.long_study(), "paired")
        assert text.startswith(
            "On the same positions (95 % intervals of the mean difference of KL [nats], over 5 chunks): Q8_0 is better than Q6_K by 0.00140"
        )
        assert "not told apart" not in text
        assert list(evidence_of(studies.long_study(), "paired")) == ["Q8_0 < Q6_K", "Q6_K < Q5_K_M", "Q5_K_M < Q4_K_M", "Q4_K_M < Q4_0"]

    def test_pairs_that_are_not_told_apart(self) -> None:
        study = studies.long_study()
        open_pair = Paired("Q6_K", "Q8_0", 0.0014, -0.0002, 0.003, "chunk", 5, None)
        others = tuple(p for p in study.paired if {p.a, p.b} != {"Q6_K", "Q8_0"})
        text = text_of(complete(dataclasses.replace(study, paired=(*others, open_pair))), "paired")
        assert "; not told apart: Q8_0 and Q6_K (−0.000200 to 0.00300), whose order may be chance" in text
        only = complete(dataclasses.replace(study, paired=(open_pair,)))
        assert "over 5 chunks): not told apart: Q8_0 and Q6_K" in text_of(only, "paired")

    def test_the_numerical_floor(self) -> None:
        text = text_of(studies.long_study(), "numerical-floor")
        assert text == (
            "Float32 rounding alone makes a KL divergence of 3.0e−13 nats: the smallest one measured, Q8_0 0.000400, is 1.3e9 times "
            "as large."
        )
        high = dataclasses.replace(studies.long_study(), floor=NumericalFloor(1e-4, 2e-4, 64))
        assert "; Q8_0 is within 10 times that: no difference is shown there." in text_of(complete(high), "numerical-floor")

    def test_few_positions_are_told(self) -> None:
        base = studies.study()
        variants = tuple(dataclasses.replace(v, logits=v.logits and dataclasses.replace(v.logits, n_positions=5)) for v in base.variants)
        study = complete(dataclasses.replace(base, variants=variants))
        assert "5 positions are few" in text_of(study, "kl-order")

    def test_the_same_top_token_everywhere(self) -> None:
        base = studies.study()
        variants = tuple(dataclasses.replace(v, logits=v.logits and dataclasses.replace(v.logits, top1_agree=1.0)) for v in base.variants)
        text = text_of(complete(dataclasses.replace(base, variants=variants)), "kl-order")
        assert "The top token is the original's at every position in every variant." in text

    def test_perplexity(self) -> None:
        text = text_of(studies.study(), "perplexity")
        assert text.startswith("Perplexity is 12.500 in F16; Q8_0 12.505 (+0.04% ± 0.01%)")
        assert "happens to help" not in text

    def test_better_than_the_original_is_not_called_better(self) -> None:
        stats = studies.study().variant("Q6_K").logits
        assert stats is not None
        lucky = dataclasses.replace(stats, ppl=12.2, ln_ppl_ratio=-0.02, ln_ppl_ratio_se=0.005)
        assert "Q6_K below the original" in text_of(changed(studies.study(), "Q6_K", logits=lucky), "perplexity")


class TestOperations:
    def test_the_weakest(self) -> None:
        text = text_of(studies.long_study(), "weakest-operation")
        assert "Q8_0 ffn_out of layer 1 (43.0 dB)" in text
        assert evidence_of(studies.long_study(), "weakest-operation")["Q4_0"]["layer"] == 1

    def test_massive_activations_belong_to_the_model(self) -> None:
        text = text_of(studies.long_study(), "massive-activations")
        assert "in layer 2, the largest 812.5 at token 0 of a chunk, channel 17: they belong to the model." in text
        assert text.endswith("It has 5 of them in the residual stream; another number in Q4_0 4.")

    def test_nothing_without_a_text(self) -> None:
        study = complete(dataclasses.replace(studies.long_study(), text=None))
        assert {f.id for f in study.findings} & {"weakest-operation", "massive-activations", "paired"} == set()


class TestBrokenNumbers:
    def test_nan_is_named_with_its_first_layer(self) -> None:
        rows = tuple(dataclasses.replace(r, output_rms=math.nan, mean=math.nan) if r.layer > 3 else r for r in studies.rows(10))
        study = changed(studies.study(), "Q4_0", layers=rows)
        assert "NaN or infinity in Q4_0 (first in layer 4)" in text_of(study, "non-finite")
        assert study.findings[1].id == "non-finite"
        assert text_of(study, "rms-growth") == ""

    def test_nan_in_the_logits_alone(self) -> None:
        study = changed(studies.study(), "Q4_0", generated=token("x", 1, prob=math.nan), logits=None)
        assert text_of(study, "non-finite") == ""
        bad = (Generated("x", 1, math.nan, 1),)
        assert "first in the logits" in text_of(changed(study, "Q4_0", generated=bad), "non-finite")
