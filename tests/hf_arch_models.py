"""A tiny Hugging Face model of every ``model_type`` of ``arch.names``, with random weights, saved as a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 288,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
HEADS: dict[str, Any] = SIZES | {"head_dim": 16}
WINDOW: dict[str, Any] = HEADS | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
GRANITE: dict[str, Any] = SIZES | {"embedding_multiplier": 6.0, "residual_multiplier": 0.4} | {
    "logits_scaling": 3.0,
    "attention_multiplier": 0.2,
}  # fmt: skip
MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
LOCAL: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", SIZES | LOCAL),
    "qwen2_moe": ("qwen2_moe", SIZES | MOE | {"moe_intermediate_size": 48, "shared_expert_intermediate_size": 80}),
    "qwen3_moe": ("qwen3_moe", HEADS | MOE | {"moe_intermediate_size": 48, "norm_topk_prob": True}),
    "olmo": ("olmo", SIZES | {"clip_qkv": 0.7}),
    "olmo2": ("olmo2", SIZES),
    "olmoe": ("olmoe", SIZES | MOE),
    "granite": ("granite", GRANITE),
    "granitemoe": ("granitemoe", GRANITE | LOCAL),
    "smollm3": ("smollm3", SIZES | {"no_rope_layers": [1, 0]}),
    "arcee": ("arcee", SIZES),
    "ernie4_5": ("ernie4_5", HEADS),
    "seed_oss": ("seed_oss", HEADS),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", HEADS),
    "exaone4": ("exaone4", WINDOW),
    "gemma": ("gemma", HEADS),
    "gemma2": ("gemma2", WINDOW | {"query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5}),
    "gemma3_text": ("gemma3_text", WINDOW | {"query_pre_attn_scalar": 24}),
    "glm4": ("glm4", HEADS),
    "phi": ("phi", SIZES),
    "phi3": ("phi3", SIZES),
    "starcoder2": ("starcoder2", SIZES),
    "stablelm": ("stablelm", SIZES),
    "stablelm, parallel": ("stablelm", SIZES | {"use_parallel_residual": True, "use_qkv_bias": True}),
    "nemotron": ("nemotron", SIZES),
    "llama": ("llama", SIZES),
    "mistral": ("mistral", SIZES),
    "qwen2": ("qwen2", SIZES),
    "qwen3": ("qwen3", SIZES),
    "cohere": ("cohere", SIZES),
    "cohere2": ("cohere2", WINDOW),
    "gpt2": ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 288, "n_positions": 512}),
    "gpt_neox": ("gpt_neox", {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}),
    "gpt_neox, in turn": ("gpt_neox", {k: v for k, v in SIZES.items() if k != "num_key_value_heads"} | {"use_parallel_residual": False}),
    "bloom": ("bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 288}),
}
LESS_ONE = ("gemma", "nemotron")  # their norms have a weight that 1 is added to


def make_hf_arch(folder: Path, case: str, seed: int = 0) -> PreTrainedModel:
    """Save a model to the folder and return it, in float32 with eager attention; matrices have variance 1/fan-in."""
    model_type, sizes = CASES[case]
    config = AutoConfig.for_model(model_type, **sizes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_(noise if any(part in name for part in ("embed", "wte", "wpe")) else noise * p.shape[-1] ** -0.5)
            elif name.endswith("bias"):
                p.copy_(noise * 0.5)
            else:
                p.copy_(noise * 0.2 + (0 if model_type.startswith(LESS_ONE) else 1))
    model.save_pretrained(folder)
    return model
