"""A Hugging Face folder quantized here, against llama.cpp's converter and then its quantizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers

from quantscope.errors import VocabularyError
from quantscope.remedy.export import export
from quantscope.remedy.folder import SAMPLE
from quantscope.remedy.original import original
from quantscope.remedy.recipe_file import Recipe
from quantscope.remedy.types import choose_types
from quantscope.sources.gguf import open_gguf
from quantscope.sources.resolve import open_source
from quantscope.tokenizers import from_source
from quantscope.weights import Weights
from tests.hf_models import make_hf
from tests.oracle.llama_quant import quantized_types
from tests.oracle.llama_vocab import LlamaVocab
from tests.oracle.test_converter import CASES, N_VOCAB, convert, vocabulary

pytestmark = pytest.mark.long

__all__ = ["vocabulary"]
OURS = ("quantscope.", "GGUF.")
SETTINGS = {
    "add_bos_token": True,
    "bos_token": "<s>",
    "eos_token": {"content": "</s>"},
    "chat_template": "{{ messages }}",
    "added_tokens_decoder": {
        "1": {"content": "<s>", "special": True},
        "2": {"content": "</s>", "special": True},
        str(N_VOCAB - 2): {"content": "<|tool|>", "special": False},
        str(N_VOCAB - 1): {"content": "a▁word", "special": False},
    },
}
PATTERNS = {  # of published tokenizer.json files
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}


def quantized(folder: Path, out: Path, preset: str) -> Path:
    model = original(open_source(folder))
    choice = choose_types(model, Recipe(preset))
    assert choice.notes == ()
    return export(model, out, choice.types, choice.file_type).path


def contents(path: Path) -> dict[str, Any]:
    """Key → (types, value), by the gguf package."""
    fields = gguf.GGUFReader(path).fields
    return {key: (field.types, field.contents()) for key, field in fields.items() if not key.startswith(OURS)}


@pytest.mark.parametrize("case", CASES)
def test_the_same_file_as_converter_and_quantizer(case: str, vocabulary: bytes, tmp_path: Path) -> None:
    arch, config = CASES[case]
    folder = tmp_path / "Some-Model-1B-Instruct"
    model = make_hf(folder, arch, seed=len(case), vocab_size=N_VOCAB, **config)
    model.save_pretrained(folder, max_shard_size="50KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert len(list(folder.glob("*.safetensors"))) > 3
    (folder / "tokenizer.model").write_bytes(vocabulary)
    (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS))
    convert(folder, tmp_path / "f32.gguf")
    assert quantized_types(tmp_path / "f32.gguf", tmp_path / "theirs.gguf", "Q4_1") is not None
    quantized(folder, tmp_path / "ours.gguf", "Q4_1")
    ours, theirs = open_gguf(tmp_path / "ours.gguf"), open_gguf(tmp_path / "theirs.gguf")
    assert ours.tensors == theirs.tensors
    assert list(ours.tensors) == list(theirs.tensors)
    assert [n for n in theirs.tensors if theirs.raw(n).tobytes() != ours.raw(n).tobytes()] == []
    assert contents(tmp_path / "ours.gguf") == contents(tmp_path / "theirs.gguf")


def test_a_window_that_a_gguf_file_lacks(vocabulary: bytes, tmp_path: Path) -> None:
    """Mistral 7B v0.1: it bounds what is computed here, not the context that the converter writes."""
    folder = tmp_path / "Some-Model-1B"
    make_hf(folder, "llama", vocab_size=N_VOCAB)
    config = json.loads((folder / "config.json").read_text())
    changed = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 16}
    (folder / "config.json").write_text(json.dumps(config | changed))
    (folder / "tokenizer.model").write_bytes(vocabulary)
    (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS))
    convert(folder, tmp_path / "f32.gguf")
    quantized(folder, tmp_path / "ours.gguf", "F32")
    theirs, ours = contents(tmp_path / "f32.gguf"), contents(tmp_path / "ours.gguf")
    assert theirs["llama.context_length"] == ours["llama.context_length"]
    assert ours["llama.context_length"][1] > Weights(open_source(folder)).config.n_ctx == 16
    assert theirs.keys() - ours.keys() == set()


def byte_level(folder: Path, pattern: str, ignore_merges: bool = False, vocab_size: int = 400) -> tokenizers.Tokenizer:
    """A tokenizer.json of byte-level BPE, trained on the spot."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=ignore_merges))
    pre = tokenizers.pre_tokenizers
    split = pre.Split(tokenizers.Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator([SAMPLE] * 3 + ["one two three 2024 12345 ''' ... !!! the then there"] * 20, trainer)
    tokenizer.add_special_tokens(["<|begin|>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


@pytest.mark.parametrize("pre", PATTERNS)
def test_a_byte_level_tokenizer_in_llama_cpp(pre: str, tmp_path: Path) -> None:
    """llama.cpp cuts texts with the new file's vocabulary as the folder's own tokenizer does."""
    folder, out = tmp_path / "hf", tmp_path / "m.gguf"
    make_hf(folder, "qwen3", vocab_size=420)
    own = byte_level(folder, PATTERNS[pre], ignore_merges=pre == "llama-bpe")
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    quantized(folder, out, "Q8_0")
    assert open_gguf(out).metadata["tokenizer.ggml.pre"] == pre
    texts = [SAMPLE, "It's 1234567 o'clock, WE'LL  see\n\n\n the  end<|im_end|>", "übermäßig\t\t12 中文 🙂"]
    with LlamaVocab(out) as llama:
        for text in texts:
            wanted = own.encode(text, add_special_tokens=False).ids
            assert llama.encode(text, add_special=False, parse_special=True) == wanted
            assert from_source(open_source(out)).encode(text, add_special=False, parse_special=True) == wanted
    tokens = open_gguf(out).metadata["tokenizer.ggml.tokens"]
    assert len(tokens) == 420
    assert tokens[419] == "[PAD419]"


def test_pre_tokenizers_that_cut_alike_are_told_apart(tmp_path: Path) -> None:
    """Llama 3 takes a word that is a token as it is; DBRX, with the same words, merges it from its letters."""
    make_hf(tmp_path, "llama", vocab_size=420)
    byte_level(tmp_path, PATTERNS["llama-bpe"])
    assert open_gguf(quantized(tmp_path, tmp_path / "m.gguf", "Q8_0")).metadata["tokenizer.ggml.pre"] == "dbrx"


def test_tokenizers_that_a_gguf_file_cannot_be_given(tmp_path: Path) -> None:
    make_hf(tmp_path, "llama", vocab_size=420)
    with pytest.raises(VocabularyError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        original(open_source(tmp_path))
    byte_level(tmp_path, r"[a-m]+|[^a-m]+")
    with pytest.raises(VocabularyError, match=r"none of the known pre-tokenizers.*convert_hf_to_gguf\.py"):
        original(open_source(tmp_path))
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(VocabularyError, match=r"no byte-level BPE.*convert_hf_to_gguf\.py"):
        original(open_source(tmp_path))
