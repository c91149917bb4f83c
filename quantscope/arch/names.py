"""Hugging Face tensor names ↔ GGUF tensor names: one row for each ``model_type``.  The only place that knows HF names.

Source: the checkpoints' own module paths (Transformers' modeling_*.py), and what llama.cpp's converters make of them (``conversion/``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from quantscope.sources.base import Source

# How a tensor of the folder differs from the canonical one: a norm's weight is stored less 1; a matrix is [in,out]; q, k and v of a
# key/value head follow one another; rows of q or k are in half-split order; a matrix is [in,out] and gate and up take turns in it.
Change: TypeAlias = Literal["less one", "transposed", "by head", "halves", "alternating"]

# GGUF stem → HF stem; ".weight" and ".bias" are the same on both sides.  A GGUF name with its ending → a whole HF name.
TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{e}.gate_proj",
    "ffn_up_exps": "mlp.experts.{e}.up_proj",
    "ffn_down_exps": "mlp.experts.{e}.down_proj",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}
MIXTRAL = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{e}.w1",
    "ffn_down_exps": "block_sparse_moe.experts.{e}.w2",
    "ffn_up_exps": "block_sparse_moe.experts.{e}.w3",
}
CORRECTION = {"exp_probs_b.bias": "mlp.gate.e_score_correction_bias"}
SHARED_EXPERTS = {f"ffn_{part}_shexp": f"mlp.shared_experts.{part}_proj" for part in ("gate", "up", "down")}
ROUTED = EXPERTS | SHARED_EXPERTS | CORRECTION
LATENT = {
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
}
GPT_OSS = {
    "attn_sinks.weight": "self_attn.sinks",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_gate_inp": "mlp.router",
    "ffn_gate_up_exps.weight": "mlp.experts.gate_up_proj",
    "ffn_gate_up_exps.bias": "mlp.experts.gate_up_proj_bias",
    "ffn_down_exps.weight": "mlp.experts.down_proj",
    "ffn_down_exps.bias": "mlp.experts.down_proj_bias",
}
POST_NORMS = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
SANDWICH = POST_NORMS | {"ffn_norm": "pre_feedforward_layernorm"}
FULLY = {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}
FUSED = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
HALVES: Mapping[str, Change] = {"attn_q": "halves", "attn_k": "halves"}
SIGMOID = {"scoring_func": "sigmoid"}
SCALED = {"scales_embeddings": True}  # by the root of their width
GEMMA_NORMS = ("output_norm", "attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm", "attn_q_norm", "attn_k_norm")


@dataclass(frozen=True)
class HfNames:
    """The names of one ``model_type``.  {e} in a stem is the number of an expert.

    changes: GGUF stem → how its tensor differs.  given: what a config.json of this type means beside ``hf_defaults``.
    inside: the objects of a config.json whose keys count as its own.
    """

    arch: str  # a key of ``arch.table.ARCHS``
    layer: Mapping[str, str] = field(default_factory=lambda: LAYER)
    top: Mapping[str, str] = field(default_factory=lambda: TOP)
    prefix: str = "model.layers."
    changes: Mapping[str, Change] = field(default_factory=dict)
    given: Mapping[str, Any] = field(default_factory=dict)
    inside: tuple[str, ...] = ()


def pattern(n: int) -> dict[str, Any]:
    """Every n-th layer sees everything where the file has no list of the layers."""
    return {"sliding_window_pattern": n}


def _without(names: Mapping[str, str], *stems: str) -> dict[str, str]:
    return {gguf: hf for gguf, hf in names.items() if gguf not in stems}


HF_TYPES: Mapping[str, HfNames] = {
    "llama": HfNames("llama", changes=HALVES),
    "mistral": HfNames("llama", changes=HALVES),
    "ministral3": HfNames("mistral3", changes=HALVES),
    "mixtral": HfNames("llama", LAYER | MIXTRAL, changes=HALVES),
    "qwen2": HfNames("qwen2"),
    "qwen3": HfNames("qwen3"),
    "qwen2_moe": HfNames("qwen2moe", LAYER | EXPERTS),
    "qwen3_moe": HfNames("qwen3moe", LAYER | EXPERTS),
    "olmo": HfNames("olmo", changes=HALVES, given={"rms_norm_eps": 1e-5}),
    "olmo2": HfNames("olmo2", _without(LAYER, "attn_norm", "ffn_norm") | POST_NORMS),
    "olmo3": HfNames("olmo2", _without(LAYER, "attn_norm", "ffn_norm") | POST_NORMS, given=pattern(4)),
    "olmoe": HfNames("olmoe", LAYER | EXPERTS),
    "granite": HfNames("granite", changes=HALVES),
    "granitemoe": HfNames(
        "granitemoe",
        LAYER
        | {"ffn_gate_inp": "block_sparse_moe.router.layer", "ffn_gate_up_exps": "block_sparse_moe.input_linear"}
        | {"ffn_down_exps": "block_sparse_moe.output_linear"},
        changes=HALVES,
    ),
    "smollm3": HfNames("smollm3", changes=HALVES),
    "arcee": HfNames("arcee", changes=HALVES),
    "ernie4_5": HfNames("ernie4_5"),
    "ernie4_5_moe": HfNames("ernie4_5-moe", LAYER | ROUTED | {"exp_probs_b.bias": "mlp.moe_statics.e_score_correction_bias"}),
    "seed_oss": HfNames("seed_oss", _without(LAYER, "ffn_norm") | {"post_attention_norm": "post_attention_layernorm"}),
    "hunyuan_v1_dense": HfNames(
        "hunyuan-dense", LAYER | {"attn_q_norm": "self_attn.query_layernorm", "attn_k_norm": "self_attn.key_layernorm"}
    ),
    "hunyuan_v1_moe": HfNames(
        "hunyuan-moe",
        LAYER
        | EXPERTS
        | {"attn_q_norm": "self_attn.query_layernorm", "attn_k_norm": "self_attn.key_layernorm", "ffn_gate_inp": "mlp.gate.wg"}
        | {f"ffn_{part}_shexp": f"mlp.shared_mlp.{part}_proj" for part in ("gate", "up", "down")},
    ),
    "exaone_moe": HfNames("exaone-moe", LAYER | ROUTED | {"exp_probs_b.bias": "mlp.e_score_correction_bias"}, given=SIGMOID | pattern(4)),
    "exaone4": HfNames("exaone4", _without(LAYER, "attn_norm", "ffn_norm") | POST_NORMS, given=pattern(4)),
    "gemma": HfNames("gemma", changes=dict.fromkeys(GEMMA_NORMS, "less one"), given=SCALED),
    "gemma2": HfNames("gemma2", LAYER | SANDWICH, changes=dict.fromkeys(GEMMA_NORMS, "less one"), given=SCALED | pattern(2)),
    "gemma3_text": HfNames("gemma3", LAYER | SANDWICH, changes=dict.fromkeys(GEMMA_NORMS, "less one"), given=SCALED | pattern(6)),
    "glm4": HfNames(
        "glm4",
        _without(LAYER, "ffn_gate")
        | {"ffn_up": "mlp.gate_up_proj", "post_attention_norm": "post_self_attn_layernorm", "post_ffw_norm": "post_mlp_layernorm"},
    ),
    "glm4_moe": HfNames(
        "glm4moe", _without(LAYER, "ffn_norm") | ROUTED | {"post_attention_norm": "post_attention_layernorm"}, given=SIGMOID
    ),
    "gpt_oss": HfNames(
        "gpt-oss",
        _without(LAYER, "ffn_norm", "ffn_gate", "ffn_up", "ffn_down") | GPT_OSS,
        changes={"ffn_gate_up_exps": "alternating", "ffn_down_exps": "transposed"},
        given={"scoring_func": "softmax of the chosen", "norm_topk_prob": False} | pattern(2),
    ),
    "dots1": HfNames("dots1", LAYER | ROUTED, given=SIGMOID),
    "deepseek_v2": HfNames("deepseek2", _without(LAYER, "attn_k", "attn_v") | LATENT | ROUTED),
    "deepseek_v3": HfNames("deepseek2", _without(LAYER, "attn_k", "attn_v") | LATENT | ROUTED, given=SIGMOID),
    "minicpm3": HfNames("minicpm3", _without(LAYER, "attn_k", "attn_v") | LATENT),
    "phi": HfNames(
        "phi2",
        LAYER | {"attn_output": "self_attn.dense", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2"},
        TOP | {"output_norm": "model.final_layernorm"},
    ),
    "phi3": HfNames("phi3", _without(LAYER, "ffn_gate", "attn_q", "attn_k", "attn_v") | FUSED),
    "starcoder2": HfNames("starcoder2", LAYER | FULLY),
    "stablelm": HfNames("stablelm"),
    "nemotron": HfNames("nemotron", changes=dict.fromkeys(("output_norm", "attn_norm", "ffn_norm"), "less one")),
    "cohere": HfNames("command-r"),
    "cohere2": HfNames("cohere2", given=pattern(4)),
    "gpt2": HfNames(
        "gpt2",
        FULLY | {"attn_norm": "ln_1", "ffn_norm": "ln_2", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj"},
        {"token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f", "output": "lm_head"},
        "transformer.h.",
        dict.fromkeys(("attn_qkv", "attn_output", "ffn_up", "ffn_down"), "transposed"),
        {"n_ff_by_n_embd": 4},
    ),
    "gpt_bigcode": HfNames(
        "starcoder",
        FULLY | {"attn_norm": "ln_1", "ffn_norm": "ln_2", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj"},
        {"token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f", "output": "lm_head"},
        "transformer.h.",
        {"attn_qkv": "by head"},
        {"n_ff_by_n_embd": 4},
    ),
    "mpt": HfNames(
        "mpt",
        {
            "attn_norm": "norm_1",
            "ffn_norm": "norm_2",
            "attn_qkv": "attn.Wqkv",
            "attn_output": "attn.out_proj",
            "ffn_up": "ffn.up_proj",
            "ffn_down": "ffn.down_proj",
        },
        {"token_embd": "transformer.wte", "output_norm": "transformer.norm_f", "output": "lm_head"},
        "transformer.blocks.",
        given={"n_ff_by_n_embd": 4, "hidden_act": "gelu", "alibi_bias_max": 8},
        inside=("attn_config",),
    ),
    "falcon": HfNames(
        "falcon",
        {
            "attn_norm": "input_layernorm",
            "attn_norm.weight": "ln_mlp.weight",  # of the 40B model, which has two norms
            "attn_norm.bias": "ln_mlp.bias",
            "attn_norm_2": "ln_attn",
            "attn_qkv": "self_attention.query_key_value",
            "attn_output": "self_attention.dense",
            "ffn_up": "mlp.dense_h_to_4h",
            "ffn_down": "mlp.dense_4h_to_h",
        },
        {"token_embd": "transformer.word_embeddings", "output_norm": "transformer.ln_f", "output": "lm_head"},
        "transformer.h.",
        {"attn_qkv": "by head"},
        {"n_ff_by_n_embd": 4},
    ),
    "gpt_neox": HfNames(
        "gptneox",
        {
            "attn_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm",
            "attn_qkv": "attention.query_key_value",
            "attn_output": "attention.dense",
            "ffn_up": "mlp.dense_h_to_4h",
            "ffn_down": "mlp.dense_4h_to_h",
        },
        {"token_embd": "gpt_neox.embed_in", "output_norm": "gpt_neox.final_layer_norm", "output": "embed_out"},
        "gpt_neox.layers.",
        {"attn_qkv": "by head"},
    ),
    "bloom": HfNames(
        "bloom",
        {
            "attn_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm",
            "attn_qkv": "self_attention.query_key_value",
            "attn_output": "self_attention.dense",
            "ffn_up": "mlp.dense_h_to_4h",
            "ffn_down": "mlp.dense_4h_to_h",
        },
        {
            "token_embd": "transformer.word_embeddings",
            "token_embd_norm": "transformer.word_embeddings_layernorm",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        },
        "transformer.h.",
        {"attn_qkv": "by head"},
        {"alibi_bias": 8.0, "seq_length": 2048, "n_ff_by_n_embd": 4},
    ),
}
LLAMA = HF_TYPES["llama"]


def names_of(model_type: object) -> HfNames:
    """The names of a config.json's ``model_type``; Llama's where it is unknown."""
    return HF_TYPES.get(model_type, LLAMA) if isinstance(model_type, str) else LLAMA


def names_in(source: Source) -> HfNames:
    """The names of a source: those of its ``model_type``, without what comes before the layers where a model without its head was saved,
    as the published GPT-2, BLOOM and embedding models are.
    """
    names = names_of(source.metadata.get("model_type") if source.format == "safetensors" else None)
    embedding = f"{names.top['token_embd']}.weight"
    base = embedding.partition(".")[0] + "."
    if source.format == "gguf" or embedding in source.tensors or embedding.removeprefix(base) not in source.tensors:
        return names
    top = {gguf: hf.removeprefix(base) for gguf, hf in names.top.items()}
    return replace(names, top=top, prefix=names.prefix.removeprefix(base))


def to_gguf(hf_name: str, names: HfNames = LLAMA) -> str | None:
    """ "model.layers.3.self_attn.q_proj.weight" → "blk.3.attn_q.weight"; None for a name that has no counterpart."""
    found = expert_of(hf_name, names)
    return None if found is None else found[0]


def expert_of(hf_name: str, names: HfNames = LLAMA) -> tuple[str, int | None] | None:
    """(GGUF name, number of the expert whose part of that tensor it is), None for a name that has no counterpart."""
    stem, _, kind = hf_name.rpartition(".")
    for gguf, hf in names.top.items():
        if stem == hf:
            return f"{gguf}.{kind}", None
    found = re.fullmatch(re.escape(names.prefix) + r"(\d+)\.(.+)", hf_name)
    if found is None:
        return None
    general = re.sub(r"\.experts\.\d+\.", ".experts.{e}.", found[2])
    expert = re.search(r"\.experts\.(\d+)\.", found[2])
    local = next((gguf for gguf, hf in names.layer.items() if "." in gguf and hf == general), None) or next(
        (f"{gguf}.{kind}" for gguf, hf in names.layer.items() if f"{hf}.{kind}" == general), None
    )
    return None if local is None else (f"blk.{found[1]}.{local}", None if expert is None else int(expert[1]))


def to_hf(gguf_name: str, names: HfNames = LLAMA) -> str | None:
    """ "blk.3.attn_q.weight" → "model.layers.3.self_attn.q_proj.weight"; None for a name that has no counterpart."""
    stem, _, kind = gguf_name.rpartition(".")
    if stem in names.top:
        return f"{names.top[stem]}.{kind}"
    found = re.fullmatch(r"blk\.(\d+)\.(.+)", stem)
    if found is None:
        return None
    local = f"{names.layer[found[2]]}.{kind}" if found[2] in names.layer else names.layer.get(f"{found[2]}.{kind}")
    return None if local is None else f"{names.prefix}{found[1]}.{local.replace('{e}', '0')}"
