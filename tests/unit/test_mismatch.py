"""Another study in the folder: what differs is said in words, and nothing is changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quantscope.errors import StudyMismatchError
from tests.unit.stores import IDENTITY, is_prefix, refused, reopened


class TestIdentity:
    def test_the_same_in_another_order_and_with_lists(self, finished: Path) -> None:
        turned = {key: IDENTITY[key] for key in reversed(IDENTITY)} | {"options": IDENTITY["options"] | {"--types": ["Q4_0", "Q8_0"]}}
        with reopened(finished, turned) as opened:
            assert is_prefix(opened) == 3

    @pytest.mark.parametrize(
        ("section", "changed", "said"),
        [
            ("format", 2, "format of the records: 1 → 2."),
            ("quantscope", "0.2.0", "version of quantscope: 0.1.0 → 0.2.0."),
            ("models", {"m.gguf": "c" * 64}, "the content of m.gguf has changed (SHA-256 aaaaaaaaaaaa… → cccccccccccc…)."),
            ("models", {"m.gguf": "a" * 64, "n.gguf": "d" * 64}, "models n.gguf: absent → SHA-256 dddddddddddd…."),
            ("models", {}, "models: absent → {}; models m.gguf: SHA-256 aaaaaaaaaaaa… → absent."),
            ("options", {"--types": ["Q4_0"]}, "--types: Q4_0,Q8_0 → Q4_0."),
            ("options", {"--types": []}, "--types: Q4_0,Q8_0 → empty."),
            ("options", {"--prompt": "none"}, "--prompt: none → none."),
            ("options", {"--prompt": "a\nb"}, '--prompt: none → "a\\nb".'),
            ("options", {"--text": "e" * 64}, "the content of --text has changed (SHA-256 bbbbbbbbbbbb… → eeeeeeeeeeee…)."),
            ("options", {"--text": None}, "--text: SHA-256 bbbbbbbbbbbb… → none."),
            ("options", {"--ctx": 256}, "--ctx: 512 → 256."),
            ("options", {"--ctx": 512.0}, "--ctx: 512 → 512.0."),
            ("options", {"--later": True}, "--later: absent → true."),
            ("plan", {"text": [6, 2, 2]}, "plan of text (--memory): 3,4,2 → 6,2,2."),
            ("arithmetic", {"threads": 8}, "arithmetic threads: 2 → 8."),
            ("text", "f" * 64, "the text: absent → SHA-256 ffffffffffff…."),
        ],
    )
    def test_what_differs_is_said(self, section: str, changed: Any, said: str, finished: Path) -> None:
        before = (finished / "study.db").read_bytes()
        whole = section in ("models", "plan") or not isinstance(changed, dict)
        now = IDENTITY | {section: changed if whole else IDENTITY[section] | changed}
        refused(StudyMismatchError, f"There → given now: {said} Nothing was changed", "--out DIR", do=lambda: reopened(finished, now))
        assert (finished / "study.db").read_bytes() == before
        with reopened(finished) as opened:
            assert is_prefix(opened) == 3

    def test_six_of_many(self, folder: Path) -> None:
        reopened(folder, {"options": {f"--o{i}": 0 for i in range(9)}}).close()
        now = {"options": {f"--o{i}": 1 for i in range(9)}}
        text = refused(StudyMismatchError, "--o5: 0 → 1; and 3 more. Nothing", do=lambda: reopened(folder, now))
        assert "--o6" not in text

    def test_long_values_are_cut_to_where_they_part(self, folder: Path) -> None:
        reopened(folder, {"options": {"--prompt": "x" * 500 + "here" + "y" * 500}}).close()
        now = {"options": {"--prompt": "x" * 500 + "there" + "y" * 500}}
        text = refused(StudyMismatchError, "…xxxxxxxxxxxxhereyyy", "→ …xxxxxxxxxxxxthereyyy", do=lambda: reopened(folder, now))
        assert len(text) < 600
