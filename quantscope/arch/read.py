"""A source's metadata → ModelConfig: GGUF key-value pairs, or the config.json of a Hugging Face folder."""

from __future__ import annotations

from quantscope.arch.config import ModelConfig
from quantscope.arch.gguf_keys import config_from_gguf
from quantscope.arch.hf_keys import config_from_hf
from quantscope.sources.base import Source


def read_config(source: Source) -> ModelConfig:
    """The model's configuration.

    Raises UnsupportedArchitectureError, UnsupportedFeatureError (a key that changes the forward and is not implemented),
    CorruptFileError (a key that is missing or contradicts another) and MissingTensorError (no embedding).
    """
    return config_from_gguf(source) if source.format == "gguf" else config_from_hf(source)
