"""Tokenizers on vocabularies small enough to follow by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors

from quantscope.errors import CorruptFileError, PromptError, VocabularyError
from quantscope.sources.base import Source
from quantscope.tokenizers import Tokenizer, check_ids, from_source
from quantscope.tokenizers.characters import class_text
from quantscope.tokenizers.pieces import PieceDecoder
from quantscope.tokenizers.pretokenize import PRE_TOKENIZERS, split
from quantscope.tokenizers.spm import read_model
from quantscope.tokenizers.vocabulary import BYTE_TO_CHAR, Kind

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
BYTES = [f"<0x{b:02X}>" for b in range(256)]
LETTERS = list(BYTE_TO_CHAR.values())


def gguf(**keys: Any) -> Tokenizer:
    """The tokenizer of a GGUF file with these ``tokenizer.ggml`` keys; ``name`` is general.name."""
    metadata: dict[str, Any] = {f"tokenizer.ggml.{key}": value for key, value in keys.items() if key != "name"}
    metadata["general.name"] = keys.get("name", "")
    return from_source(cast(Source, SimpleNamespace(path=Path("model.gguf"), format="gguf", metadata=metadata)))


def folder(path: Path, config: Mapping[str, Any] | None = None) -> Tokenizer:
    return from_source(cast(Source, SimpleNamespace(path=path, format="safetensors", metadata=config or {})))


def spm(pieces: Mapping[str, float], kinds: Mapping[str, Kind] | None = None, **keys: Any) -> Tokenizer:
    """<unk> <s> </s>, the 256 bytes, then the pieces with their scores."""
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *pieces]
    types = dict.fromkeys(tokens, Kind.NORMAL) | {"<unk>": Kind.UNKNOWN, "<s>": Kind.CONTROL, "</s>": Kind.CONTROL}
    types |= dict.fromkeys(BYTES, Kind.BYTE) | (kinds or {})
    scores = np.array([0.0] * 259 + list(pieces.values()), np.float32)
    return gguf(model="llama", tokens=tokens, scores=scores, token_type=np.array([types[t] for t in tokens], np.int32), **keys)


def bpe(merges: Sequence[str], extra: Sequence[str] = (), kinds: Mapping[str, Kind] | None = None, **keys: Any) -> Tokenizer:
    """The 256 letters, the results of the merges, then extra tokens."""
    tokens = [*LETTERS, *dict.fromkeys(m.replace(" ", "") for m in merges), *extra]
    types = np.array([(kinds or {}).get(t, Kind.NORMAL) for t in tokens], np.int32)
    return gguf(**{"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "merges": list(merges), "token_type": types} | keys)


def pieces(tokenizer: Tokenizer, text: str, **options: bool) -> list[str]:
    return [tokenizer.piece(i) for i in tokenizer.encode(text, **options)]


def test_spm_merges_the_highest_score_first_and_the_leftmost_of_equals() -> None:
    by_score = spm({"▁": -1, "a": -1, "b": -1, "c": -1, "ab": -9, "bc": -5})
    assert pieces(by_score, "abc", add_special=False) == [" ", "a", "bc"]
    tied = spm({"▁": -1, "a": -1, "aa": -5, "▁a": -5, "▁aa": -7})
    assert pieces(tied, "aaa", add_special=False) == [" a", "aa"]


def test_spm_falls_back_to_bytes_and_without_them_to_unknown() -> None:
    tokenizer = spm({"▁": -1, "a": -2})
    assert tokenizer.encode("aé\0🦙\n", add_special=False) == [259, 260, *(3 + b for b in "é\0🦙\n".encode())]
    bare = gguf(model="llama", tokens=["<unk>", "<s>", "</s>", "▁", "a"], scores=np.zeros(5, np.float32), unknown_token_id=0)
    assert bare.encode("aé") == [1, 3, 4, 0, 0]


def test_spm_space_goes_before_the_text_and_after_special_tokens() -> None:
    kinds = {"<u>": Kind.USER_DEFINED}
    tokenizer = spm({"▁": -1, "a": -2, "b": -3, "<u>": 0}, kinds)
    assert pieces(tokenizer, "a<u>b</s>", add_special=False) == [" ", "a", "<u>", " ", "b", "<", "/", "s", ">"]
    assert pieces(tokenizer, "a</s>b", parse_special=True) == ["<s>", " ", "a", "</s>", " ", "b"]
    assert pieces(tokenizer, "<unk>a", parse_special=True) == ["<s>", "<unk>", " ", "a"]
    assert pieces(spm({"a": -2}, add_space_prefix=False), "a") == ["<s>", "a"]


def test_bos_and_eos_follow_the_file_and_its_defaults() -> None:
    assert spm({"▁": 0}).encode("") == [1]
    assert spm({"▁": 0}).add_bos
    assert spm({"▁": 0}, add_bos_token=False, add_eos_token=True).encode("") == [2]
    assert spm({"▁": 0}, bos_token_id=2).encode("") == [2]
    assert spm({"▁": 0}, bos_token_id=10**6).encode("") == [1]  # outside the vocabulary: the default, as in llama.cpp
    assert bpe([]).encode("") == []
    assert bpe([], pre="llama-bpe").encode("") == [11]
    assert bpe([], pre="llama-bpe", add_bos_token=False).encode("") == []
    assert bpe([], pre="glm4", add_bos_token=True).encode("") == []
    assert bpe([], add_bos_token=True, bos_token_id=3, add_eos_token=True, eos_token_id=4).encode("!") == [3, 0, 4]


def test_bpe_merges_by_rule_order_inside_words() -> None:
    assert pieces(bpe(["a b", "b c", "ab c"]), "abc bc") == ["abc", " ", "bc"]
    assert pieces(bpe(["b c", "a b", "a bc"]), "abc ab") == ["abc", " ", "ab"]
    assert pieces(bpe(["a a"]), "aaa") == ["aa", "a"]
    assert pieces(bpe(["a Ġ", "Ġ a"]), "a a") == ["a", " a"]  # "a " is cut by the pre-tokenizer


def test_ignore_merges_takes_a_whole_word_that_is_a_token() -> None:
    assert pieces(bpe(["b c"], ["abc"], pre="llama-bpe", add_bos_token=False), "abc") == ["abc"]
    assert pieces(bpe(["b c"], ["abc"]), "abc") == ["a", "bc"]


def test_bpe_rules_may_name_strings_that_are_no_tokens() -> None:
    tokenizer = gguf(model="gpt2", pre="gpt-2", tokens=["a", "b", "c", "abc"], merges=["a b", "ab c", "b c"])
    assert tokenizer.encode("abc ab cb") == [3, 0, 1, 2, 1]  # "ab" ends as its letters, the space is no token at all
    first = gguf(model="gpt2", pre="gpt-2", tokens=["a", "b", "c", "ab", "bc"], merges=["b c", "a b", "b c"])
    assert first.encode("abc") == [0, 4]  # of two equal rules the first counts


def test_special_tokens_are_cut_out_longest_first() -> None:
    kinds = {"<c>": Kind.CONTROL, "<c><c>": Kind.CONTROL, "<u>": Kind.USER_DEFINED}
    tokenizer = bpe([], list(kinds), kinds)
    assert tokenizer.encode("<c><c><c>", parse_special=True) == [257, 256]
    assert tokenizer.encode("<u>", parse_special=False) == [258]
    assert pieces(tokenizer, "<c>", parse_special=False) == ["<", "c", ">"]


def test_known_end_tokens_are_control_tokens_whatever_the_file_says() -> None:
    tokenizer = bpe([], ["<|im_end|>", "<|channel|>", "<|fim_prefix|>"])
    assert tokenizer.encode("<|im_end|>", parse_special=True) == [256]
    assert len(tokenizer.encode("<|im_end|>")) == 10
    assert tokenizer.encode("<|channel|>") == [257]
    assert tokenizer.encode("<|fim_prefix|>", parse_special=True) == [258]
    assert tokenizer.decode([256, 257, 258]) == "<|channel|>"


def test_phi3_special_tokens_swallow_the_space_after_them() -> None:
    kinds = {"<|user|>": Kind.CONTROL}
    with_space = spm({"▁": -1, "a": -2, "<|user|>": 0}, kinds)
    assert pieces(with_space, "<|user|> \na", parse_special=True)[1:] == ["<|user|>", " ", " ", "\n", "a"]
    phi3 = spm({"▁": -1, "a": -2, "<|user|>": 0}, kinds, name="Phi-3 mini")
    assert pieces(phi3, "<|user|> \na", parse_special=True)[1:] == ["<|user|>", " ", "a"]
    assert pieces(phi3, "<s> a", parse_special=True)[1:] == ["<s>", " ", " ", "a"]


def test_decoding_shows_incomplete_characters_and_leaves_control_tokens_out() -> None:
    tokenizer = spm({"▁": -1, "▁a": -2})
    assert tokenizer.decode([1, 260, 3 + 0xE6, 3 + 0x97]) == " a\ufffd"
    assert tokenizer.decode([260, 3 + 0xE6, 3 + 0x97, 3 + 0xA5]) == "a日"
    assert tokenizer.decode([1, 260, 2], unparse_special=True) == "<s> a</s>"
    assert tokenizer.decode([1, 260], remove_special=True, unparse_special=True) == " a"
    assert tokenizer.decode([]) == ""
    assert (tokenizer.piece(3 + 10), tokenizer.piece(260), tokenizer.piece(1), tokenizer.piece(999)) == ("\n", " a", "<s>", "[PAD999]")


def test_decoding_cleans_spaces_where_the_pre_tokenizer_says_so() -> None:
    text = "it 's a ' b , c ."
    assert bpe([]).decode(bpe([]).encode(text)) == "it's a'b, c."
    assert bpe([], pre="qwen2").decode(bpe([]).encode(text)) == text


@given(TEXT)
def test_spm_text_survives_encoding_and_decoding(text: str) -> None:
    tokenizer = spm({"▁": -1, "a": -2, "b": -3, "ab": -4, "▁a": -5, "▁▁": -6})
    assert tokenizer.decode(tokenizer.encode(text, add_special=False)) == text.replace("▁", " ")


@given(TEXT, st.sampled_from([name for name, row in PRE_TOKENIZERS.items() if not row.clean_spaces and not row.raw]))
def test_bpe_text_survives_encoding_and_decoding(text: str, pre: str) -> None:
    tokenizer = bpe(["a b", "Ġ a", "Ġa b"], pre=pre, add_bos_token=False)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(TEXT)
@settings(max_examples=50)
def test_words_join_to_the_text(text: str) -> None:
    for row in PRE_TOKENIZERS.values():
        words = split(text, row)
        assert "".join(words) == text
        assert "" not in words


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", ["I", "'ll", " pay", " 12345", "€", " :)", "  ", " ok", "\n\n", "\n", "x", "  "]),
        ("llama-bpe", ["I", "'ll", " pay", " ", "123", "45", "€", " :)", "  ", " ok", "\n\n\n", "x", "  "]),
        ("qwen2", ["I", "'ll", " pay", " ", "1", "2", "3", "4", "5", "€", " :)", "  ", " ok", "\n\n\n", "x", "  "]),
    ],
)
def test_words_of_the_main_pre_tokenizers(pre: str, words: list[str]) -> None:
    assert split("".join(words), PRE_TOKENIZERS[pre]) == words


def test_classes_do_not_depend_on_the_unicode_version_of_python() -> None:
    # a letter of Unicode 15.1, a letter of 16.0 (unassigned here), ASCII, white space, number, mark, symbol, punctuation
    assert class_text("\U0002ebf0\u1c89a\u3000²\u0301€。漢\x85\x9f") == b"\xd2\xd0a\x0b\xd1\xd4\xd5\xd3\xd7\x0b\xd6"


def wordpiece(*tokens: str, **keys: Any) -> Tokenizer:
    names = ["[UNK]", "[CLS]", "[SEP]", *tokens]
    ids = {"unknown_token_id": 0, "bos_token_id": 1, "seperator_token_id": 2}
    return gguf(model="bert", tokens=names, token_type=np.array([2, 3, 3, *[1] * len(tokens)], np.int32), **ids, **keys)


def test_wordpiece_takes_the_longest_tokens_of_lower_cased_words() -> None:
    tokenizer = wordpiece("▁ab", "c", "bc", "▁a", "▁日", "▁.")
    assert pieces(tokenizer, "ÀBC abz a日.", add_special=False) == [" ab", "c", "[UNK]", " a", " 日", " ."]
    assert pieces(tokenizer, "a") == ["[CLS]", " a", "[SEP]"]
    assert pieces(wordpiece("▁a", "▁A", **{"normalizer.lowercase": False}), "aA A", add_special=False) == ["[UNK]", " A"]


def unigram(scores: Mapping[str, float], **keys: Any) -> Tokenizer:
    tokens = ["<pad>", "</s>", "<unk>", *scores]
    types = np.array([3, 3, 2, *[1] * len(scores)], np.int32)
    return gguf(model="t5", tokens=tokens, scores=np.array([0, 0, 0, *scores.values()], np.float32), token_type=types, **keys)


def test_unigram_takes_the_best_sum_of_scores() -> None:
    tokenizer = unigram({"▁": -2, "a": -3, "ab": -4, "b": -2, "▁a": -6, "bb": -1})
    assert pieces(tokenizer, "abb", add_special=False) == ["a", "bb"]  # −4, and −6 for "ab", "b"
    assert pieces(tokenizer, "a 日本 b") == ["a", " ", "<unk>", " ", "b", "</s>"]  # unknown ones in a row are one
    assert pieces(unigram({"▁": -2, "a": -3, "▁a": -6}, add_space_prefix=True), "a") == [" ", "a", "</s>"]
    merged = unigram({"▁": -2, "a": -3}, remove_extra_whitespaces=True)
    assert pieces(merged, " a   a ", add_special=False) == [" ", "a", " ", "a"]


@pytest.mark.parametrize(("rules", "message"), [(b"\x08\0\0\0abcd", r"has 8 bytes"), (b"\4\0\0\0\xff\xff\xff\x7fx", "past its end")])
def test_damaged_unigram_rules(rules: bytes, message: str) -> None:
    with pytest.raises(CorruptFileError, match=message):
        unigram({"a": -1}, precompiled_charsmap=np.frombuffer(rules, np.uint8)).encode("a")


def test_unknown_pre_tokenizer_lists_the_known_ones_and_still_decodes() -> None:
    tokenizer = bpe([], pre="of-tomorrow")
    with pytest.raises(VocabularyError, match=r"model\.gguf.*'of-tomorrow'.*llama-bpe.*qwen2.*--tokens"):
        tokenizer.encode("a")
    assert tokenizer.piece(0) == "!"


def test_missing_pre_tokenizer_is_noted() -> None:
    assert "tokenizer.ggml.pre" in bpe([], pre="").notes[0]
    assert bpe([]).notes == ()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, r"no tokenizer\.ggml\.model.*--tokens"),
        ({"model": "none"}, r"'none'.*llama.*gpt2.*--tokens"),
        ({"model": "rwkv", "tokens": ["a"]}, r"'rwkv'.*WordPiece.*--tokens"),
        ({"model": "llama"}, r"tokenizer\.ggml\.tokens is missing.*--tokens"),
        ({"model": "gpt2", "tokens": ["a"]}, r"tokenizer\.ggml\.merges is missing.*--tokens"),
    ],
)
def test_no_usable_vocabulary(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(VocabularyError, match=message):
        gguf(**keys)


def test_lists_that_disagree_are_refused() -> None:
    with pytest.raises(CorruptFileError, match=r"scores has 1 entries, expected 2"):
        gguf(model="llama", tokens=["a", "b"], scores=np.zeros(1, np.float32))
    doubled = gguf(model="llama", tokens=["<unk>", "a", "a"], scores=np.zeros(3, np.float32))
    with pytest.raises(CorruptFileError, match=r"holds 'a' twice"):
        doubled.encode("a")
    assert doubled.piece(2) == "a"


def test_tokens_without_text_or_with_undecodable_bytes() -> None:
    tokens = [*LETTERS, "", "", b"\xff\xfe".decode("utf-8", "surrogateescape")]
    tokenizer = gguf(model="gpt2", pre="gpt-2", tokens=tokens, merges=["\udcff \udcfe"])
    assert tokenizer.decode(tokenizer.encode("abc")) == "abc"
    assert tokenizer.piece(256) == "[EMPTY_256]"
    assert spm({"byte": 0, "▁": 0}, {"byte": Kind.BYTE}).piece(259) == "byte"
    spm_tokens = ["<unk>", "<s>", "</s>", "▁", b"\xff".decode("utf-8", "surrogateescape"), "a"]
    assert gguf(model="llama", tokens=spm_tokens, scores=np.zeros(6, np.float32)).encode("a") == [1, 3, 5]


@pytest.mark.parametrize("text", ["\ud800", "a\udcff"])
def test_surrogates_are_refused(text: str) -> None:
    with pytest.raises(PromptError, match=r"lone surrogate U\+D.*--tokens"):
        spm({"▁": 0}).encode(text)


def test_check_ids() -> None:
    assert check_ids([0, np.int32(5)], 6) == [0, 5]
    for ids, message in (
        ([], "prompt is empty"),
        ([1, 6], r"token id 6 at position 1.*0 to 5.*n_vocab = 6"),
        ([-1], "token id -1"),
        ([1.5], "1.5, expected an integer"),
        (["7"], "'7', expected an integer"),
    ):
        with pytest.raises(PromptError, match=message):
            check_ids(cast(Sequence[int], ids), 6)
    with pytest.raises(PromptError, match=r"3 tokens, expected at most 2"):
        check_ids([1, 2, 3], 6, n_ctx=2)


def json_tokenizer(path: Path) -> tokenizers.Tokenizer:
    letters = {letter: i for i, letter in enumerate(LETTERS)}
    tokenizer = tokenizers.Tokenizer(models.BPE(letters | {"ab": 256}, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.add_tokens([tokenizers.AddedToken("<u>", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
    tokenizer.enable_truncation(3)
    tokenizer.save(str(path / "tokenizer.json"))
    return tokenizer


def test_tokenizer_json_with_its_post_processor(tmp_path: Path) -> None:
    json_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<s>"}}))
    tokenizer = folder(tmp_path, {"eos_token_id": [7, 8]})
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos, tokenizer.n_vocab) == (257, 7, True, 259)
    assert tokenizer.encode("ab<u>") == [257, 256, 258]
    assert tokenizer.encode("<s>", add_special=False, parse_special=True) == [257]
    assert len(tokenizer.encode("<s>", add_special=False)) == 3
    assert tokenizer.decode([257, *tokenizer.encode("é 日本", add_special=False)]) == "é 日本"
    assert tokenizer.piece(256) == "ab"
    assert len(tokenizer.encode("a " * 100)) == 201  # the file's truncation does not apply
    with pytest.raises(PromptError, match="lone surrogate"):
        tokenizer.encode("\ud800")


def test_bos_that_tokenizer_json_does_not_add_is_noted(tmp_path: Path) -> None:
    json_tokenizer(tmp_path)
    settings_file = tmp_path / "tokenizer_config.json"
    settings_file.write_text(json.dumps({"bos_token": "<u>", "add_bos_token": True}))
    tokenizer = folder(tmp_path)
    assert not tokenizer.add_bos
    assert "add_bos_token" in tokenizer.notes[0]


def train_spm(path: Path, kind: str = "bpe") -> sentencepiece.SentencePieceProcessor:
    corpus = path / "corpus.txt"
    corpus.write_text("the cat sat on the mat and the hat\nthat cat is fat\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(path / "tokenizer"), vocab_size=320, model_type=kind, byte_fallback=True,
        hard_vocab_limit=False, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model"))


def test_tokenizer_model_agrees_with_sentencepiece(tmp_path: Path) -> None:
    processor = train_spm(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", "add_eos_token": True}))
    tokenizer = folder(tmp_path)
    for text in ("the cat", "  a  hat\n", "Zürich 🦙", "that\tmat"):
        assert tokenizer.encode(text, add_special=False) == processor.encode(text)
        assert tokenizer.encode(text) == [1, *processor.encode(text), 2]
        assert tokenizer.decode(processor.encode(text)) == text
    assert tokenizer.encode("") == [1, 2]


def test_tokens_added_to_tokenizer_model(tmp_path: Path) -> None:
    n = train_spm(tmp_path).vocab_size()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<u>": n}))
    decoder = {str(n + 1): {"content": "<c>", "special": True}, "x": {}, str(n + 99): {"content": "<far>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    tokenizer = folder(tmp_path, {"vocab_size": n + 3})
    assert tokenizer.n_vocab == n + 3
    assert tokenizer.encode("<u><c>", add_special=False, parse_special=True) == [n, n + 1]
    assert tokenizer.encode("<u>", add_special=False) == [n]
    assert n + 1 not in tokenizer.encode("<c>")
    assert tokenizer.decode([n + 2]) == ""


def test_folders_without_a_usable_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(VocabularyError, match=r"neither tokenizer\.json nor tokenizer\.model.*--tokens"):
        folder(tmp_path)
    train_spm(tmp_path, "unigram")
    with pytest.raises(VocabularyError, match=r"type 1, expected 2 \(BPE\)"):
        folder(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(VocabularyError, match="not a SentencePiece model"):
        folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(VocabularyError, match=r"tokenizer\.json.*cannot read it"):
        folder(tmp_path)


@given(data=st.data())
@settings(max_examples=200)
def test_damaged_tokenizer_model_is_refused_or_read(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("damaged") / "tokenizer.model"
    piece = b"\n\x0a\n\x03abc\x15\0\0\0\0"
    intact = piece * 3 + b"\x12\x02\x18\x02"
    position = data.draw(st.integers(0, len(intact) - 1))
    damaged = intact[:position] + data.draw(st.binary(max_size=3)) + intact[position + data.draw(st.integers(0, 3)) :]
    path.write_bytes(damaged)
    try:
        model = read_model(path)
    except VocabularyError:
        return
    assert len(model.tokens) == len(model.scores) == len(model.kinds)


class _Untouched(Sequence[str]):
    """Stands for the reader's lazy list: reading a token fails the test."""

    def __len__(self) -> int:
        return 32000

    def __getitem__(self, i: Any) -> Any:
        raise AssertionError("a token was read")


def test_opening_reads_no_token() -> None:
    tokenizer = gguf(model="gpt2", pre="gpt-2", tokens=_Untouched(), merges=_Untouched(), bos_token_id=9)
    assert (tokenizer.n_vocab, tokenizer.bos_id) == (32000, 9)


def test_importing_pulls_in_neither_tokenizer_package() -> None:
    code = "import sys, quantscope.tokenizers; print([m for m in ('sentencepiece', 'tokenizers', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_time_grows_with_the_length_not_its_square() -> None:
    long_word = "a" * 300_000
    for tokenizer in (spm({"▁": -1, "a": -2, "aa": -3, "aaaa": -4}), bpe(["a a", "aa aa"])):
        assert isinstance(tokenizer, PieceDecoder)
        assert len(tokenizer.encode(long_word, add_special=False)) >= 75_000
