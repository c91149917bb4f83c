"""study.json: lossless, without NaN, readable by other versions of this program, and as its schema and its document say."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from quantscope import results
from quantscope.errors import CorruptFileError, UnsupportedVersionError
from quantscope.report.study_json import dump
from quantscope.results import Flag, Histogram, Passage, Study, TopTokens
from tests.unit import studies
from tools.study_schema import PATH, study_schema

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "study-json.md"


def round_trip(study: Study) -> Study:
    return Study.from_json(json.loads(dump(study)))


def broken_study() -> Study:
    """NaN and both infinities in many places."""
    study = studies.study()
    rows = tuple(
        dataclasses.replace(r, output_rms=math.nan, sqnr_db=math.inf, flags=(Flag("swiglu_mean", 0.1, 0.0, math.inf, 1),))
        for r in study.variants[1].layers
    )
    provenance = {"a/b~c": [1.0, -math.inf], "none": None}
    variants = (study.variants[0], dataclasses.replace(study.variants[1], layers=rows), *study.variants[2:])
    return dataclasses.replace(study, variants=variants, provenance=provenance)


def study_with_tokens() -> Study:
    """Tokens after the prompt and a passage, with numbers that JSON does not have."""
    top = TopTokens((5, 9), ("a", "\n<b>"), {"F16": (1.5, -math.inf)}, {"F16": (1.0, 0.0)}, {"F16": (1, 2)})
    pairs = ((("x", 0.5), (" y", 0.25)), (("z", math.nan),))
    shown = Passage(300, (3, 4), ("c", "d"), (0, 0), (7, 8), ("d", None), {"Q4_0": (math.nan, 0.1)}, {"F16": pairs})
    study = studies.study(top=top, passage=shown)
    v = study.variants[1]
    assert v.logits is not None
    counted = dataclasses.replace(v.logits, kl_histogram=Histogram(-10.0, 5, (0, 7, 2), 3, 1))
    return dataclasses.replace(study, variants=(study.variants[0], dataclasses.replace(v, logits=counted), *study.variants[2:]))


class TestRoundTrip:
    def test_lossless(self) -> None:
        study = studies.study()
        again = round_trip(study)
        assert again.variants == study.variants
        assert dataclasses.replace(again, findings=()) == dataclasses.replace(study, findings=())
        assert [f.text for f in again.findings] == [f.text for f in study.findings]
        assert dump(again) == dump(study)

    def test_tokens(self) -> None:
        study = study_with_tokens()
        again = round_trip(study)
        assert again.top == study.top
        assert again.variants == study.variants
        assert again.passage is not None
        assert repr(again.passage) == repr(study.passage)  # NaN is not equal to itself
        assert dump(again) == dump(study)

    def test_not_finite(self) -> None:
        study = broken_study()
        text = dump(study)
        document = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        assert document["non_finite"]["/variants/1/layers/0/output_rms"] == "nan"
        assert document["non_finite"]["/provenance/a~1b~0c/1"] == "-inf"
        assert document["variants"][1]["layers"][0]["sqnr_db"] is None
        again = round_trip(study)
        assert again.variants[1].layers[0].flags[0].times == math.inf
        assert math.isnan(again.variants[1].layers[0].output_rms)
        assert again.provenance == study.provenance
        assert dump(again) == text

    def test_lone_surrogates_survive(self, tmp_path: Path) -> None:
        study = dataclasses.replace(studies.study(), notes=("\udc80 漢字",))
        (tmp_path / "x").write_text(dump(study), "utf-8", "backslashreplace")
        assert Study.from_json(json.loads((tmp_path / "x").read_text("utf-8"))).notes == study.notes


class TestOtherVersions:
    def test_unknown_fields_are_ignored(self) -> None:
        data = json.loads(dump(studies.study()))
        data["later"] = data["variants"][0]["later"] = data["variants"][0]["layers"][0]["later"] = 1
        assert Study.from_json(data).variants == studies.study().variants

    def test_fields_with_a_default_may_be_missing(self) -> None:
        data = json.loads(dump(studies.study()))
        del data["notes"], data["non_finite"], data["variants"][0]["path"], data["top"], data["passage"]
        del data["variants"][1]["logits"]["kl_histogram"]
        study = Study.from_json(data)
        assert (study.variants[0].path, study.top, study.passage) == (None, None, None)
        assert study.variants[1].logits is not None
        assert study.variants[1].logits.kl_histogram is None

    @pytest.mark.parametrize("version", [0, 2, "1", None])
    def test_other_versions_are_refused(self, version: object) -> None:
        with pytest.raises(UnsupportedVersionError, match="expected version 1, found"):
            Study.from_json(json.loads(dump(studies.study())) | {"version": version})

    @pytest.mark.parametrize("data", [[], {"version": 1}, {"version": 1, "original": None, "variants": [3]}])
    def test_other_content_is_refused(self, data: Any) -> None:
        with pytest.raises((CorruptFileError, UnsupportedVersionError), match=r"study\.json: expected"):
            Study.from_json(data)


def violations(data: Any) -> list[str]:
    """What jsonschema finds wrong with a document, by place."""
    validator = Draft202012Validator(study_schema())
    return sorted(f"/{'/'.join(map(str, e.absolute_path))}: {e.message}" for e in validator.iter_errors(data))


class TestLines:
    def test_short_lists_stand_on_a_line_and_keep_their_content(self) -> None:
        tokens = ['"', "\\", '",\n  1', "[", "]\n", "1,\n 2", "\ud800", ""]
        top = {"F16": [[[piece, 0.5 + i] for i, piece in enumerate(tokens)]]}
        kl = {"Q4_0": [1e-300, math.inf, -0.5]}
        passage = results.Passage(9, (1, 2), tuple(tokens), (0, 0), (5, 6), (), kl, top)
        study = dataclasses.replace(studies.study(), passage=passage)
        text = dump(study)
        assert json.loads(text) == json.loads(json.dumps(study.to_json()))
        assert "[1e-300, null, -0.5]" in text
        assert '["[", 3.5]' in text


class TestSchema:
    def test_the_shipped_schema_fits_the_dataclasses(self) -> None:
        assert json.loads(PATH.read_text("utf-8")) == study_schema(), "run `python -m tools.study_schema`"

    @pytest.mark.parametrize(
        "study",
        [
            studies.study(),
            studies.long_study(),
            study_with_tokens(),
            broken_study(),
            studies.study(original=None, text=None, prompt=None, model=None),
        ],
    )
    def test_studies_fit_the_schema(self, study: Study) -> None:
        assert violations(json.loads(dump(study))) == []

    def test_the_check_finds_violations(self) -> None:
        data = json.loads(dump(studies.study()))
        data["variants"][1]["layers"][2]["nmse"] = "0.1"
        del data["variants"][0]["bpw"]
        found = violations(data)
        assert len(found) == 2
        assert found[1].startswith("/variants/1/layers/2/nmse: '0.1'")

        data = json.loads(dump(study_with_tokens()))
        data["passage"]["top"]["F16"][0][0].append(1)
        assert len(violations(data)) == 1

    def test_it_is_a_schema(self) -> None:
        Draft202012Validator.check_schema(study_schema())

    def test_every_field_is_documented(self) -> None:
        text = DOCUMENT.read_text("utf-8")
        kinds = [k for k in vars(results).values() if dataclasses.is_dataclass(k) and k is not results.StudyOptions]
        assert len(kinds) == 22
        missing = [f"{k.__name__}.{f.name}" for k in kinds for f in dataclasses.fields(k) if f"`{f.name}`" not in text]
        assert missing == []

    def test_every_finding_is_documented(self) -> None:
        text = DOCUMENT.read_text("utf-8")
        assert all(f"| `{f.id}` |" in text for f in studies.study().findings)
