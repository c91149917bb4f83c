"""Token ids and decoded text equal to llama.cpp's, on published vocabularies and on vocabularies made to be awkward."""

from __future__ import annotations

import io
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from quantscope.sources.base import Source
from quantscope.sources.gguf import open_gguf
from quantscope.tokenizers import from_source
from quantscope.tokenizers.characters import CLASS_BYTE, HAN, OTHER, class_table, classes, lower_case, without_accents
from quantscope.tokenizers.ggml import GgmlTokenizer
from quantscope.tokenizers.pretokenize import PRE_TOKENIZERS
from quantscope.tokenizers.vocabulary import BYTE_TO_CHAR, Kind
from tests.oracle.llama_vocab import LlamaVocab, write_vocabulary
from tests.oracle.source_tree import llama_cpp_source

MAIN = ("llama-spm", "llama-bpe", "gpt-2", "qwen2", "gemma-4", "bert-bge")
OTHERS = ("phi-3", "command-r", "deepseek-coder", "deepseek-llm", "falcon", "mpt", "qwen35", "refact", "starcoder")
WITHOUT_VECTORS = ("nomic-bert-moe", "aquila", "baichuan", "gpt-neox")  # no .inp and .out beside them
ALL = [*MAIN, "nomic-bert-moe", *(pytest.param(name, marks=pytest.mark.long) for name in (*OTHERS, *WITHOUT_VECTORS[1:]))]
N_RANDOM = 2000
FLAGS = tuple(product((True, False), repeat=2))
SEPARATOR = "\n__ggml_vocab_test__\n"
AWKWARD = (
    "ab  \t\n\r\x0b\x00\x1c\x85\xa0\u3000,.'\"!?-_/<>|[]{}0123456789²½٣ABéßİſ日本語ガ한국กि्\u0301\u200d\u2581\ufeff€🦙👩\ud7ff\U000e0001"
)
CONTRACTIONS = ("'s", "'S", "'ll", "'Re", "'ſ", "’s", " 'd")


def read(path: Path) -> GgmlTokenizer:
    tokenizer = from_source(cast(Source, open_gguf(path)))
    assert isinstance(tokenizer, GgmlTokenizer)
    return tokenizer


def vocabulary_file(name: str) -> Path:
    return llama_cpp_source() / "models" / f"ggml-vocab-{name}.gguf"


def random_texts(n: int, seed: int, pieces: Sequence[str]) -> Iterator[str]:
    """Whole Unicode, awkward characters, tokens of the vocabulary in a row, one token over and over, Latin to Arabic, ASCII."""
    rng = random.Random(seed)

    def unicode() -> str:
        return chr(rng.choice((rng.randrange(0xD800), rng.randrange(0xE000, 0x110000))))

    kinds: tuple[tuple[Callable[[], str], int], ...] = (
        (unicode, 40),
        (lambda: rng.choice(AWKWARD) if rng.random() < 0.9 else rng.choice(CONTRACTIONS), 60),
        (lambda: rng.choice(pieces), 25),
        (lambda: chr(rng.randrange(0x20, 0x700)), 60),
        (lambda: chr(rng.randrange(0x20, 0x7F)), 60),
    )
    for i in range(n):
        if i % 10 == 9:
            yield rng.choice(pieces) * rng.randrange(1, 200)
        else:
            draw, longest = kinds[i % len(kinds)]
            yield "".join(draw() for _ in range(rng.randrange(longest + 1)))


def assert_same_ids(tokenizer: GgmlTokenizer, llama: LlamaVocab, texts: Iterable[str]) -> int:
    """Compare every text with every combination of the flags; the number of comparisons."""
    n = 0
    for text in texts:
        for add_special, parse_special in FLAGS:
            expected = llama.encode(text, add_special, parse_special)
            assert tokenizer.encode(text, add_special, parse_special) == expected, (text, add_special, parse_special)
            n += 1
    return n


def spelled(tokenizer: GgmlTokenizer) -> list[str]:
    return [tokenizer.piece(i) for i in range(tokenizer.n_vocab)]


@pytest.mark.parametrize("name", MAIN + OTHERS)
def test_vectors_of_llama_cpp(name: str) -> None:
    texts = vocabulary_file(name).with_suffix(".gguf.inp").read_text("utf-8").removesuffix(SEPARATOR).split(SEPARATOR)
    answers = vocabulary_file(name).with_suffix(".gguf.out").read_text("utf-8").splitlines()
    tokenizer = read(vocabulary_file(name))
    assert len(texts) == len(answers) > 40
    for text, answer in zip(texts, answers, strict=True):
        assert tokenizer.encode(text, add_special=False) == [int(i) for i in answer.split()], text


@pytest.mark.parametrize("name", ALL)
def test_ids_of_random_texts(name: str) -> None:
    tokenizer = read(vocabulary_file(name))
    with LlamaVocab(vocabulary_file(name)) as llama:
        texts = ("", " ", "   ", "\n", "\0", "a\0b", "👩‍👩‍👧‍👦", *random_texts(N_RANDOM, 1, spelled(tokenizer)))
        assert assert_same_ids(tokenizer, llama, texts) >= 4 * N_RANDOM


@pytest.mark.parametrize("name", ALL)
def test_every_piece_and_decoded_text(name: str) -> None:
    tokenizer, rng = read(vocabulary_file(name)), random.Random(2)
    with LlamaVocab(vocabulary_file(name)) as llama:
        assert tokenizer.n_vocab == llama.n_vocab > 30_000
        for i in range(0, llama.n_vocab, 1 if name in MAIN else 7):
            assert tokenizer.piece(i) == llama.piece(i).decode("utf-8", "replace"), i
        short = [i for i in range(llama.n_vocab) if tokenizer.piece(i).strip() in (*"?!.,'smtd", "re", "ve", "ll", "")]
        for _ in range(500):
            ids = rng.choices(rng.choice((range(llama.n_vocab), short)), k=rng.randrange(12))
            first, last = ([i] if i is not None else [] for i in (tokenizer.bos_id, tokenizer.eos_id))
            ids = [*rng.choice(((), first)), *ids, *rng.choice(((), last))]
            for remove, unparse in FLAGS:
                expected = llama.decode(ids, remove, unparse)
                assert tokenizer.decode_bytes(ids, remove_special=remove, unparse_special=unparse) == expected, (ids, remove, unparse)


@pytest.fixture(scope="module")
def crossing_rules() -> tuple[list[str], list[str], list[str]]:
    """(texts, tokens, merges): rules learned from whole texts cross every word boundary, so each boundary shows in the ids."""
    texts = [t.replace("\0", "") for t in random_texts(600, 3, [*AWKWARD, *CONTRACTIONS, "den", "Ünï", "12345", "  ", "\r\n", "...\n"])]
    tokenizer = tokenizers.Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=4000, initial_alphabet=list(BYTE_TO_CHAR.values()), show_progress=False)
    letters = ("".join(BYTE_TO_CHAR[b] for b in text.encode()) for text in texts)
    tokenizer.train_from_iterator(letters, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return texts, sorted(model["vocab"], key=model["vocab"].get), [" ".join(pair) for pair in model["merges"]]


def test_no_pre_tokenizer_of_llama_cpp_is_missing() -> None:
    source = (llama_cpp_source() / "src" / "llama-vocab.cpp").read_text("utf-8")
    names = set(re.findall(r'tokenizer_pre == "([^"]+)"', source))
    assert len(names) > 80
    assert names - set(PRE_TOKENIZERS) == {"whitespace"}  # a model of its own
    assert set(PRE_TOKENIZERS) <= names


@pytest.mark.parametrize("pre", [*PRE_TOKENIZERS, ""])
def test_every_pre_tokenizer(pre: str, crossing_rules: tuple[list[str], list[str], list[str]], tmp_path: Path) -> None:
    texts, tokens, merges = crossing_rules
    assert len(texts) == 600
    keys = {"pre": pre} if pre else {}
    path = write_vocabulary(tmp_path / "v.gguf", "gpt2", [*tokens, "<|endoftext|>"], merges=merges, **keys)
    tokenizer = read(path)
    assert (pre == "") == bool(tokenizer.notes)
    with LlamaVocab(path) as llama:
        for text in texts:
            assert tokenizer.encode(text) == llama.encode(text, True, False), text
        ids = tokenizer.encode("it 's a ' b , c .")
        assert tokenizer.decode_bytes(ids) == llama.decode(ids, False, False)


@pytest.mark.parametrize("seed", range(6))
def test_spm_with_ties_and_every_kind_of_token(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    alphabet = "ab▁c<>sé"
    words = {"".join(rng.choices(alphabet, k=rng.randrange(1, 7))) for _ in range(300)} - set("c<é"[seed % 3])
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *sorted(words - {"<s>"})]
    kinds = [Kind.UNKNOWN, Kind.CONTROL, Kind.CONTROL, *[Kind.BYTE] * 256]
    kinds += rng.choices((Kind.NORMAL, Kind.UNUSED, Kind.UNDEFINED), (90, 6, 4), k=len(tokens) - 259)
    # Special tokens of different lengths: which of two equally long ones is cut out first, when they overlap, is up to an unstable sort.
    for length, kind in ((2, Kind.CONTROL), (6, Kind.USER_DEFINED), (7, Kind.CONTROL)):
        kinds[rng.choice([i for i, token in enumerate(tokens) if i >= 259 and len(token.encode()) == length])] = kind
    scores = [0.0] * 259 + [float(-rng.randrange(6)) for _ in tokens[259:]]
    flags = {} if seed < 2 else {key: rng.random() < 0.5 for key in ("add_bos_token", "add_eos_token", "add_space_prefix")}
    path = write_vocabulary(tmp_path / "v.gguf", "llama", tokens, scores=scores, token_type=[int(k) for k in kinds], **flags)
    texts = ["".join(rng.choices(alphabet.replace("▁", " ") + "日", k=rng.randrange(40))) for _ in range(400)]
    tokenizer = read(path)
    with LlamaVocab(path) as llama:
        assert assert_same_ids(tokenizer, llama, texts) == 1600
        for i in range(llama.n_vocab):
            assert tokenizer.piece(i) == llama.piece(i).decode("utf-8", "replace")


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe"])
@pytest.mark.parametrize("seed", range(4))
def test_bpe_with_rules_for_strings_that_are_no_tokens(seed: int, pre: str, tmp_path: Path) -> None:
    rng = random.Random(seed)
    letters = [c for c in BYTE_TO_CHAR.values() if c not in "bĠ"[: seed % 3]]
    strings = ["".join(rng.choices("abcĠéÃ©", k=rng.randrange(1, 5))) for _ in range(200)]
    rules = [f"{a} {b}" for a, b in pairwise(strings)]
    tokens = list(dict.fromkeys([*letters, *(r.replace(" ", "") for r in rules[::2]), *strings[::3]]))
    path = write_vocabulary(tmp_path / "v.gguf", "gpt2", tokens, pre=pre, merges=[*rules, *rules[:50]])
    texts = ["".join(rng.choices("abc é", k=rng.randrange(30))) for _ in range(400)]
    with LlamaVocab(path) as llama:
        assert assert_same_ids(read(path), llama, texts) == 1600


def unigram_file(path: Path, seed: int, **flags: bool) -> Path:
    """A trained unigram model with SentencePiece's rules, user-defined tokens that overlap them, unused tokens and equal scores."""
    model = io.BytesIO()
    texts = [t for t in random_texts(300, seed, ["the cat sat ", "on a mat. ", "Ünï ﬁ ①②", "ｶﾞ", "  "]) if t and "\0" not in t]
    options = {"model_type": "unigram", "vocab_size": 3000, "hard_vocab_limit": False, "minloglevel": 3, "num_threads": 1}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, normalization_rule_name=("nmt_nfkc", "nfkc_cf", "identity")[seed % 3], **options
    )
    trained = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    tokens = [p.piece for p in trained.pieces]
    scores = [p.score if i % 7 else -5.0 for i, p in enumerate(trained.pieces)]
    kinds = [int(p.type) for p in trained.pieces]
    for text, kind in (("①x", Kind.USER_DEFINED), ("éé", Kind.USER_DEFINED), ("<mask>", Kind.CONTROL), ("▁ca", Kind.UNUSED)):
        if text not in tokens:
            tokens, scores, kinds = [*tokens, text], [*scores, -3.0], [*kinds, int(kind)]
    rules = {"precompiled_charsmap": trained.normalizer_spec.precompiled_charsmap} if seed % 3 < 2 else {}
    ids = {"unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return write_vocabulary(path, "t5", tokens, scores=scores, token_type=kinds, **rules, **ids, **flags)


@pytest.mark.parametrize("seed", range(6))
def test_unigram_with_rules_ties_and_every_kind_of_token(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    flags = {key: rng.random() < 0.5 for key in ("add_bos_token", "add_eos_token", "add_space_prefix", "remove_extra_whitespaces")}
    path = unigram_file(tmp_path / "v.gguf", seed, **flags)
    tokenizer = read(path)
    texts = [*random_texts(400, seed + 50, ["①", "①x", "é", "ê", "éé", "<mask>", "ﬁ", " ca", "ｶﾞ", "  ", *spelled(tokenizer)])]
    with LlamaVocab(path) as llama:
        assert assert_same_ids(tokenizer, llama, texts) == 1600
        for i in range(llama.n_vocab):
            assert tokenizer.piece(i) == llama.piece(i).decode("utf-8", "replace")


@pytest.mark.parametrize("flags", [{}, {"lowercase": False}, {"lowercase": False, "strip_accents": True}, {"strip_accents": False}])
def test_wordpiece_with_and_without_normalisation(flags: dict[str, bool], tmp_path: Path) -> None:
    rng = random.Random(len(flags))
    words = {"".join(rng.choices("abcéABÉ日1.", k=rng.randrange(1, 5))) for _ in range(300)}
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted(words), *("▁" + w for w in sorted(words)[::2])]
    kinds = [3, 2, 3, 3, *[1] * (len(tokens) - 4)]
    ids = {"unknown_token_id": 1, "bos_token_id": 2, "seperator_token_id": 3, "eos_token_id": 3}
    keys = {f"normalizer.{name}": value for name, value in flags.items()}
    path = write_vocabulary(tmp_path / "v.gguf", "bert", tokens, token_type=kinds, **ids, **keys)
    texts = ["".join(rng.choices("abcéABÉ日1. \u0301İ\t", k=rng.randrange(40))) for _ in range(400)]
    with LlamaVocab(path) as llama:
        assert assert_same_ids(read(path), llama, [*texts, *random_texts(200, 9, ["[SEP]", " ", "Ab"])]) == 2400


@pytest.mark.parametrize("pre", ["sarvam-moe", "gemma4", "granite-embed-multi-311m"])
@pytest.mark.parametrize("bytes_left", [256, 200, 0])
def test_merges_of_characters_with_byte_fallback(pre: str, bytes_left: int, tmp_path: Path) -> None:
    rng = random.Random(bytes_left)
    strings = ["".join(rng.choices("abc▁é日", k=rng.randrange(1, 5))) for _ in range(200)]
    rules = [f"{a} {b}" for a, b in pairwise(strings)]
    tokens = list(dict.fromkeys(["<pad>", "<bos>", *strings[::3], *(r.replace(" ", "") for r in rules[::2]), "\n", "\n\n\n"]))
    names = [f"<0x{b:02X}>" for b in range(bytes_left)]
    kinds = [3, 3, *[1] * (len(tokens) - 2), *[6] * bytes_left]
    model, keys = ("gemma4", {}) if pre == "gemma4" else ("gpt2", {"pre": pre})
    path = write_vocabulary(tmp_path / "v.gguf", model, [*tokens, *names], merges=rules, token_type=kinds, bos_token_id=1, **keys)
    texts = ["".join(rng.choices("abc é日▁\nx🦙", k=rng.randrange(30))) for _ in range(400)]
    with LlamaVocab(path) as llama:
        assert assert_same_ids(read(path), llama, texts) == 1600


# Of several spellings of a fill-in-the-middle role llama.cpp takes any one, in the order of a hash table: one a role here.
KNOWN = """<|eot_id|> <|im_end|> <|end|> <end_of_turn> <|endoftext|> </s> <|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <eos>
    <|fim_prefix|> <｜fim▁hole｜> <MID> <|fim_pad|> <reponame> <|file_sep|> <|channel|> <|message|> <|start|> <|constrain|> <|unused_1|>
    <｜end▁of▁sentence｜> <s> <unk>"""


@pytest.mark.parametrize("extra", [(), ("<|return|>", "<|call|>"), ("<|calls|>", "<|flush|>")])
@pytest.mark.parametrize("name", ["test", "Phi-3-mini"])
@pytest.mark.parametrize("kind", [Kind.NORMAL, Kind.USER_DEFINED])
def test_corrected_kinds_of_known_tokens(extra: tuple[str, ...], name: str, kind: Kind, tmp_path: Path) -> None:
    known = [*KNOWN.split(), *extra]
    tokens = [*BYTE_TO_CHAR.values(), *known]
    types = [int(Kind.NORMAL)] * 256 + [int(kind)] * len(known)
    path = write_vocabulary(tmp_path / "v.gguf", "gpt2", tokens, name, pre="gpt-2", merges=["a b"], token_type=types, eos_token_id=260)
    rng = random.Random(4)
    texts = ["".join(rng.choice((*known, " ", "\n ", "ab")) for _ in range(rng.randrange(12))) for _ in range(300)]
    tokenizer = read(path)
    with LlamaVocab(path) as llama:
        assert assert_same_ids(tokenizer, llama, texts) == 1200
        for i in range(llama.n_vocab):
            assert tokenizer.decode_bytes([i]) == llama.decode([i], False, False)


@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize("bos", [None, True, False])
@pytest.mark.parametrize("eos", [None, True, False])
@pytest.mark.parametrize("ids", [{}, {"bos_token_id": 7, "eos_token_id": 8}, {"bos_token_id": 99999}])
def test_bos_and_eos_defaults(model: str, bos: bool | None, eos: bool | None, ids: dict[str, int], tmp_path: Path) -> None:
    keys: dict[str, object] = {key: value for key, value in (("add_bos_token", bos), ("add_eos_token", eos)) if value is not None}
    letters = [f"<0x{b:02X}>" for b in range(256)] if model == "llama" else list(BYTE_TO_CHAR.values())
    extra = {"scores": [0.0] * 256} if model == "llama" else {"pre": "gpt-2", "merges": ["a b"]}
    path = write_vocabulary(tmp_path / "v.gguf", model, letters, **extra, **keys, **ids)
    tokenizer = read(path)
    with LlamaVocab(path) as llama:
        assert assert_same_ids(tokenizer, llama, ["", "ab", " a b "]) == 12
        around = tokenizer.encode("ab")
        for remove in (True, False):
            assert tokenizer.decode_bytes(around, remove_special=remove) == llama.decode(around, remove, False)


def test_character_classes_of_every_code_point() -> None:
    source = (llama_cpp_source() / "src" / "unicode-data.cpp").read_text("utf-8")
    flags_text, spaces_text = (source[source.index(name) :].split("};")[0] for name in ("unicode_ranges_flags", "unicode_set_whitespace"))
    ranges = [(int(a, 16), int(b, 16)) for a, b in re.findall(r"\{0x(\w+), 0x(\w+)\}", flags_text)]
    byte_of_flag = {0x02: "N", 0x04: "L", 0x10: "M", 0x20: "P", 0x40: "S", 0x80: "C"}
    expected = np.full(0x110000, OTHER, np.uint8)
    for (start, flag), (end, _) in pairwise(ranges):
        expected[start:end] = CLASS_BYTE[byte_of_flag[flag]] if flag in byte_of_flag else OTHER
    expected[[int(c, 16) for c in re.findall(r"0x(\w+)", spaces_text)]] = CLASS_BYTE["W"]
    assert len(ranges) > 2000
    for first, last in HAN:
        block = expected[first : last + 1]
        block[:] = np.where(block == CLASS_BYTE["L"], CLASS_BYTE["H"], CLASS_BYTE["h"])
    np.testing.assert_array_equal(classes(), expected)
    expected[:0x80] = np.arange(0x80)
    np.testing.assert_array_equal(class_table(), expected)


def test_lower_case_and_base_letter_of_every_code_point() -> None:
    source = (llama_cpp_source() / "src" / "unicode-data.cpp").read_text("utf-8")
    lower_text, nfd_text = (source[source.index(name) :].split("};")[0] for name in ("unicode_map_lowercase", "unicode_ranges_nfd"))
    lower = {int(a, 16): int(b, 16) for a, b in re.findall(r"\{0x(\w+), 0x(\w+)\}", lower_text)}
    assert len(lower) > 1400
    assert lower_case() == lower
    ranges = [tuple(int(x, 16) for x in item) for item in re.findall(r"\{0x(\w+), 0x(\w+), 0x(\w+)\}", nfd_text)]
    base = {code: to for first, last, to in ranges for code in range(first, last + 1)}
    assert len(base) > 13_000
    assert all(ord(without_accents(chr(c))) == base.get(c, c) for c in range(0x110000) if not 0xD800 <= c < 0xE000)


def save_tokenizer(folder: Path, kind: str) -> None:
    """A trained tokenizer.json of the byte-level or of the SentencePiece kind, with BOS, special and added tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=kind == "spm", unk_token="<unk>" if kind == "spm" else None))
    byte_tokens = [f"<0x{b:02X}>" for b in range(256) if kind == "spm"]
    special = ["<unk>", "<s>", "</s>", *byte_tokens]
    alphabet: list[str] = []
    if kind == "spm":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(steps)
    else:
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = list(BYTE_TO_CHAR.values())
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["the cat sat on the mat, and the hat's that", "Once upon a time"] * 20, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_tokens([tokenizers.AddedToken("<tool>", normalized=False)])
    saved = json.loads(tokenizer.to_str())
    saved["added_tokens"] = [t for t in saved["added_tokens"] if t["content"] not in byte_tokens]  # plain tokens, as in Llama's file
    (folder / "tokenizer.json").write_text(json.dumps(saved), "utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


@pytest.mark.parametrize("kind", ["bytes", "spm"])
def test_tokenizer_json_as_transformers_reads_it(kind: str, tmp_path: Path) -> None:
    save_tokenizer(tmp_path, kind)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ours = from_source(cast(Source, SimpleNamespace(path=tmp_path, format="safetensors", metadata={})))
    assert (ours.bos_id, ours.eos_id, ours.n_vocab) == (theirs.bos_token_id, theirs.eos_token_id, len(theirs))
    texts = list(random_texts(300, 5, ["the", " cat", "<s>", "<tool>", "Once"]))
    assert len(texts) == 300
    for text in texts:
        for add_special in (True, False):
            expected = theirs.encode(text, add_special_tokens=add_special)
            assert ours.encode(text, add_special, parse_special=True) == expected, text
            decoded = ours.decode(expected)  # after BOS the first space stays, as in llama.cpp
            decoded = decoded.removeprefix(" ") if kind == "spm" and expected[:1] == [ours.bos_id] else decoded
            assert decoded == theirs.decode(expected, skip_special_tokens=True), text
            if "<s>" not in text:
                assert ours.encode(text, add_special) == expected, text
