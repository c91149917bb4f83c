"""What a row of ``arch.table`` is, and the parts that rows are put together from: tensors, metadata keys, defaults.

Tensors are listed under GGUF names with row-major shapes in axis letters (``ModelConfig.axis``):

    E n_embd   F n_ff   G 2·n_ff   V n_vocab   P n_ctx   1 one number
    D head_dim   H n_head   J n_head_kv   Q H·D   K J·D   W J·value_dim   A Q + K + W   O H·value_dim   R rope.dim/2
    X experts   M n_ff of an expert   2 2·M   S n_ff of the shared experts
    q, c  ranks of q and of k/v in latent attention   a c + rope.dim   n D − rope.dim   v value_dim   b H·(n + v)

A tensor with an axis of length 0 does not exist.  Sources: ``load_arch_tensors``, ``load_arch_hparams`` and the graphs in llama.cpp's
src/models/*.cpp, ``llama_model_rope_type`` in src/llama-model.cpp, and the modules of Transformers' modeling_*.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from quantscope.arch.config import Block, ModelConfig, RopeLayout


class Sizes(NamedTuple):
    """What an architecture derives its own constants from."""

    n_layer: int
    n_embd: int
    n_head: int
    head_dim: int
    n_ff: int
    n_expert_used: int


LLAMA_BLOCK = Block()
Defaults: TypeAlias = Callable[[Sizes], Mapping[str, object]]  # sizes → values of the metadata keys that a file leaves out


@dataclass(frozen=True)
class TensorRow:
    """One tensor of an architecture: its (layer-local) name, its axes, and whether a file may lack it.

    part: the layers that have it: all of them, those with a dense feed-forward, those with experts.  unless: the tensor that replaces it.
    """

    name: str
    axes: str
    needed: bool = True
    flag: str | None = None  # the key of a config.json that says whether the tensor is there
    part: Literal["all", "dense", "experts"] = "all"
    unless: str = ""

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        return tuple(config.axis(a) for a in self.axes)

    def exists(self, config: ModelConfig, layer: int | None) -> bool:
        """Whether such a tensor can be there, in this layer or outside the layers."""
        if self.part != "all" and layer is not None and config.routes(layer) != (self.part == "experts"):
            return False
        return 0 not in self.shape(config)


@dataclass(frozen=True)
class ArchSpec:
    """What distinguishes one decoder architecture from another.

    reads: metadata keys that change the forward and that this architecture has; any other such key must be neutral in a file.
    turns: (layer, whether it has a window, whether any layer has one) → whether it turns q and k.
    """

    name: str  # general.architecture
    rope: RopeLayout | None  # of the canonical tensors; None: no rotation
    top: tuple[TensorRow, ...]
    layer: tuple[TensorRow, ...]
    block: Block = LLAMA_BLOCK
    reads: frozenset[str] = frozenset()
    lacking: tuple[str, Block] | None = None  # (tensor, the block of a file that does not have it)
    defaults: Defaults = lambda s: {}
    turns: Callable[[int, bool, bool], bool] = lambda i, windowed, any_windowed: True
    divides_logits: bool = False  # logit_scale divides
    ignores: frozenset[str] = frozenset()  # keys that files of this architecture have and that change nothing
    mrope: RopeLayout | None = None  # layout in a file with rope.dimension_sections, whose positions are all the same for text
    halved_ff: bool = False  # feed_forward_length counts gate and up together
    window_unscaled: bool = False  # layers with a window rotate without rope.scaling


def need(*rows: tuple[str, str], part: Literal["all", "dense", "experts"] = "all", unless: str = "") -> tuple[TensorRow, ...]:
    return tuple(TensorRow(name, axes, part=part, unless=unless) for name, axes in rows)


def may(*rows: tuple[str, str], flag: str | None = None, part: Literal["all", "dense", "experts"] = "all") -> tuple[TensorRow, ...]:
    return tuple(TensorRow(name, axes, needed=False, flag=flag, part=part) for name, axes in rows)


def weights(*rows: tuple[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple((f"{name}.weight", axes) for name, axes in rows)


# ---- parts that architectures are put together from --------------------------------------------------------------------------------

QKV = "attn_qkv.weight"
LINEARS = (
    ("attn_q", "QE"),
    ("attn_k", "KE"),
    ("attn_v", "WE"),
    ("attn_output", "EO"),
    ("ffn_gate", "FE"),
    ("ffn_up", "FE"),
    ("ffn_down", "EF"),
)
SCALES = may(*((f"{name}.scale", "1") for name, _ in (*LINEARS[:4], ("attn_qkv", ""))))  # of NVFP4 files
FFN_SCALES = may(*((f"{name}.scale", "1") for name, _ in LINEARS[4:]))  # where llama.cpp reads them
EXPERT_SCALES = may(*((f"ffn_{part}_exps.scale", "X") for part in ("gate", "up", "down")), part="experts")

TOP = need(("token_embd.weight", "VE"), ("output_norm.weight", "E")) + may(("output.weight", "VE"), ("output.scale", "1"))
TOP_LN = TOP + need(("output_norm.bias", "E"))
ROPE_FREQS = may(("rope_freqs.weight", "R"))
ROPE_FACTORS = may(("rope_factors_long.weight", "R"), ("rope_factors_short.weight", "R"))
POSITIONS = need(("position_embd.weight", "PE"))

MATRICES = need(*weights(*LINEARS[:3]), unless=QKV) + may((QKV, "AE"), ("attn_qkv.bias", "A")) + need(("attn_output.weight", "EO")) + SCALES
GATED = need(*weights(*LINEARS[4:]), part="dense")
UNGATED = need(*weights(*LINEARS[5:]), part="dense")
FUSED = need(("ffn_up.weight", "GE"), ("ffn_down.weight", "EF"), part="dense")  # gate and up in one matrix
NORMS = need(("attn_norm.weight", "E"), ("ffn_norm.weight", "E"))
ONE_NORM = need(("attn_norm.weight", "E"))
ONE_NORM_LN = need(("attn_norm.weight", "E"), ("attn_norm.bias", "E"))
SEED = need(("attn_norm.weight", "E"), ("post_attention_norm.weight", "E"))
NORMS_LN = NORMS + need(("attn_norm.bias", "E"), ("ffn_norm.bias", "E"))
POST_NORMS = need(("post_attention_norm.weight", "E"), ("post_ffw_norm.weight", "E"))

QKV_BIAS = (("attn_q.bias", "Q"), ("attn_k.bias", "K"), ("attn_v.bias", "W"))
ATTENTION = MATRICES + may(*QKV_BIAS)
LAYER = NORMS + ATTENTION + GATED
OUT_BIAS = (("attn_output.bias", "E"),)
FFN_BIAS = (("ffn_gate.bias", "F"), ("ffn_up.bias", "F"), ("ffn_down.bias", "E"))
QK_NORM = (("attn_q_norm.weight", "D"), ("attn_k_norm.weight", "D"))
QK_NORM_ALL = (("attn_q_norm.weight", "Q"), ("attn_k_norm.weight", "K"))
QK_NORM_EACH = may(("attn_q_norm.weight", "HD"), ("attn_k_norm.weight", "JD"))  # a weight for every head
BIASES = may(*OUT_BIAS, *FFN_BIAS)
ALL_BIASES = need(*OUT_BIAS, *FFN_BIAS[1:])

EXPERTS = (
    need(("ffn_gate_inp.weight", "XE"), ("ffn_down_exps.weight", "XEM"), part="experts")
    + need(("ffn_gate_exps.weight", "XME"), ("ffn_up_exps.weight", "XME"), part="experts", unless="ffn_gate_up_exps.weight")
    + may(("ffn_gate_up_exps.weight", "X2E"), part="experts")
)
SHARED = need(("ffn_gate_shexp.weight", "SE"), ("ffn_up_shexp.weight", "SE"), ("ffn_down_shexp.weight", "ES"), part="experts")
SHARED_GATE = need(("ffn_gate_inp_shexp.weight", "E"), part="experts")
SINKS = (
    need(("attn_sinks.weight", "H"))
    + need(("ffn_gate_inp.bias", "X"), ("ffn_down_exps.bias", "XE"), part="experts")
    + need(("ffn_gate_exps.bias", "XM"), ("ffn_up_exps.bias", "XM"), part="experts", unless="ffn_gate_up_exps.bias")
    + may(("ffn_gate_up_exps.bias", "X2"), part="experts")
)
PROBS_BIAS = may(("exp_probs_b.bias", "X"), part="experts")
MOE = EXPERTS + SHARED
LATENT = (
    need(("attn_q_a.weight", "qE"), ("attn_q_a_norm.weight", "q"), ("attn_q_b.weight", "Qq"))
    + need(("attn_q.weight", "QE"), unless="attn_q_a.weight")
    + need(("attn_kv_a_mqa.weight", "aE"), ("attn_kv_a_norm.weight", "c"), ("attn_output.weight", "EO"))
    + need(("attn_kv_b.weight", "bc"), unless="attn_k_b.weight")
    + may(("attn_k_b.weight", "Hcn"), ("attn_v_b.weight", "Hvc"), ("attn_output.scale", "1"))
)
LLAMA_ROWS = (
    NORMS + MATRICES + GATED + MOE + may(*QKV_BIAS, *OUT_BIAS, flag="attention_bias") + may(*FFN_BIAS, flag="mlp_bias", part="dense")
)

LLAMA = LLAMA_ROWS + FFN_SCALES + EXPERT_SCALES

MOE_KEYS = frozenset({"expert_count", "expert_used_count", "expert_feed_forward_length"})
SHARED_LENGTH, SHARED_COUNT = "expert_shared_feed_forward_length", "expert_shared_count"
ROUTING_KEYS = MOE_KEYS | {
    "expert_weights_scale", "expert_weights_norm", "expert_gating_func", "expert_group_count", "expert_group_used_count",
    "leading_dense_block_count", SHARED_COUNT,
}  # fmt: skip
WINDOW_KEYS = frozenset({"attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa"})
SCALE_KEYS = frozenset({"embedding_scale", "residual_scale", "logit_scale"})
SOFTCAP_KEYS = frozenset({"attn_logit_softcapping", "final_logit_softcapping"})
LATENT_KEYS = frozenset({"attention.q_lora_rank", "attention.kv_lora_rank"})
YARN_LOG = frozenset({"rope.scaling.yarn_log_multiplier"})
LLAMA_KEYS = frozenset({"expert_count", "expert_used_count"})


def gemma(largest: int) -> Defaults:
    """√E times the embedding; the largest model of a generation divides scores by √(E/H) instead of √D."""
    return lambda s: {
        "embedding_scale": math.sqrt(s.n_embd),
        "attention.scale": (s.n_embd // s.n_head if s.n_layer == largest else s.head_dim) ** -0.5,
    }


def minicpm(s: Sizes) -> Mapping[str, object]:
    return {"embedding_scale": 12.0, "residual_scale": 1.4 / math.sqrt(s.n_layer), "logit_scale": s.n_embd / 256}  # it divides


def baichuan(s: Sizes) -> Mapping[str, object]:
    """The 7B model (32 layers) turns q and k, the 13B model has ALiBi; llama.cpp tells them apart by their layers, too."""
    return {} if s.n_layer == 32 else {"rope.dimension_count": 0, "attention.max_alibi_bias": 8.0 if s.n_layer == 40 else 0.0}


def split_experts(s: Sizes) -> Mapping[str, object]:
    """Experts that share the feed-forward's width among those in use."""
    return {"expert_feed_forward_length": s.n_ff // max(s.n_expert_used, 1)}


def shared_as_wide(s: Sizes) -> Mapping[str, object]:
    return {SHARED_LENGTH: s.n_ff}


def window(size: int, period: int) -> Defaults:
    """Each last layer of ``period`` sees everything."""
    return lambda s: {"attention.sliding_window": size, "attention.sliding_window_pattern": period}


def both(*defaults: Defaults) -> Defaults:
    return lambda s: {key: value for d in defaults for key, value in d(s).items()}


def given(values: Mapping[str, object]) -> Defaults:
    return lambda s: values


def where_windowed(i: int, windowed: bool, any_windowed: bool) -> bool:
    return windowed


def where_windowed_if_any(i: int, windowed: bool, any_windowed: bool) -> bool:
    return windowed or not any_windowed


def not_every_fourth(i: int, windowed: bool, any_windowed: bool) -> bool:
    return (i + 1) % 4 != 0
