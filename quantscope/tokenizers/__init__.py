"""Text ↔ token ids, with the vocabulary a model file carries."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from quantscope.sources.base import Source
from quantscope.tokenizers.base import Tokenizer, check_ids
from quantscope.tokenizers.ggml import GgmlTokenizer
from quantscope.tokenizers.vocabulary import Vocabulary, gguf_vocabulary

__all__ = ["Tokenizer", "check_ids", "from_source"]


def from_source(source: Source) -> Tokenizer:
    """The tokenizer of a GGUF file (its own vocabulary) or of a Hugging Face folder (tokenizer.json, else tokenizer.model).

    Costs milliseconds; the encoder is built by the first ``encode``.
    Raises VocabularyError when there is no vocabulary or one of an unknown kind: token ids must then be given instead of text.
    """
    if source.format == "gguf":
        return GgmlTokenizer(gguf_vocabulary(source.path, source.metadata), _encoder)
    from quantscope.tokenizers.huggingface import folder_tokenizer  # pulls in two packages that a GGUF file does not need

    return folder_tokenizer(Path(source.path), source.metadata)


def _encoder(vocabulary: Vocabulary) -> Callable[[str], list[int]]:
    """The package that does the merging is imported when it is needed."""
    if vocabulary.model == "llama":
        from quantscope.tokenizers.spm import SpmEncoder

        return SpmEncoder(vocabulary)
    if vocabulary.model == "bert":
        from quantscope.tokenizers.wordpiece import WordPieceEncoder

        return WordPieceEncoder(vocabulary)
    if vocabulary.model == "t5":
        from quantscope.tokenizers.unigram import UnigramEncoder

        return UnigramEncoder(vocabulary)
    from quantscope.tokenizers.bpe import BpeEncoder

    return BpeEncoder(vocabulary)
