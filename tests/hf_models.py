"""Small Hugging Face models with random weights of a sensible size, saved as a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 288,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}


def make_hf(folder: Path, arch: str = "llama", seed: int = 0, **config: Any) -> PreTrainedModel:
    """Save a model to the folder and return it, in float32 with eager attention.  Weights have variance 1/fan-in, so that
    activations stay near 1 and attention is not uniform.  config: over SHAPE; None leaves the key out."""
    given = {key: value for key, value in (SHAPE | config).items() if value is not None}
    config_class, model_class = CLASSES[arch]
    model = model_class._from_config(config_class(**given), attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim == 2:
                p.copy_(noise if "embed_tokens" in name else noise * p.shape[1] ** -0.5)
            else:
                p.copy_(noise * 0.5 if name.endswith("bias") else 1 + noise * 0.2)
    model.save_pretrained(folder)
    return model
