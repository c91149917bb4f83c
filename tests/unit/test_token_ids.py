"""The tokenizer verdict: each mistake, made by hand from a vocabulary of known pieces, is found and named; right ids are never blamed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors

from quantscope.diagnose.token_ids import ids_verdict
from quantscope.diagnose.token_rules import ENDS, RULES
from quantscope.errors import VocabularyError
from quantscope.sources.base import Source
from quantscope.sources.resolve import open_source
from quantscope.tokenizers import from_source
from quantscope.tokenizers.vocabulary import BYTE_TO_CHAR, Kind
from tests.models import STORIES

# "▁ab" merges before "abc": greedy longest match and merging by score part at "abc"
PIECES = {p: -float(i) for i, p in enumerate(("▁a", "ab", "▁ab", "bc", "c▁", "abcd", "▁", "a", "b", "c", "d", "A", "B", "é", "▁▁"))}
CONTROL = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
SPM = [*CONTROL, *(f"<0x{b:02X}>" for b in range(256)), *PIECES, *"userinto"]
KINDS = dict.fromkeys(CONTROL, Kind.CONTROL) | {f"<0x{b:02X}>": Kind.BYTE for b in range(256)} | {"<unk>": Kind.UNKNOWN}
MERGES = ("a b", "b c", "ab c", "Ġ a", "Ġa b", "c d")


def source(model: str, tokens: list[str], **keys: Any) -> Source:
    metadata = {f"tokenizer.ggml.{key}": value for key, value in {"model": model, "tokens": tokens, **keys}.items()}
    metadata["tokenizer.ggml.token_type"] = np.array([KINDS.get(t, Kind.NORMAL) for t in tokens], np.int32)
    return cast(Source, SimpleNamespace(path=Path("model.gguf"), format="gguf", metadata=metadata))


def spm(**keys: Any) -> Source:
    scores = np.array([PIECES.get(t, -99.0) for t in SPM], np.float32)
    return source("llama", SPM, scores=scores, unknown_token_id=0, **keys)


def bpe(**keys: Any) -> Source:
    tokens = [*BYTE_TO_CHAR.values(), *(m.replace(" ", "") for m in MERGES), "abcd", "<s>"]
    return source("gpt2", tokens, merges=list(MERGES), pre="gpt-2", bos_token_id=len(tokens) - 1, eos_token_id=len(tokens) - 1, **keys)


def ids(*pieces: str) -> list[int]:
    """Ids of the SentencePiece vocabulary by piece."""
    return [SPM.index(p) for p in pieces]


# text → what a right engine makes of it, and what engines with one mistake or several make of it
RIGHT = "ab\nab"
RIGHT_IDS = ids("<s>", "▁ab", "<0x0A>", "ab")
WRONG: tuple[tuple[str, list[int], tuple[str, ...]], ...] = (
    (RIGHT, ids("▁ab", "<0x0A>", "ab"), ("bos-missing",)),
    (RIGHT, ids("<s>", "<s>", "▁ab", "<0x0A>", "ab"), ("bos-doubled",)),
    (RIGHT, ids("<s>", "▁ab", "<0x0A>", "ab", "</s>"), ("eos-appended",)),
    (RIGHT, ids("<s>", "▁ab", "▁ab"), ("newline-as-space",)),
    (RIGHT, ids("<s>", "ab", "<0x0A>", "ab"), ("space-prefix-missing",)),
    (RIGHT, ids("<s>", "▁", "▁ab", "<0x0A>", "ab"), ("space-prefix-added",)),
    (RIGHT, ids("<s>", "▁ab", "<0x0D>", "<0x0A>", "ab"), ("newline-crlf",)),
    (RIGHT, ids("<s>", "▁ab", "ab"), ("newline-missing",)),
    (RIGHT, ids("<s>", "▁", "a", "b", "<0x0A>", "a", "b"), ("no-merges",)),
    (RIGHT, ids("<s>", "▁ab", "<unk>", "ab"), ("bytes-unknown",)),
    ("ab é", ids("<s>", "▁ab", "▁", "<0xC3>", "<0xA9>"), ("non-ascii-bytes",)),
    ("AB", ids("<s>", "▁ab"), ("lower-cased",)),
    (" a ", ids("<s>", "▁a"), ("stripped",)),
    ("abcd", ids("<s>", "▁ab", "c", "d"), ()),  # right: merging by score
    ("dabcd", ids("<s>", "▁", "d", "abcd"), ("longest-match",)),
    ("a ab", ids("<s>", "▁", "a", "▁", "ab"), ("spaces-alone",)),
    ("a</s>", ids("<s>", "▁a", "</s>"), ("special-parsed",)),
    (RIGHT, ids("▁ab", "▁ab", "</s>"), ("newline-as-space", "bos-missing", "eos-appended")),
    (RIGHT, ids("<s>", "ab", "▁ab", "</s>"), ("newline-as-space", "space-prefix-missing", "eos-appended")),
)


@pytest.mark.parametrize(("text", "found", "rules"), WRONG)
def test_a_mistake_is_named_and_gives_exactly_the_ids(text: str, found: list[int], rules: tuple[str, ...]) -> None:
    verdict = ids_verdict(spm(), text, None, found)
    assert verdict.same == (not rules)
    if rules:
        assert verdict.verified
        assert rules in verdict.rules
        assert "gives exactly these ids" in verdict.sentence
        given_ids = ids_verdict(spm(), text, list(verdict.expected), found)  # the right ids beside the text change nothing
        assert given_ids.basis == "ids"
        assert given_ids.rules == verdict.rules


def test_the_sentence_names_the_first_difference_and_the_pieces() -> None:
    verdict = ids_verdict(spm(), RIGHT, None, ids("<s>", "▁ab", "▁ab"))
    newline, word = SPM.index("<0x0A>"), SPM.index("▁ab")
    assert (verdict.position, verdict.expected_id, verdict.found_id) == (2, newline, word)
    assert verdict.sentence == (
        f'The ids part at position 2: expected {newline} ("<0x0A>"), found {word} ("▁ab"): '
        "the engine replaces newlines by spaces (gives exactly these ids)."
    )
    cut = ids_verdict(spm(), RIGHT, None, RIGHT_IDS[:2])
    assert (cut.position, cut.found_id, cut.rules) == (2, None, (("cut-short",),))
    longer = ids_verdict(spm(), RIGHT, None, [*RIGHT_IDS, 270, 271])
    assert (longer.position, longer.expected_id, longer.rules, longer.verified) == (4, None, (("goes-on",),), False)


def test_nothing_is_verified_that_does_not_give_the_ids() -> None:
    strange = ids_verdict(spm(), RIGHT, None, ids("<s>", "d", "c", "b"))
    assert not strange.verified
    assert strange.rules == ()
    assert strange.sentence.endswith("none of the known mistakes gives these ids.")
    near = ids_verdict(spm(), "abababab\n" * 3, None, [*ids("<s>", "▁ab"), *ids("a", "b") * 3, *ids("<0x0A>", "d", "c")])
    assert not near.verified


def test_likely_when_a_rule_closes_most_of_the_distance() -> None:
    right = [RIGHT] * 4
    found = from_source(spm()).encode(" ".join(right).replace("\n", " "))
    found[-1] = SPM.index("d")  # one more difference that no rule makes
    verdict = ids_verdict(spm(), " ".join(right), None, found)
    assert not verdict.verified
    assert verdict.rules == (("newline-as-space",),)
    assert "probably the engine replaces newlines by spaces" in verdict.sentence


def test_templates_as_tokens_and_as_text_and_unknown_ones() -> None:
    tokenizer = from_source(spm())
    chat = "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n"
    for parse, rule in ((True, "template-chatml"), (False, "template-chatml-as-text")):
        assert (rule,) in ids_verdict(spm(), "ab", None, tokenizer.encode(chat, parse_special=parse)).rules
    other = ids_verdict(spm(), "ab", None, [*ids("<s>", "d", "d", "▁ab"), *ids("c", "d")])
    assert other.rules == (("template",),)
    assert not other.verified
    assert '"cd" after' in other.sentence


def test_special_tokens_as_text_where_the_expected_ids_have_them_as_tokens() -> None:
    text = "a</s>"
    expected = from_source(spm()).encode(text, parse_special=True)
    verdict = ids_verdict(spm(), text, expected, from_source(spm()).encode(text))
    assert verdict.rules == (("special-as-text",),)
    assert verdict.verified


# ---- Ids without a text ------------------------------------------------------------------------------------------------------


def test_ids_alone_are_judged_by_the_text_they_spell() -> None:
    right = ids_verdict(spm(), None, None, RIGHT_IDS)
    assert right.same
    assert "only the text shows" in right.sentence
    for found, rule in (
        (RIGHT_IDS[1:], "bos-missing"),
        ([1, *RIGHT_IDS], "bos-doubled"),
        ([*RIGHT_IDS, 2], "eos-appended"),
        (ids("<s>", "▁", "a", "b", "<0x0A>", "a", "b"), "no-merges"),
        ([1, *from_source(spm()).encode("a</s>ab", add_special=False)], "special-as-text"),
    ):
        verdict = ids_verdict(spm(), None, None, found)
        assert (rule,) in verdict.rules, verdict
        assert verdict.basis == "round trip"
        assert "if the text is the one they spell" in verdict.sentence


def test_ids_alone_that_are_no_text_or_no_tokens() -> None:
    half = ids_verdict(spm(), None, None, ids("<s>", "▁a", "<0xC3>"))
    assert half.same
    assert "nothing shows" in half.sentence
    foreign = ids_verdict(spm(), None, None, [1, 5, 100_000])
    assert (foreign.same, foreign.position, foreign.found_id) == (False, 2, 100_000)
    assert "is no token of this vocabulary" in foreign.sentence
    assert ids_verdict(spm(), "a", None, [1, 100_000]).rules == (("other-vocabulary",),)


@given(st.text(st.sampled_from("abcdAB é\n\té日.'"), max_size=30))
@settings(max_examples=150, deadline=None)
def test_right_ids_are_never_blamed(text: str) -> None:
    for model in (spm(), spm(add_space_prefix=False), bpe(), bpe(add_bos_token=True)):
        found = from_source(model).encode(text)
        assert ids_verdict(model, text, None, found).same
        assert ids_verdict(model, None, None, found).same


@given(st.lists(st.sampled_from(["<|im_start|>", "<|im_end|>", "a", " ab", "\n", "</s>", "  "]), max_size=8))
@settings(max_examples=100, deadline=None)
def test_a_right_chat_is_never_blamed_without_its_text(parts: list[str]) -> None:
    found = from_source(spm()).encode("".join(parts), parse_special=True)
    assert ids_verdict(spm(), None, None, found).same or found[-1] == 2  # an EOS at the end may be the text's own


@pytest.mark.parametrize(
    ("text", "pieces", "rule"),
    [
        ("a ab", ["Ġa", "Ġab"], "space-prefix-added"),
        ("abcd", ["a", "b", "c", "d"], "no-merges"),
        ("abcd", ["abcd"], "longest-match"),
        ("a\n\na", ["a", "Ċ", "Ċ", "a"], ""),
    ],
)
def test_byte_level_vocabularies(text: str, pieces: list[str], rule: str) -> None:
    tokens = list(bpe().metadata["tokenizer.ggml.tokens"])
    verdict = ids_verdict(bpe(), text, None, [tokens.index(p) for p in pieces])
    assert verdict.same == (rule == "")
    assert not rule or any(rule in rules for rules in verdict.rules)


def test_words_that_are_not_cut() -> None:
    merges = ["a Ġ", "aĠ b"]
    tokens = [*BYTE_TO_CHAR.values(), "aĠ", "aĠb"]
    model = source("gpt2", tokens, merges=merges, pre="gpt-2")
    assert ids_verdict(model, "a b", None, [tokens.index("a"), tokens.index("Ġ"), tokens.index("b")]).same
    verdict = ids_verdict(model, "a b", None, [tokens.index("aĠb")])
    assert ("words-not-cut",) in verdict.rules
    assert verdict.verified
    assert verdict.expected_piece == "a"


def test_bos_where_the_vocabulary_adds_none() -> None:
    bos = int(bpe().metadata["tokenizer.ggml.bos_token_id"])
    verdict = ids_verdict(bpe(), "ab", None, [bos, *from_source(bpe()).encode("ab")])
    assert verdict.rules == (("bos-added",),)


# ---- Files -------------------------------------------------------------------------------------------------------------------


def test_a_file_without_a_usable_vocabulary_compares_given_ids_only() -> None:
    bare = cast(Source, SimpleNamespace(path=Path("model.gguf"), format="gguf", metadata={}))
    assert ids_verdict(bare, None, [1, 2, 3], [1, 2, 3]).same
    verdict = ids_verdict(bare, None, [1, 2, 3], [1, 5, 3])
    assert (
        verdict.sentence
        == "The ids part at position 1: expected 2, found 5: no rule was tried, as the vocabulary or the text is not known."
    )
    with pytest.raises(VocabularyError):
        ids_verdict(bare, "text", None, [1])


def test_a_tokenizer_json(tmp_path: Path) -> None:
    """Its merges are not read, so the rules that need them are left out; the others work as for a GGUF file."""
    made = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(["<s>", *BYTE_TO_CHAR.values(), "ab"])}, [("a", "b")]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(["<s>"])
    made.post_processor = processors.TemplateProcessing("<s> $0", special_tokens=[("<s>", 0)])
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    model = cast(Source, SimpleNamespace(path=tmp_path, format="safetensors", metadata={}))
    right = from_source(model).encode("ab\nab")
    assert right[0] == 0
    assert ids_verdict(model, None, None, right).same
    for text, rule in (("ab ab", "newline-as-space"), ("ab\nab\n", "newline-added"), ("abab", "newline-missing")):
        assert (rule,) in ids_verdict(model, "ab\nab", None, from_source(model).encode(text)).rules
    letters = [right[0], *(i for c in "ab\nab" for i in from_source(model).encode(c, add_special=False))]
    assert ids_verdict(model, "ab\nab", None, letters).rules == (("no-merges",),)


def test_a_real_file_with_several_mistakes_at_once() -> None:
    """As an engine's notes tell of: newline and spaces replaced, no space prefix, EOS appended."""
    model = open_source(STORIES)
    text = "Once upon a time\nLily"
    found = from_source(model).encode(text.replace("\n", " ")[1:])  # any other ids
    assert not ids_verdict(model, text, None, found).verified
    engine = [*from_source(model).encode(text.replace("\n", " ")), 2]
    assert ids_verdict(model, text, None, engine).rules == (("newline-as-space", "eos-appended"),)


def test_names_are_distinct_and_sentences_are_whole() -> None:
    names = [rule.name for rule in RULES] + list(ENDS)
    assert len(set(names)) == len(names)
    assert len(names) >= 40
    for rule in (*RULES, *ENDS.values()):
        assert rule.says[0].islower()
        assert not rule.says.endswith(".")
