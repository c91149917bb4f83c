"""A Hugging Face folder as a model to quantize: its tensors in GGUF's layout, and the metadata that llama.cpp's converter would write.

``weights`` renames and reorders the tensors; the `gguf` package knows the keys and where a folder keeps special tokens, merges and the chat
template.  What is left is here: sizes, RoPE, the vocabulary, and the name of the pre-tokenizer.  The converter recognises that by a hash
of token ids; here it is the one that cuts a text into the same words as the folder's own tokenizer does.

Source: conversion/base.py, llama.py and qwen.py of llama.cpp.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import numpy as np
import tokenizers

from quantscope.arch.config import ModelConfig
from quantscope.errors import VocabularyError
from quantscope.qtypes import QTYPES
from quantscope.quants import Floats
from quantscope.recipes import ModelFacts
from quantscope.remedy.gguf_file import stored_pairs
from quantscope.remedy.supported import check_convertible
from quantscope.sources.base import Bytes, RawTensor, Source, show
from quantscope.sources.files import read_json_object
from quantscope.sources.gguf import DEFAULT_ALIGNMENT, open_gguf
from quantscope.tokenizers.huggingface import JsonTokenizer, added_tokens, folder_tokenizer, model_vocabulary
from quantscope.tokenizers.pretokenize import PRE_TOKENIZERS, split
from quantscope.tokenizers.vocabulary import Kind, Vocabulary
from quantscope.weights import Weights
from quantscope.wording import count

SETTINGS = "tokenizer_config.json"
ADDED_SCORE = -1000.0
SKIPPED = (".rotary_emb.inv_freq", ".attention.masked_bias")  # buffers of old checkpoints, computed anew by every engine
# Names that many models use come before others that cut this text alike.
LIKELY = ("llama-bpe", "qwen2", "gpt-2", "smollm", "tekken", "deepseek-llm", "deepseek-coder", "deepseek-v3")
SAMPLE = (
    "Hello, World!  It's 3 o'clock; WE'LL see:\n\n\t1 12 123 1234 12345 1234567 3.14159, 50% of $9.99 (x_1 + y-2) == z[0];\r\n"
    "    def f(a, b):   # comment\n\n\n  \tRe-enter https://example.org/a?b=c&d#e — “quotes” … naïve café ÅÉ ﬁ ½ ²\u00a0\u2003 "
    "Привет, мир! Γειά σου. שלום עולם مرحبا بالعالم १२३ हिन्दी ไทย ខ្មែរ 中文字符，日本語のテキスト。한국어 🙂👩‍👩‍👧🏽 e\u0301 "
    "I'M you'Re they'd  end   "
)


class FolderOriginal:
    """See ``original.Original``.  Raises what ``Weights`` raises, and VocabularyError for a tokenizer a GGUF file cannot be given here."""

    def __init__(self, source: Source) -> None:
        self.source: Source = source
        self.alignment = DEFAULT_ALIGNMENT
        self._weights = w = Weights(source)
        check_convertible(w)
        self.facts = ModelFacts(w.config.arch, w.config.n_layer, w.config.n_head, w.config.n_head_kv)
        self.tensors: Mapping[str, RawTensor] = {name: RawTensor(name, QTYPES["F32"], w.shape(name)) for name in w.names()}
        self._pairs = _metadata(source, w.config, sum(t.n_elements for t in self.tensors.values()))
        lost = [name for name in w.unused if not name.endswith(SKIPPED)]
        self.notes: tuple[str, ...] = (
            (f"{count(len(lost), 'tensor')} of {show(source.path)} will not be in the new file: {', '.join(lost[:3])}.",) if lost else ()
        )

    def pairs(self) -> dict[str, bytes]:
        return dict(self._pairs)

    def raw(self, name: str, rows: slice) -> Bytes:
        return self.values(name, rows).reshape(-1).view(np.uint8)

    def values(self, name: str, rows: slice) -> Floats:
        shape = self.tensors[name].shape
        part = self._weights.band(name, rows) if len(shape) > 1 else self._weights.get(name)
        values: Floats = part.reshape(-1, shape[-1]).numpy()
        return np.ascontiguousarray(values)

    def will_need(self, name: str) -> None:
        self._weights.will_need([name])

    def let_go(self, name: str) -> None:
        self._weights.let_go([name])


def _metadata(source: Source, config: ModelConfig, n_weights: int) -> dict[str, bytes]:
    """Every key, through a file without tensors that the gguf package writes."""
    with TemporaryDirectory(prefix="quantscope-") as folder:
        path = Path(folder) / "metadata.gguf"
        writer = gguf.GGUFWriter(path, config.arch)
        level = logging.getLogger("gguf").level
        logging.getLogger("gguf").setLevel(logging.ERROR)  # it says what it leaves out, of roles that models rarely have
        try:
            _add_names(writer, source.path, n_weights)
            _add_sizes(writer, config, source.metadata)
            _add_rope(writer, config, source.metadata)
            _add_vocabulary(writer, source.path, source.metadata)
        finally:
            logging.getLogger("gguf").setLevel(level)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        made = open_gguf(path)
        pairs = stored_pairs(made)
        made.close()
    return pairs


def _add_names(writer: Any, folder: Path, n_weights: int) -> None:
    """general.*: what the model card says, else the folder's name."""
    found = gguf.Metadata.load(None, folder, None, n_weights)
    found.name = found.name or folder.resolve().name
    found.size_label = found.size_label or gguf.size_label(n_weights, n_weights, 0, 0)
    writer.add_type(gguf.GGUFType.MODEL)
    found.set_gguf_meta_model(writer)


def _add_sizes(writer: Any, c: ModelConfig, given: Mapping[str, Any]) -> None:
    writer.add_block_count(c.n_layer)
    writer.add_context_length(int(given.get("max_position_embeddings") or c.n_ctx))  # a window that the file cannot say bounds the latter
    writer.add_embedding_length(c.n_embd)
    writer.add_feed_forward_length(c.n_ff)
    writer.add_head_count(c.n_head)
    writer.add_head_count_kv(c.n_head_kv)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    if given.get("head_dim") is not None:
        writer.add_key_length(c.head_dim)
        writer.add_value_length(c.head_dim)
    if c.arch == "llama":
        writer.add_vocab_size(c.n_vocab)
        writer.add_rope_dimension_count(c.rope.dim)


def _add_rope(writer: Any, c: ModelConfig, given: Mapping[str, Any]) -> None:
    """Base frequency and scaling; Llama 3's is a tensor of its own."""
    writer.add_rope_freq_base(c.rope.theta)
    if c.rope.scaling == "none":
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType(c.rope.scaling))
    writer.add_rope_scaling_factor(c.rope.factor)
    if c.rope.scaling != "yarn":
        return
    writer.add_rope_scaling_orig_ctx_len(c.rope.n_ctx_orig)
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    for key, add in (
        ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
        ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
        ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
    ):
        if rope.get(key) is not None:
            add(float(rope[key]))


def _add_vocabulary(writer: Any, folder: Path, config: Mapping[str, Any]) -> None:
    settings = read_json_object(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
    folder_tokenizer(folder, config)  # says so when there is none
    by_pieces = (folder / "tokenizer.model").is_file()
    special = gguf.SpecialVocab(folder, load_merges=not by_pieces, n_vocab=config.get("vocab_size"))
    if by_pieces:
        v = _pieces(folder, settings, config)
        writer.add_token_scores(v.scores.tolist())
    else:
        v = _bytes(folder, special.merges, settings, config)
    writer.add_tokenizer_model(v.model)
    writer.add_tokenizer_pre(v.pre)
    writer.add_token_list([token.encode("utf-8", "surrogateescape") for token in v.stored_tokens])
    writer.add_token_types([int(kind) for kind in v.stored_kinds])
    if settings.get("add_prefix_space") is not None and config.get("model_type") not in ("qwen2", "qwen3"):
        writer.add_add_space_prefix(bool(settings["add_prefix_space"]))
    special.add_to_gguf(writer, quiet=True)


def _pieces(folder: Path, settings: Mapping[str, Any], config: Mapping[str, Any]) -> Vocabulary:
    """tokenizer.model: SentencePiece with scores."""
    v = model_vocabulary(folder, settings, config)
    scores, kinds = v.scores.copy(), v.stored_kinds.copy()
    for i, (token, kind) in added_tokens(folder, settings).items():
        if i < len(scores):
            scores[i], kinds[i] = ADDED_SCORE, _kind(token, kind)
    return replace(v, pre="default", scores=scores, stored_kinds=kinds)


def _bytes(folder: Path, merges: list[str], settings: Mapping[str, Any], config: Mapping[str, Any]) -> Vocabulary:
    """tokenizer.json of byte-level BPE, filled up to the size in config.json; VocabularyError for any other kind."""
    own = JsonTokenizer(folder / "tokenizer.json", settings, config)
    v = own.vocabulary
    if v.model != "gpt2" or not merges:
        raise _no_vocabulary(folder, "tokenizer.json is no byte-level BPE and there is no tokenizer.model beside it")
    n = max(len(v.stored_tokens), int(config.get("vocab_size") or 0))
    stored = [*v.stored_tokens, *[""] * (n - len(v.stored_tokens))]
    kinds = np.full(n, Kind.UNUSED, np.int32)
    kinds[: len(v.stored_kinds)] = [_kind(t, Kind(k)) for t, k in zip(v.stored_tokens, v.stored_kinds, strict=True)]
    tokens = [t if k != Kind.UNUSED else f"[PAD{i}]" for i, (t, k) in enumerate(zip(stored, kinds, strict=True))]
    return replace(v, pre=_pre_tokenizer(folder), stored_tokens=tokens, stored_kinds=kinds)


def _pre_tokenizer(folder: Path) -> str:
    """The name of the one that cuts SAMPLE into the same words as tokenizer.json does, and treats whole words alike."""
    cutter = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).pre_tokenizer
    words = [SAMPLE[a:b] for _, (a, b) in cutter.pre_tokenize_str(SAMPLE)] if cutter else [SAMPLE]
    whole_words = bool(read_json_object(folder / "tokenizer.json")["model"].get("ignore_merges", False))
    for name in dict.fromkeys((*LIKELY, *PRE_TOKENIZERS)):
        row = PRE_TOKENIZERS[name]
        if not row.raw and row.ignore_merges == whole_words and split(SAMPLE, row) == words:
            return name
    raise _no_vocabulary(folder, "tokenizer.json cuts words in a way that none of the known pre-tokenizers does")


def _kind(token: str, kind: Kind) -> Kind:
    """Added tokens that look special are control tokens, whatever the folder says."""
    pointed = any(token.startswith(f"<{bar}") and token.endswith(f"{bar}>") for bar in "|｜")
    looks = pointed or token in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or (token.startswith("<unused") and token.endswith(">"))
    return Kind.CONTROL if kind == Kind.USER_DEFINED and looks else kind


def _no_vocabulary(folder: Path, problem: str) -> VocabularyError:
    path = show(folder)
    return VocabularyError(
        f"{path}: {problem}, expected a tokenizer.model or a byte-level tokenizer.json that a GGUF file can hold. llama.cpp's converter "
        f"knows more: `python convert_hf_to_gguf.py {path} --outfile MODEL.gguf`, then quantize MODEL.gguf."
    )
