"""llama.cpp's own ids are never blamed, and what its options change is named."""

from __future__ import annotations

import random

import pytest

from quantscope.diagnose.token_ids import ids_verdict
from quantscope.sources.resolve import open_source
from tests.models import STORIES
from tests.oracle.llama_vocab import LlamaVocab
from tests.oracle.quantized_files import demo_file

WORDS = ("Once", " upon", "\n", "  ", "</s>", "<s>", "é", "🦙", " time", "the", ".", "\t", "日本", "<unk>")


@pytest.mark.parametrize("path", [STORIES, demo_file("F16")])
def test_llama_cpp(path: str) -> None:
    rng, source, n = random.Random(5), open_source(path), 0
    with LlamaVocab(path) as llama:  # type: ignore[arg-type]
        for _ in range(60):
            text = "".join(rng.choices(WORDS, k=rng.randrange(1, 8)))
            plain, parsed = (llama.encode(text, True, parse) for parse in (False, True))
            assert ids_verdict(source, text, None, plain).same, text
            assert ids_verdict(source, None, None, parsed).same or parsed[-1] == 2 or parsed[1:2] == [1], (text, parsed)
            bare = ids_verdict(source, text, None, llama.encode(text, False, False))
            assert bare.verified, text
            assert ("bos-missing",) in bare.rules, text
            if parsed != plain:
                special = ids_verdict(source, text, None, parsed)
                assert special.verified, (text, special)
                assert any("special-parsed" in rules or "eos-appended" in rules or "bos-doubled" in rules for rules in special.rules)
                n += 1
    assert n > 10
