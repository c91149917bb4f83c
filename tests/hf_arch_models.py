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
ROUTED: dict[str, Any] = HEADS | {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1} | {
    "moe_intermediate_size": 48,
    "first_k_dense_replace": 1,
}  # fmt: skip
LATENT: dict[str, Any] = {"num_key_value_heads": 4, "head_dim": 8, "kv_lora_rank": 32, "q_lora_rank": 24, "v_head_dim": 12} | {
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
}  # fmt: skip
YARN: dict[str, Any] = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
DEEPSEEK_YARN: dict[str, Any] = {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.9}}
LONGROPE: dict[str, Any] = {"rope_type": "longrope", "rope_theta": 10000.0} | {
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.5 + 0.5 * i for i in range(8)],
}  # fmt: skip
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
    "gpt_oss": ("gpt_oss", WINDOW | LOCAL | {"rope_parameters": YARN | {"truncate": False}}),
    "ministral3": ("ministral3", HEADS | {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3}}),
    "olmo3": ("olmo3", SIZES | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}),
    "dots1": ("dots1", ROUTED | {"routed_scaling_factor": 2.5, "norm_topk_prob": True}),
    "glm4_moe": ("glm4_moe", ROUTED | {"use_qk_norm": True, "attention_bias": True, "routed_scaling_factor": 1.5}),
    "glm4_moe, groups": ("glm4_moe", ROUTED | {"n_routed_experts": 8, "n_group": 4, "topk_group": 2}),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        SIZES | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 48, "moe_num_shared_experts": 1, "moe_layer_start_index": 1},
    ),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", HEADS | {"num_experts": 4, "moe_topk": 2}),
    "exaone_moe": (
        "exaone_moe",
        WINDOW | MOE | {"moe_intermediate_size": 48, "num_shared_experts": 1, "mlp_layer_types": ["dense", "sparse"]},
    ),
    "deepseek_v2": ("deepseek_v2", ROUTED | LATENT | DEEPSEEK_YARN),
    "deepseek_v2, one q": ("deepseek_v2", ROUTED | LATENT | {"q_lora_rank": None, "routed_scaling_factor": 2.0}),
    "deepseek_v2, groups": (
        "deepseek_v2",
        ROUTED | LATENT | {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"},
    ),
    "deepseek_v3": ("deepseek_v3", ROUTED | LATENT | DEEPSEEK_YARN | {"n_routed_experts": 8, "n_group": 4, "topk_group": 2}),
    "minicpm3": ("minicpm3", HEADS | LATENT | {"rms_norm_eps": 1e-6}),  # the norms of its latent vectors have 1e-6 whatever it says
    "gpt_bigcode": ("gpt_bigcode", {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 288, "n_positions": 512}),
    "gpt_bigcode, many": (
        "gpt_bigcode",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 288, "n_positions": 512} | {"multi_query": False},
    ),
    "mpt": ("mpt", {"d_model": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 288, "max_seq_len": 512}),
    "falcon": ("falcon", {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 288}),
    "falcon, many": (
        "falcon",
        {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 288} | {"multi_query": False},
    ),
    "falcon, two norms": (
        "falcon",
        {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 288}
        | {"new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "hunyuan_v1_dense, alpha": (
        "hunyuan_v1_dense",
        HEADS | {"rope_parameters": {"rope_type": "dynamic", "alpha": 100.0, "rope_theta": 10000.0, "factor": 1.0}},
    ),
    "phi3, longrope": ("phi3", SIZES | {"original_max_position_embeddings": 64, "rope_parameters": LONGROPE}),
    "phi3, longrope, beyond": ("phi3", SIZES | {"original_max_position_embeddings": 32, "rope_parameters": LONGROPE}),
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
            elif name.endswith(("bias", "sinks")):
                p.copy_(noise * 0.5)
            else:
                p.copy_(noise * 0.2 + (0 if model_type.startswith(LESS_ONE) else 1))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
    model.save_pretrained(folder)
    return model
