"""Which architectures there are: one ArchSpec row each.  A new one is a new row here and nothing else; ``arch.spec`` explains a row."""

from __future__ import annotations

from collections.abc import Mapping

from quantscope.arch.config import Block
from quantscope.arch.names import HF_TYPES
from quantscope.arch.spec import (
    ALL_BIASES,
    ATTENTION,
    BIASES,
    EXPERT_SCALES,
    EXPERTS,
    FFN_BIAS,
    FFN_SCALES,
    FUSED,
    GATED,
    LATENT,
    LATENT_KEYS,
    LAYER,
    LLAMA,
    LLAMA_KEYS,
    LLAMA_ROWS,
    MATRICES,
    MOE,
    MOE_KEYS,
    NORMS,
    NORMS_LN,
    ONE_NORM,
    ONE_NORM_LN,
    OUT_BIAS,
    POSITIONS,
    POST_NORMS,
    PROBS_BIAS,
    QK_NORM,
    QK_NORM_ALL,
    QK_NORM_EACH,
    QKV_BIAS,
    ROPE_FACTORS,
    ROPE_FREQS,
    ROUTING_KEYS,
    SCALE_KEYS,
    SEED,
    SHARED_COUNT,
    SHARED_GATE,
    SHARED_LENGTH,
    SINKS,
    SOFTCAP_KEYS,
    TOP,
    TOP_LN,
    UNGATED,
    WINDOW_KEYS,
    YARN_LOG,
    ArchSpec,
    TensorRow,
    baichuan,
    both,
    gemma,
    given,
    may,
    minicpm,
    need,
    not_every_fourth,
    shared_as_wide,
    split_experts,
    where_windowed,
    where_windowed_if_any,
    window,
)
from quantscope.errors import UnsupportedArchitectureError

__all__ = ["ARCHS", "ArchSpec", "TensorRow", "arch_of_hf_type", "arch_spec"]

LAYER_NORM = Block(norm="layer")
GELU = Block(norm="layer", activation="gelu")
PARALLEL_GELU = Block(norm="layer", activation="gelu", parallel=True, ffn_norm="")
QK_AFTER = Block(qk_norm="after")
FFN_NORM_IS_POST = Block(ffn_norm="post_attention_norm")  # the converter's name of the norm before the feed-forward
POST_FUSED = Block(attn_post_norm="post_attention_norm", ffn_post_norm="post_ffw_norm", fused=True)
POST_ONLY = Block(attn_norm="", ffn_norm="", attn_post_norm="post_attention_norm", ffn_post_norm="post_ffw_norm")
POST_GELU = Block(activation="gelu", attn_post_norm="post_attention_norm", ffn_post_norm="post_ffw_norm")
LEAD = "leading_dense_block_count"
ALIBI = "attention.max_alibi_bias"
PERIOD = "attention.sliding_window_pattern"

LLAMA_LIKE = (
    ArchSpec("llama", "interleaved", TOP + ROPE_FREQS, LLAMA, reads=LLAMA_KEYS),
    ArchSpec("qwen2", "half", TOP + may(("output.bias", "V")), NORMS + MATRICES + GATED + need(*QKV_BIAS, unless="attn_qkv.bias")),
    ArchSpec(
        "qwen3",
        "half",
        TOP,
        NORMS + MATRICES + GATED + FFN_SCALES + need(*QK_NORM) + may(*QKV_BIAS, *OUT_BIAS, flag="attention_bias"),
    ),
    ArchSpec("mistral3", "interleaved", TOP + ROPE_FREQS, LLAMA, reads=LLAMA_KEYS | YARN_LOG | {"attention.temperature_scale"}),
    ArchSpec("internlm2", "interleaved", TOP, LAYER + BIASES),
    ArchSpec("xverse", "interleaved", TOP, LAYER + BIASES),
    ArchSpec("baichuan", "interleaved", TOP, LAYER + BIASES, defaults=baichuan),
    ArchSpec("orion", "half", TOP_LN, NORMS_LN + ATTENTION + GATED + BIASES, block=LAYER_NORM),
    ArchSpec("seed_oss", "half", TOP, SEED + ATTENTION + GATED + BIASES, block=FFN_NORM_IS_POST),
    ArchSpec("ernie4_5", "interleaved", TOP, LAYER, mrope="interleaved", ignores=frozenset({"expert_count"})),
    ArchSpec("exaone", "half", TOP + ROPE_FREQS, LAYER + BIASES),
    ArchSpec("arcee", "interleaved", TOP + ROPE_FREQS, NORMS + ATTENTION + UNGATED + BIASES, block=Block(activation="relu2")),
    ArchSpec("smollm3", "interleaved", TOP, LAYER + BIASES, turns=not_every_fourth),
    ArchSpec("maincoder", "interleaved", TOP, LAYER + BIASES + need(*QK_NORM), block=QK_AFTER),
    ArchSpec("pangu-embedded", "half", TOP + may(("output.bias", "V")), LAYER + need(*OUT_BIAS) + may(*FFN_BIAS)),
    ArchSpec("hunyuan-dense", "half", TOP, LAYER + BIASES + need(*QK_NORM), block=QK_AFTER, mrope="half"),
    ArchSpec("qwen", "half", TOP, LAYER + BIASES, halved_ff=True),
    ArchSpec("refact", None, TOP, LAYER, defaults=given({ALIBI: 8.0})),
    # gate and up in one matrix
    ArchSpec("phi3", "half", TOP + ROPE_FACTORS, NORMS + ATTENTION + FUSED + BIASES, block=Block(fused=True)),
    ArchSpec("chatglm", "interleaved", TOP, NORMS + ATTENTION + FUSED + BIASES, block=Block(fused=True)),
    # scales of embedding, residuals and logits
    ArchSpec("granite", "interleaved", TOP + ROPE_FREQS, LLAMA_ROWS, reads=SCALE_KEYS | LLAMA_KEYS | {SHARED_LENGTH}, divides_logits=True),
    ArchSpec(
        "granitemoe", "interleaved", TOP + ROPE_FREQS, LLAMA_ROWS, reads=SCALE_KEYS | LLAMA_KEYS | {SHARED_LENGTH}, divides_logits=True
    ),
    ArchSpec("minicpm", "interleaved", TOP + ROPE_FREQS, LLAMA_ROWS, reads=SCALE_KEYS | LLAMA_KEYS, defaults=minicpm, divides_logits=True),
)

WITH_NORMS_AFTER = (
    ArchSpec("gemma", "half", TOP, LAYER, block=Block(activation="gelu"), defaults=gemma(0)),
    ArchSpec(
        "gemma2",
        "half",
        TOP,
        LAYER + POST_NORMS,
        block=POST_GELU,
        reads=WINDOW_KEYS | SOFTCAP_KEYS,
        defaults=both(gemma(46), window(4096, 2), given({"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0})),
    ),
    ArchSpec(
        "gemma3",
        "half",
        TOP,
        LAYER + POST_NORMS + need(*QK_NORM),
        block=POST_GELU,
        reads=WINDOW_KEYS | {"final_logit_softcapping"},
        defaults=both(gemma(62), given({PERIOD: 6, "rope.freq_base_swa": 10000.0})),
        window_unscaled=True,
    ),
    ArchSpec(
        "olmo2",
        "half",
        TOP,
        ATTENTION + GATED + POST_NORMS + need(*QK_NORM_ALL),
        block=Block(attn_norm="", ffn_norm="", attn_post_norm="post_attention_norm", ffn_post_norm="post_ffw_norm", qk_norm_over="all"),
        reads=WINDOW_KEYS,
        defaults=given({PERIOD: 4}),
        window_unscaled=True,
    ),
    ArchSpec(
        "exaone4",
        "half",
        TOP + ROPE_FREQS,
        ATTENTION + GATED + POST_NORMS + need(*QK_NORM),
        block=POST_ONLY,
        reads=WINDOW_KEYS,
        defaults=lambda s: window(4096, 4)(s) if s.n_layer == 64 else {PERIOD: 1},  # the 1.2B model's window is not used
        turns=where_windowed_if_any,
    ),
    ArchSpec("glm4", "interleaved", TOP, NORMS + ATTENTION + FUSED + POST_NORMS + BIASES, block=POST_FUSED, mrope="half"),
)

WITH_LAYER_NORM = (
    ArchSpec("gpt2", None, TOP_LN + POSITIONS, NORMS_LN + ATTENTION + UNGATED + ALL_BIASES, block=GELU),
    ArchSpec("starcoder", None, TOP_LN + POSITIONS, NORMS_LN + ATTENTION + UNGATED + ALL_BIASES, block=GELU),
    ArchSpec("starcoder2", "half", TOP_LN, NORMS_LN + ATTENTION + UNGATED + ALL_BIASES, block=GELU),
    ArchSpec("codeshell", "half", TOP_LN, NORMS_LN + ATTENTION + UNGATED + ALL_BIASES, block=GELU),
    ArchSpec(
        "bloom",
        None,
        TOP_LN + need(("token_embd_norm.weight", "E"), ("token_embd_norm.bias", "E")),
        NORMS_LN + ATTENTION + UNGATED + ALL_BIASES,
        block=GELU,
        defaults=given({ALIBI: 8.0}),
    ),
    ArchSpec(
        "mpt",
        None,
        TOP + may(("output_norm.bias", "E"), ("position_embd.weight", "PE")),
        NORMS
        + ATTENTION
        + UNGATED
        + BIASES
        + may(("attn_norm.bias", "E"), ("ffn_norm.bias", "E"), ("ffn.act.scales", "F"))
        + may(*QK_NORM_ALL, ("attn_q_norm.bias", "Q"), ("attn_k_norm.bias", "K")),
        block=Block(norm="layer", activation="gelu", qk_norm_over="all"),
        reads=frozenset({"attention.clamp_kqv", ALIBI}),
    ),
    ArchSpec(
        "jais",
        None,
        TOP_LN,
        NORMS_LN + ATTENTION + GATED + may(*QKV_BIAS) + need(*OUT_BIAS, *FFN_BIAS),
        block=LAYER_NORM,
        reads=frozenset({ALIBI}),
        defaults=lambda s: {"attention.scale": 1 / s.head_dim},
    ),
    ArchSpec("nemotron", "half", TOP_LN, NORMS_LN + ATTENTION + UNGATED + BIASES, block=Block(norm="layer", activation="relu2")),
    ArchSpec(
        "olmo",
        "interleaved",
        need(("token_embd.weight", "VE")) + may(("output.weight", "VE")),
        ATTENTION + GATED,
        block=LAYER_NORM,
        reads=frozenset({"attention.clamp_kqv"}),
    ),
    ArchSpec(
        "stablelm",
        "half",
        TOP_LN,
        ONE_NORM_LN + ATTENTION + GATED + BIASES + QK_NORM_EACH + may(("ffn_norm.weight", "E"), ("ffn_norm.bias", "E")),
        block=LAYER_NORM,
        lacking=("blk.0.ffn_norm.weight", Block(norm="layer", parallel=True, ffn_norm="")),  # StableLM 2 12B
    ),
)

PARALLEL = (
    ArchSpec(
        "gptneox",
        "half",
        TOP_LN,
        NORMS_LN + ATTENTION + UNGATED + ALL_BIASES,
        block=GELU,
        reads=frozenset({"use_parallel_residual"}),
    ),
    ArchSpec(
        "falcon",
        "half",
        TOP_LN,
        ONE_NORM_LN + ATTENTION + UNGATED + may(("attn_norm_2.weight", "E"), ("attn_norm_2.bias", "E")),
        block=PARALLEL_GELU,
    ),
    ArchSpec("phi2", "half", TOP_LN + need(("output.bias", "V")), ONE_NORM_LN + ATTENTION + UNGATED + ALL_BIASES, block=PARALLEL_GELU),
    ArchSpec("plamo", "half", TOP, ONE_NORM + ATTENTION + GATED + BIASES, block=Block(parallel=True, ffn_norm="")),
    ArchSpec(
        "command-r",
        "interleaved",
        TOP,
        ONE_NORM + ATTENTION + GATED + BIASES + QK_NORM_EACH,
        block=Block(norm="layer", parallel=True, ffn_norm=""),
        reads=frozenset({"logit_scale"}),
    ),
    ArchSpec(
        "cohere2",
        "interleaved",
        TOP,
        ONE_NORM + ATTENTION + GATED + FFN_SCALES + BIASES,
        block=Block(norm="layer", parallel=True, ffn_norm=""),
        reads=WINDOW_KEYS | {"logit_scale"},
        defaults=given({PERIOD: 4}),
        turns=where_windowed,
    ),
)

WITH_EXPERTS = (
    ArchSpec(
        "qwen2moe",
        "half",
        TOP,
        NORMS + ATTENTION + BIASES + MOE + SHARED_GATE,
        reads=MOE_KEYS | {SHARED_LENGTH},
        defaults=both(split_experts, shared_as_wide, given({"expert_weights_norm": False})),
    ),
    ArchSpec(
        "qwen3moe",
        "half",
        TOP,
        NORMS + ATTENTION + BIASES + EXPERTS + EXPERT_SCALES + need(*QK_NORM),
        reads=MOE_KEYS,
        defaults=split_experts,
    ),
    ArchSpec(
        "olmoe",
        "half",
        TOP,
        NORMS + ATTENTION + EXPERTS + need(*QK_NORM_ALL),
        block=Block(qk_norm_over="all"),
        reads=LLAMA_KEYS,
        defaults=given({"expert_weights_norm": False}),
    ),
    ArchSpec(
        "dbrx",
        "half",
        TOP,
        ONE_NORM + need(("attn_output_norm.weight", "E")) + ATTENTION + EXPERTS,
        block=Block(norm="layer", ffn_norm="attn_output_norm"),
        reads=LLAMA_KEYS | {"attention.clamp_kqv"},
    ),
    ArchSpec(
        "hunyuan-moe",
        "half",
        TOP,
        NORMS + ATTENTION + BIASES + MOE + need(*QK_NORM),
        block=QK_AFTER,
        reads=LLAMA_KEYS | {SHARED_LENGTH},
        defaults=shared_as_wide,
    ),
    ArchSpec("deepseek", "interleaved", TOP, LAYER + BIASES + MOE, reads=ROUTING_KEYS, defaults=given({"expert_weights_norm": False})),
    ArchSpec("dots1", "half", TOP, LAYER + BIASES + MOE + PROBS_BIAS + need(*QK_NORM), reads=ROUTING_KEYS),
    ArchSpec("bailingmoe", "interleaved", TOP, NORMS + ATTENTION + BIASES + MOE, reads=ROUTING_KEYS - {LEAD}, ignores=frozenset({LEAD})),
    ArchSpec("bailingmoe2", "half", TOP, LAYER + BIASES + MOE + PROBS_BIAS + need(*QK_NORM), reads=ROUTING_KEYS | {SHARED_LENGTH}),
    ArchSpec(
        "ernie4_5-moe",
        "interleaved",
        TOP,
        LAYER + MOE + PROBS_BIAS,
        reads=MOE_KEYS | {SHARED_LENGTH, "leading_dense_block_count", "interleave_moe_layer_step"},
        mrope="interleaved",
    ),
    ArchSpec(
        "glm4moe",
        "half",
        TOP,
        SEED + ATTENTION + GATED + BIASES + MOE + PROBS_BIAS + may(*QK_NORM),
        block=FFN_NORM_IS_POST,
        reads=ROUTING_KEYS,
        defaults=given({"expert_gating_func": 2}),
        mrope="half",
    ),
    ArchSpec(
        "exaone-moe",
        "half",
        TOP + ROPE_FREQS,
        LAYER + BIASES + MOE + PROBS_BIAS + need(*QK_NORM),
        reads=(ROUTING_KEYS - {SHARED_COUNT}) | WINDOW_KEYS | {SHARED_LENGTH},
        defaults=both(window(128, 4), given({SHARED_COUNT: 1})),
        turns=where_windowed,
    ),
    ArchSpec(
        "gpt-oss",
        "half",
        TOP,
        SEED + ATTENTION + need(*OUT_BIAS) + EXPERTS + SINKS,
        block=Block(ffn_norm="post_attention_norm", activation="swiglu_oai"),
        reads=MOE_KEYS | WINDOW_KEYS,
        defaults=given({PERIOD: 2, "expert_gating_func": 3, "expert_weights_norm": False}),
    ),
)

WITH_LATENT_ATTENTION = (
    ArchSpec(
        "deepseek2",
        "interleaved",
        TOP,
        NORMS + LATENT + GATED + MOE + PROBS_BIAS,
        reads=ROUTING_KEYS | LATENT_KEYS | YARN_LOG,
    ),
    ArchSpec("minicpm3", "half", TOP + ROPE_FACTORS, NORMS + LATENT + GATED, reads=LATENT_KEYS, defaults=minicpm, divides_logits=True),
)

ARCHS: dict[str, ArchSpec] = {
    spec.name: spec
    for group in (LLAMA_LIKE, WITH_NORMS_AFTER, WITH_LAYER_NORM, PARALLEL, WITH_EXPERTS, WITH_LATENT_ATTENTION)
    for spec in group
}


def arch_spec(name: object, *, where: str) -> ArchSpec:
    """The row of a GGUF file's ``general.architecture``; UnsupportedArchitectureError with the list of names otherwise."""
    return _pick("general.architecture", name, ARCHS, where)


def arch_of_hf_type(model_type: object, *, where: str) -> ArchSpec:
    """The row of a config.json's ``model_type``; UnsupportedArchitectureError with the list of types otherwise."""
    return _pick("model_type", model_type, {t: ARCHS[names.arch] for t, names in HF_TYPES.items()}, where)


def _pick(key: str, name: object, rows: Mapping[str, ArchSpec], where: str) -> ArchSpec:
    if isinstance(name, str) and name in rows:
        return rows[name]
    found = "is missing" if name is None else f"is {name!r}"
    raise UnsupportedArchitectureError(
        f"{where}: the architecture ({key}) {found}, expected one of {', '.join(rows)}. The reference forward does not know "
        f"it yet, or the file is no language model: `quantscope inspect {where}` lists what it holds."
    )
