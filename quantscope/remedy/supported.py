"""Which models the remedies can look through: predictions and corrections know each matrix as one product a token."""

from __future__ import annotations

from quantscope.errors import UnsupportedFeatureError
from quantscope.sources.base import show
from quantscope.weights import Weights

WITH_HEADER = ("llama", "qwen2", "qwen3")


def check_remediable(weights: Weights, what: str) -> None:
    """Raise UnsupportedFeatureError, naming the feature, for a model whose products ``what`` does not know."""
    config = weights.config
    found = "latent attention" if config.latent is not None else None
    if found is not None:
        raise UnsupportedFeatureError(
            f"{show(weights.source.path)}: {config.arch} has {found}, expected a model whose layers are products of the stream, as those "
            f"of llama, qwen2 and qwen3. {what} is not implemented for it; `quantscope study` and `quantscope quantize --type` are."
        )


def check_convertible(weights: Weights) -> None:
    """Raise UnsupportedFeatureError for a Hugging Face folder whose GGUF header is not written here."""
    if weights.config.arch not in WITH_HEADER:
        raise UnsupportedFeatureError(
            f"{show(weights.source.path)}: quantize writes the GGUF header of {', '.join(WITH_HEADER)}, found {weights.config.arch}. "
            f"llama.cpp's converter knows it: `python convert_hf_to_gguf.py {show(weights.source.path)} --outfile MODEL.gguf`, then "
            f"quantize MODEL.gguf."
        )
