"""A small model of every architecture of ``arch.table``, with random weights, as a GGUF file that llama.cpp loads.

    make_arch(tmp_path / "m.gguf", "qwen2moe")

Names and shapes are those of the table: llama.cpp refuses a file with a tensor too many, too few or of another shape.  Matrices have
variance 1/fan-in, so that activations stay near 1 and attention is far from uniform.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from quantscope.arch.config import ModelConfig
from quantscope.arch.read import read_config
from quantscope.arch.spec import TensorRow
from quantscope.arch.table import ARCHS
from quantscope.sources.resolve import open_source
from tests.models import write_gguf

N_VOCAB, N_LAYER = 288, 3
QKV = ("attn_q", "attn_k", "attn_v")


@dataclass(frozen=True)
class Case:
    """What a small model of an architecture has: keys beside those of all models, optional tensors by stem or name, q, k and v in one."""

    keys: Mapping[str, Any] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    fused: bool = False
    sizes: Mapping[str, int] = field(default_factory=dict)


WINDOW: dict[str, Any] = {"attention.sliding_window": 8, "attention.sliding_window_pattern": [True, True, False]}
MOE: dict[str, Any] = {"expert_count": 6, "expert_used_count": 2}
SHARED: dict[str, Any] = MOE | {"expert_feed_forward_length": 48, "expert_shared_count": 2}
LEAD: dict[str, Any] = SHARED | {"leading_dense_block_count": 1}
SIGMOID: dict[str, Any] = LEAD | {"expert_gating_func": 2, "expert_weights_norm": True, "expert_weights_scale": 2.5}
SCALES: dict[str, Any] = {"embedding_scale": 6.0, "residual_scale": 0.4, "logit_scale": 3.0, "attention.scale": 0.2}
BIASES = tuple(f"{name}.bias" for name in QKV)
MLA: dict[str, Any] = LEAD | {
    "attention.q_lora_rank": 24,
    "attention.kv_lora_rank": 32,
    "rope.dimension_count": 8,
    "expert_weights_norm": True,
}
BY_HEAD = ("attn_k_b.weight", "attn_v_b.weight", "exp_probs_b.bias")
WIDE: dict[str, Any] = MLA | {  # no experts; rows that the blocks of every type fill, the vector in the cache too
    "embedding_length": 256,
    "feed_forward_length": 256,
    "leading_dense_block_count": N_LAYER,
    "attention.q_lora_rank": 256,
    "attention.kv_lora_rank": 256,
    "rope.dimension_count": 64,
}
FUSED_BIAS = ("attn_qkv.bias",)

CASES: dict[str, Case] = {
    **{arch: Case() for arch in ARCHS},
    "llama-moe": Case(MOE),
    "granite-moe": Case(SCALES | MOE | {"expert_shared_feed_forward_length": 40}),
    "qwen2-fused": Case(fused=True, optional=FUSED_BIAS),
    "mistral3": Case({"attention.temperature_scale": 0.3, "rope.scaling.original_context_length": 16}),
    "internlm2": Case(optional=BIASES),
    "granite": Case(SCALES),
    "granitemoe": Case(SCALES | MOE),
    "minicpm": Case({k: v for k, v in SCALES.items() if k != "attention.scale"}),
    "gemma2": Case(WINDOW | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5}),
    "gemma3": Case(WINDOW | {"rope.freq_base": 1e6, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0}),
    "olmo2": Case(WINDOW | {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}),
    "cohere2": Case(WINDOW | {"logit_scale": 0.25}),
    "command-r": Case({"logit_scale": 0.0625}),
    "gpt2": Case(fused=True, optional=FUSED_BIAS),
    "starcoder": Case(fused=True, optional=FUSED_BIAS),
    "bloom": Case(fused=True, optional=FUSED_BIAS, sizes={"n_head": 6}),
    "mpt": Case({"attention.max_alibi_bias": 8.0, "attention.clamp_kqv": 0.7}, fused=True),
    "jais": Case({"attention.max_alibi_bias": 8.0}, fused=True, optional=FUSED_BIAS),
    "olmo": Case({"attention.clamp_kqv": 0.7}),
    "stablelm": Case(
        {"rope.dimension_count": 8},
        optional=("ffn_norm.weight", "ffn_norm.bias", "attn_q_norm.weight", "attn_k_norm.weight"),
    ),
    "stablelm-parallel": Case({"rope.dimension_count": 8}),
    "gptneox": Case({"use_parallel_residual": True, "rope.dimension_count": 8}, fused=True, optional=FUSED_BIAS),
    "gptneox-in-turn": Case({"use_parallel_residual": False}, fused=True, optional=FUSED_BIAS),
    "falcon": Case(fused=True),
    "falcon-two-norms": Case(fused=True, optional=("attn_norm_2.weight", "attn_norm_2.bias")),
    "phi2": Case({"rope.dimension_count": 8}, optional=BIASES),
    "phi3": Case(
        {"context_length": 512, "rope.scaling.original_context_length": 256},
        fused=True,
        optional=("rope_factors_long.weight", "rope_factors_short.weight"),
    ),
    "qwen": Case(fused=True, optional=FUSED_BIAS, sizes={"n_head_kv": 4}),
    "plamo": Case(),
    "qwen2moe": Case(MOE | {"expert_feed_forward_length": 48, "expert_shared_feed_forward_length": 80}),
    "qwen3moe": Case(MOE | {"expert_feed_forward_length": 48}),
    "olmoe": Case(MOE, sizes={"n_head_kv": 4}),
    "dbrx": Case(MOE | {"attention.clamp_kqv": 0.7}, fused=True),
    "hunyuan-moe": Case(MOE | {"expert_feed_forward_length": 96, "expert_shared_feed_forward_length": 80}),
    "deepseek": Case(LEAD),
    "dots1": Case(SIGMOID, optional=("exp_probs_b.bias",), sizes={"n_head_kv": 4}),
    "bailingmoe": Case(SHARED | {"expert_weights_norm": True}),
    "bailingmoe2": Case(
        SIGMOID | {"expert_group_count": 3, "expert_group_used_count": 2}, optional=("exp_probs_b.bias",), fused=True
    ),
    "ernie4_5-moe": Case(
        MOE
        | {"expert_feed_forward_length": 48, "expert_shared_feed_forward_length": 80, "leading_dense_block_count": 1}
        | {"interleave_moe_layer_step": 1},
        optional=("exp_probs_b.bias",),
    ),
    "glm4moe": Case(LEAD | {"expert_weights_norm": True, "rope.dimension_count": 8}, optional=("exp_probs_b.bias", *BIASES)),
    "glm4": Case({"rope.dimension_count": 8}, optional=BIASES),
    "exaone-moe": Case(SIGMOID | WINDOW, optional=("exp_probs_b.bias",)),
    "gpt-oss": Case(
        MOE | WINDOW | {"expert_feed_forward_length": 64}
        | {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32},
        optional=BIASES,
    ),
    "deepseek2": Case(
        MLA | {"attention.key_length": 40, "attention.value_length": 32, "attention.key_length_mla": 24, "attention.value_length_mla": 20}
        | {"attention.head_count_kv": 1, "expert_gating_func": 2, "expert_weights_scale": 1.5}
        | {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}
        | {"rope.scaling.yarn_log_multiplier": 0.0707},
        optional=BY_HEAD,
    ),
    "deepseek2-wide": Case(
        WIDE | {"attention.key_length": 320, "attention.value_length": 256, "attention.head_count_kv": 1}
        | {"attention.key_length_mla": 320, "attention.value_length_mla": 64},
        optional=BY_HEAD,
    ),
    "deepseek2-wide-one-matrix": Case(WIDE | {"attention.key_length": 192, "attention.value_length": 64}, sizes={"n_head_kv": 4}),
    "deepseek2-one-matrix": Case(MLA | {"attention.key_length": 24, "attention.value_length": 20}, sizes={"n_head_kv": 4}),
    "minicpm3": Case(
        {k: v for k, v in MLA.items() if k.startswith(("attention", "rope"))} | {"attention.key_length": 24, "attention.value_length": 20},
        sizes={"n_head_kv": 4},
    ),
}  # fmt: skip
VARIANTS = {"llama-moe": "llama", "granite-moe": "granite", "qwen2-fused": "qwen2", "stablelm-parallel": "stablelm"} | {
    "gptneox-in-turn": "gptneox",
    "falcon-two-norms": "falcon",
    **dict.fromkeys(("deepseek2-one-matrix", "deepseek2-wide", "deepseek2-wide-one-matrix"), "deepseek2"),
}


def arch_of(case: str) -> str:
    """The architecture of a case."""
    return VARIANTS.get(case, case)


def make_arch(
    path: Path,
    case: str,
    *,
    seed: int = 0,
    dtype: str = "F32",
    edit: Mapping[str, np.ndarray | None] | None = None,
    keys: Mapping[str, Any] | None = None,
) -> Path:
    """Write the model of a case and return its path.

    edit: tensor name → replacement, or None to leave it out.  keys: metadata in place of what goes with the tensors, None to leave it out.
    """
    arch, made = arch_of(case), CASES[case]
    header = _header(arch, made)
    tensors = dict(_tensors(_config(path, arch, header), arch, made, np.random.default_rng(seed)))
    for name, value in (edit or {}).items():
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    changed = header | {f"{arch}.{key}": value for key, value in (keys or {}).items()}
    write_gguf(path, arch, {key: value for key, value in changed.items() if value is not None}, tensors, dtype, N_VOCAB)
    return path


def header_keys(case: str) -> list[str]:
    """The metadata keys of a case's file, without the architecture's name."""
    arch = arch_of(case)
    return [key.removeprefix(f"{arch}.") for key in _header(arch, CASES[case])]


def _header(arch: str, case: Case) -> dict[str, Any]:
    sizes = {"n_head": 4, "n_head_kv": 2} | dict(case.sizes)
    keys: dict[str, Any] = {
        "context_length": 128,
        "embedding_length": 96 if sizes["n_head"] == 6 else 64,
        "block_count": N_LAYER,
        "feed_forward_length": 96,
        "attention.head_count": sizes["n_head"],
        "attention.head_count_kv": sizes["n_head"] if ARCHS[arch].rope is None else sizes["n_head_kv"],
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.layer_norm_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
    }
    return {f"{arch}.{key}": value for key, value in (keys | dict(case.keys)).items()}


def _config(path: Path, arch: str, header: Mapping[str, Any]) -> ModelConfig:
    """What the header says, through a file that has only the tensors that are asked for."""
    tensors = {"token_embd.weight": np.zeros((N_VOCAB, 1), np.float32)}
    tensors |= {f"blk.{i}.attn_norm.weight": np.zeros(1, np.float32) for i in range(N_LAYER)}
    write_gguf(path, arch, header, tensors, "F32", N_VOCAB)
    return read_config(open_source(path))


def _tensors(config: ModelConfig, arch: str, case: Case, rng: np.random.Generator) -> Iterator[tuple[str, np.ndarray]]:
    spec = ARCHS[arch]
    for row in spec.top:
        if (row.needed or row.name in case.optional) and row.exists(config, None):
            yield row.name, _values(row, config, rng)
    if not any(row.name == "output.weight" for row in spec.top if row.needed) and arch not in TIED:
        yield "output.weight", _values(TensorRow("output.weight", "VE"), config, rng)
    for i in range(config.n_layer):
        rows = [row for row in spec.layer if row.exists(config, i) and _wanted(row, case)]
        names = {row.name for row in rows if not row.unless}
        for row in rows:
            if row.unless not in names:
                yield f"blk.{i}.{row.name}", _values(row, config, rng)


TIED = ("gemma", "gemma2", "command-r", "cohere2")  # llama.cpp takes the embedding, whatever the file has


def _wanted(row: TensorRow, case: Case) -> bool:
    if case.fused and row.name in ("attn_qkv.weight", *(f"{name}.weight" for name in QKV)):
        return row.name == "attn_qkv.weight"
    return row.name in case.optional or row.needed


def _values(row: TensorRow, config: ModelConfig, rng: np.random.Generator) -> np.ndarray:
    shape = row.shape(config)
    noise = rng.standard_normal(shape).astype(np.float32)
    if row.name.startswith("rope_factors"):
        return 1 + 3 * np.abs(noise)
    if row.name.endswith("norm.weight") or row.name.endswith(("norm_2.weight", "scales")):
        return 1 + noise * np.float32(0.2)
    if row.name.endswith(".bias") or row.name == "attn_sinks.weight":
        return noise * np.float32(0.5)
    if row.name in ("token_embd.weight", "position_embd.weight"):
        return noise
    return noise * np.float32(shape[-1] ** -0.5)


__all__ = ["CASES", "arch_of", "gguf", "header_keys", "make_arch"]
