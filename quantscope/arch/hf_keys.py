"""A Hugging Face folder's config.json → ModelConfig.

Numbers that a GGUF file stores as float32 are rounded to float32 here as well, so that both files of one model mean the same.
Source: the configuration classes and modeling_rope_utils.py of Transformers; ``rope_parameters`` is the dictionary of
Transformers 5, ``rope_scaling`` with a separate ``rope_theta`` the older form.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from quantscope.arch.config import Activation, Block, Experts, Gating, Latent, Llama3Scaling, LongFactors, ModelConfig, RopeConfig
from quantscope.arch.gguf_keys import yarn_magnitude
from quantscope.arch.hf_defaults import hf_defaults
from quantscope.arch.names import HfNames, names_in, names_of, to_hf
from quantscope.arch.table import ArchSpec, arch_of_hf_type
from quantscope.errors import CorruptFileError, UnsupportedFeatureError
from quantscope.sources.base import Source, missing_tensor, show

# Key → values that leave the forward as it is; any other value needs an operation that is not implemented.
REFUSED: Mapping[str, tuple[object, ...]] = {
    "quantization_config": (None,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "scale_attn_weights": (True,),
    "qk_layernorm": (False,),
    "qk_ln": (False,),
    "prefix_lm": (False,),
    "softmax_scale": (None,),
    "parallel_attn": (True,),
    "moe_layer_freq": (None, 1),
    "swiglu_alpha": (1.702,),
    "swiglu_limit": (7.0,),
    "mlp_only_layers": (None, []),
    "decoder_sparse_step": (None, 1),
    "apply_residual_connection_post_layernorm": (False,),
    "use_bidirectional_attention": (None, False),
}
REFUSED_ROPE: Mapping[str, tuple[object, ...]] = {
    "rope_type": ("default", "linear", "llama3", "yarn", "longrope"),
    "mrope_section": (None,),
}
ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu_erf",
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "relu": "relu",
    "relu2": "relu2",
}
GATINGS: Mapping[str, Gating] = {"softmax": "softmax", "sigmoid": "sigmoid", "softmax of the chosen": "softmax of the chosen"}
# What a size or constant is called, the usual name first.
SYNONYMS: Mapping[str, tuple[str, ...]] = {
    "n_layer": ("num_hidden_layers", "n_layer", "n_layers"),
    "n_embd": ("hidden_size", "n_embd", "d_model", "n_embed"),
    "n_head": ("num_attention_heads", "n_head", "n_heads"),
    "n_head_kv": ("num_key_value_heads",),
    "n_ff": ("intermediate_size", "n_inner"),
    "n_ctx": ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len"),
    "norm_eps": ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    "activation": ("hidden_act", "hidden_activation", "activation_function", "activation"),
    "alibi": ("alibi_bias", "alibi_bias_max"),
    "embedding_scale": ("embedding_multiplier", "scale_emb"),
    "n_expert": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "n_expert_used": ("num_experts_per_tok", "moe_k", "moe_topk"),
    "n_expert_shared": ("n_shared_experts", "moe_num_shared_experts", "num_shared_experts"),
    "n_ff_expert": ("moe_intermediate_size",),
    "rope_theta": ("rope_theta", "rotary_emb_base"),
    "rope_part": ("partial_rotary_factor", "rotary_pct"),
    "rope": ("rope_parameters", "rope_scaling"),
}
READ = frozenset(
    {key for keys in SYNONYMS.values() for key in keys}
    | REFUSED.keys()
    | {"head_dim", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "q_lora_rank", "kv_lora_rank", "new_decoder_architecture"}
    | {"num_kv_heads", "multi_query", "tie_word_embeddings", "attention_bias", "mlp_bias", "sliding_window", "use_sliding_window"}
    | {"residual_multiplier", "scale_depth", "attention_multiplier", "query_pre_attn_scalar", "logit_scale", "logits_scaling"}
    | {"dim_model_base", "final_logit_softcapping", "attn_logit_softcapping", "clip_qkv", "use_parallel_residual", "scoring_func"}
    | {"norm_topk_prob", "routed_scaling_factor", "n_group", "topk_group", "topk_method", "shared_expert_intermediate_size"}
    | {"first_k_dense_replace", "moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval", "alibi", "no_rope_layer_interval"}
    | {"rope_local_base_freq", "original_max_position_embeddings"}
) - {key for what in ("n_layer", "n_embd", "n_ff") for key in SYNONYMS[what]}  # whose absence is a damaged file
DEFAULT_EPS = 1e-6  # of a config.json that does not say it


class Json:
    """A JSON object with checked access; ``path`` names it in errors."""

    def __init__(self, source: Source, values: Mapping[str, Any], path: str = "") -> None:
        self.where, self.folder, self.values, self.path = show(source.path / "config.json"), show(source.path), values, path

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            found = "is missing" if value is None else f"is {value!r}"
            raise CorruptFileError(
                f"{self.where}: {self.path + key!r} {found}, expected a number. The file was edited, or is of another kind of model: "
                f"fetch the config.json that belongs to these weights."
            )
        return value

    def name(self, what: str) -> str:
        """Under which of its names the file has a quantity; the usual one where it has none."""
        return next((key for key in SYNONYMS[what] if self.values.get(key) is not None), SYNONYMS[what][0])

    def float32(self, key: str, default: float | None = None) -> float:
        return float(np.float32(self.number(key, default)))

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number ≥ 1."""
        value = self.number(key, default)
        if value < 1 or value != int(value):
            raise self.contradiction(f"{self.path + key!r} is {value}, expected a whole number of at least 1")
        return int(value)

    def numbers(self, key: str, n: int) -> tuple[float, ...]:
        """A list of n numbers."""
        values = self.values.get(key)
        if not isinstance(values, list) or len(values) != n or not all(isinstance(x, (int, float)) for x in values):
            found = f"has {len(values)} values" if isinstance(values, list) else "is missing" if values is None else f"is {values!r}"
            raise self.contradiction(f"{self.path + key!r} {found}, expected {n} numbers, one for each pair of channels that turns")
        return tuple(float(x) for x in values)

    def refuse(self, table: Mapping[str, tuple[object, ...]]) -> None:
        for key, neutral in table.items():
            if key in self.values and self.values[key] not in neutral:
                raise self.unsupported(key, f"{' or '.join(map(repr, neutral))}, or no such key")

    def unsupported(self, key: str, expected: str) -> UnsupportedFeatureError:
        found = str(self.values.get(key))[:80]
        return UnsupportedFeatureError(
            f"{self.where}: {self.path + key!r} is {found!r}, expected {expected}. It changes the computation in a way that the reference "
            f"forward does not implement, so its results would be wrong; `quantscope inspect {self.folder}` still works."
        )

    def choice(self, key: str, known: Mapping[str, Gating]) -> Gating:
        """What the value of a key stands for, the first of ``known`` where there is none."""
        value = self.values.get(key) or next(iter(known))
        if value not in known:
            raise self.unsupported(key, " or ".join(map(repr, known)))
        return known[value]

    def contradiction(self, problem: str) -> CorruptFileError:
        return CorruptFileError(
            f"{self.where}: {problem}. The file contradicts itself: it was edited, or belongs to other weights; fetch the config.json "
            f"that was published with them."
        )


def config_from_hf(source: Source) -> ModelConfig:
    model_type = source.metadata.get("model_type")
    names = names_in(source)
    c = Json(source, _with_defaults(source.metadata, names))
    spec = arch_of_hf_type(model_type, where=show(source.path))
    c.refuse(REFUSED)
    embedding = to_hf("token_embd.weight", names)
    if embedding not in source.tensors:
        raise missing_tensor(source.path, str(embedding), source.tensors)
    n_embd, n_head, n_layer = c.count(c.name("n_embd")), c.count(c.name("n_head")), c.count(c.name("n_layer"))
    n_head_kv, latent = _n_head_kv(c, names, n_head), _latent(c)
    head_dim = c.count("qk_nope_head_dim") + c.count("qk_rope_head_dim") if latent else c.count("head_dim", n_embd // n_head)
    n_ctx, n_ff = (
        c.count(c.name("n_ctx")),
        c.count(c.name("n_ff"), names.given["n_ff_by_n_embd"] * n_embd if "n_ff_by_n_embd" in names.given else None),
    )
    if n_head % n_head_kv:
        raise c.contradiction(f"{n_head} attention heads do not divide among {n_head_kv} key/value heads, expected a multiple")
    windows, longest = _windows(c, spec, n_layer, n_ctx)
    rope, window_rope = _ropes(source, c, spec, head_dim, n_ctx)
    numbers = c.values
    return ModelConfig(
        arch=spec.name,
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=head_dim,
        n_ff=n_ff,
        n_vocab=source.tensors[str(embedding)].shape[0],
        n_ctx=longest,
        norm_eps=c.float32(c.name("norm_eps"), DEFAULT_EPS),
        kq_scale=_kq_scale(c, head_dim) * (_yarn_scale(c, rope) ** 2 if latent else 1.0),
        tied=bool(numbers.get("tie_word_embeddings", False)),
        rope=rope,
        biases=frozenset(key for key in ("attention_bias", "mlp_bias") if numbers.get(key)),
        block=_block(c, spec),
        value_dim=c.count("v_head_dim") if latent and c.count("v_head_dim") != head_dim else 0,
        embedding_scale=n_embd**0.5 if numbers.get("scales_embeddings") else c.number(c.name("embedding_scale"), 1.0),
        residual_scale=_residual_scale(c, n_layer),
        logit_scale=c.number("logit_scale", 1.0) / c.number("logits_scaling", 1.0) * c.number("dim_model_base", n_embd) / n_embd,
        logit_softcap=c.number("final_logit_softcapping", 0.0),
        score_softcap=c.number("attn_logit_softcapping", 0.0),
        clamp_qkv=c.number("clip_qkv", 0.0),
        alibi=c.number(c.name("alibi"), 0.0),
        temperature=_rope_parameters(c).get("llama_4_scaling_beta") or 0.0,
        temperature_length=rope.n_ctx_orig,
        window=c.count("sliding_window") if any(windows) else 0,
        window_layers=windows if any(windows) else (),
        window_rope=window_rope if any(windows) else None,
        rope_layers=_turning(c, spec, windows),
        experts=_experts(c, n_layer, n_ff),
        latent=latent,
    )


def _with_defaults(metadata: Mapping[str, Any], names: HfNames) -> dict[str, Any]:
    """What config.json says, and what it means where it says nothing: a key under another name is no key that is missing."""
    inside = {key: value for name in names.inside for key, value in (metadata.get(name) or {}).items()}
    said = {**inside, **metadata}
    other_names = {key: keys for keys in SYNONYMS.values() for key in keys}
    assumed = {**hf_defaults(metadata.get("model_type")), **names.given}
    return {key: value for key, value in assumed.items() if not said.keys() & set(other_names.get(key, (key,)))} | said


def _n_head_kv(c: Json, names: HfNames, n_head: int) -> int:
    if c.values.get("new_decoder_architecture"):
        return c.count("num_kv_heads")
    if "by head" in names.changes.values():
        return 1 if c.values.get("multi_query") else n_head
    return c.count(c.name("n_head_kv"), n_head)


def _latent(c: Json) -> Latent | None:
    return (
        Latent(c.count("q_lora_rank") if c.values.get("q_lora_rank") else 0, c.count("kv_lora_rank"))
        if "kv_lora_rank" in c.values
        else None
    )


def _rope_parameters(c: Json) -> Mapping[str, Any]:
    return c.values.get("rope_parameters") or c.values.get("rope_scaling") or {}


def _yarn_scale(c: Json, rope: RopeConfig) -> float:
    """By how much latent attention's q and k would each be longer under YaRN; its scores are multiplied by the square."""
    log = _rope_parameters(c).get("mscale_all_dim") or 0
    return yarn_magnitude(rope.factor, log) if rope.scaling == "yarn" and log else 1.0


def _residual_scale(c: Json, n_layer: int) -> float:
    depth = c.values.get("scale_depth")
    return c.number("residual_multiplier", 1.0) if depth is None else c.number("scale_depth") / n_layer**0.5


def _kq_scale(c: Json, head_dim: int) -> float:
    """What the scores are multiplied by."""
    if c.values.get("query_pre_attn_scalar") is not None:
        return float(c.number("query_pre_attn_scalar") ** -0.5)
    return c.number("attention_multiplier", float(head_dim**-0.5))


def _block(c: Json, spec: ArchSpec) -> Block:
    """The architecture's block with the activation that the file names, and the branches side by side where it says so."""
    if spec.block.activation == "swiglu_oai":  # which no config.json names
        return spec.block
    key = c.name("activation")
    found = c.values.get(key, "gelu_new" if spec.block.activation == "gelu" else "silu")
    kind = ACTIVATIONS.get(str(found))
    alike = ("gelu", "gelu_erf") if spec.block.activation == "gelu" else (spec.block.activation,)
    if kind is None or kind not in alike:
        raise c.unsupported(key, " or ".join(repr(name) for name, a in ACTIVATIONS.items() if a in alike))
    if c.values.get("use_parallel_residual"):
        parallel = spec.lacking[1] if spec.lacking else replace(spec.block, parallel=True)
        return replace(parallel, activation=kind)
    return replace(spec.block, activation=kind)


def _windows(c: Json, spec: ArchSpec, n_layer: int, n_ctx: int) -> tuple[tuple[bool, ...], int]:
    """Which layers see a window, and the longest context: where GGUF files of the architecture have no window, that within which it hides
    nothing (Mistral 7B v0.1).
    """
    window, none = c.values.get("sliding_window") or 0, (False,) * n_layer
    if not window or not c.values.get("use_sliding_window", True) or (window >= n_ctx and "layer_types" not in c.values):
        return none, n_ctx
    kinds = c.values.get("layer_types")
    windows = tuple(kind == "sliding_attention" for kind in kinds) if kinds else _by_pattern(c, n_layer)
    if any(windows) and "attention.sliding_window" not in spec.reads:
        return none, min(window, n_ctx)
    return windows, n_ctx


def _by_pattern(c: Json, n_layer: int) -> tuple[bool, ...]:
    """Which layers see a window where there is no list of them: all but every n-th, or those with an L in a word that repeats, such as
    "LLLG", the last layer never; all where there is no pattern.
    """
    pattern = c.values.get("sliding_window_pattern")
    if isinstance(pattern, str) and pattern:
        return tuple(pattern[i % len(pattern)] == "L" and i < n_layer - 1 for i in range(n_layer))
    n = c.count("sliding_window_pattern") if pattern else n_layer + 1
    return tuple((i + 1) % n != 0 for i in range(n_layer))


def _turning(c: Json, spec: ArchSpec, windows: tuple[bool, ...]) -> tuple[bool, ...]:
    given = c.values.get("no_rope_layers")
    if not given and c.values.get("no_rope_layer_interval"):
        given = [(i + 1) % c.count("no_rope_layer_interval") for i in range(len(windows))]
    turning = tuple(bool(x) for x in given) if given else tuple(spec.turns(i, windowed, any(windows)) for i, windowed in enumerate(windows))
    return () if all(turning) else turning


def _experts(c: Json, n_layer: int, n_ff: int) -> Experts | None:
    if not c.values.get(c.name("n_expert")):
        return None
    n_expert, used = c.count(c.name("n_expert")), c.name("n_expert_used")
    n_used, n_ff_expert, group = c.count(used), c.count(c.name("n_ff_expert"), n_ff), c.values.get("n_group") or 1
    if n_used > n_expert:
        raise c.contradiction(f"{used} is {n_used} and {c.name('n_expert')} is {n_expert}, expected no more than there are")
    return Experts(
        n_expert,
        n_used,
        n_ff_expert,
        _shared_ff(c, n_ff, n_ff_expert),
        _routing_layers(c, n_layer),
        c.choice("scoring_func", GATINGS),
        bool(c.values.get("norm_topk_prob", True)),
        c.number("routed_scaling_factor", 1.0),
        1 if c.values.get("topk_method") == "greedy" else int(group),
        c.count("topk_group") if group != 1 else 1,
        1 if c.values.get("topk_method") == "group_limited_greedy" else 2,
    )


def _shared_ff(c: Json, n_ff: int, n_ff_expert: int) -> int:
    """The width of the shared experts together."""
    if c.values.get("shared_expert_intermediate_size"):
        return c.count("shared_expert_intermediate_size")
    if c.values.get("model_type") == "hunyuan_v1_moe":  # as wide as a dense feed-forward
        return n_ff
    return n_ff_expert * int(c.number(c.name("n_expert_shared"), 0))


def _routing_layers(c: Json, n_layer: int) -> tuple[bool, ...]:
    kinds = c.values.get("mlp_layer_types")
    if kinds:
        return tuple(kind == "sparse" for kind in kinds)
    first = int(c.number("first_k_dense_replace", c.number("moe_layer_start_index", 0)))
    last, step = int(c.number("moe_layer_end_index", n_layer - 1)), c.count("moe_layer_interval", 1)
    return tuple(first <= i <= (last if last >= 0 else n_layer - 1) and (i + 1) % step == 0 for i in range(n_layer))


def _ropes(source: Source, c: Json, spec: ArchSpec, head_dim: int, n_ctx: int) -> tuple[RopeConfig, RopeConfig | None]:
    """The rotation of the layers that see everything, and that of those with a window where it is another."""
    given, alibi = _rope_parameters(c), spec.rope is None
    if bool(c.values.get("alibi", alibi)) != alibi:
        raise c.unsupported("alibi", str(alibi))
    if spec.rope is None:
        return RopeConfig(10000.0, 0, "half"), None
    if "full_attention" in given:
        full, windowed = (_rope(source, c, spec, head_dim, n_ctx, given[kind]) for kind in ("full_attention", "sliding_attention"))
        return full, None if windowed == full else windowed
    if c.values.get("rope_local_base_freq") is not None:  # of Transformers before 5
        full, windowed = _rope(source, c, spec, head_dim, n_ctx, given), RopeConfig(c.float32("rope_local_base_freq"), head_dim, spec.rope)
        return full, None if windowed == full else windowed
    return _rope(source, c, spec, head_dim, n_ctx, given), None


def _rope(source: Source, c: Json, spec: ArchSpec, head_dim: int, n_ctx: int, given: Mapping[str, Any]) -> RopeConfig:
    given = {"rope_type": given.get("type") or "default", "rope_theta": c.values.get(c.name("rope_theta")), **given}
    if given["rope_type"] == "dynamic" and given.get("alpha"):  # of Hunyuan: another base, the same at every length
        stretched = Json(source, given, "rope_parameters.")
        given |= {
            "rope_theta": stretched.number("rope_theta") * stretched.number("alpha") ** (head_dim / (head_dim - 2)),
            "rope_type": "default",
        }
    if given["rope_type"] == "su":  # longrope's earlier name
        given["rope_type"] = "longrope"
    r = Json(source, given, "rope_parameters.")
    r.refuse(REFUSED_ROPE)
    kind, layout = given["rope_type"], spec.rope or "half"
    if c.values.get("qk_rope_head_dim") is not None:
        head_dim = c.count("qk_rope_head_dim")
    part = r.number("partial_rotary_factor", c.number(c.name("rope_part"), 1.0))
    if part != 1 and "halves" in names_of(c.values.get("model_type")).changes.values():
        raise (r if "partial_rotary_factor" in given else c).unsupported("partial_rotary_factor", "1")
    head_dim = int(head_dim * part)
    theta = r.float32("rope_theta", 10000.0)
    if kind == "linear":
        return RopeConfig(theta, head_dim, layout, "linear", r.float32("factor"))
    if kind == "longrope":
        return _longrope(c, r, theta, head_dim, spec, n_ctx)
    if kind == "yarn":
        return _yarn(r, theta, head_dim, spec, n_ctx)
    if kind == "llama3":
        if "rope_freqs.weight" not in {row.name for row in spec.top}:
            raise r.unsupported("rope_type", f"'default', 'linear' or 'yarn' for {spec.name}")
        orig = r.count("original_max_position_embeddings", n_ctx)
        llama3 = Llama3Scaling(r.number("factor"), r.number("low_freq_factor"), r.number("high_freq_factor"), orig)
        return RopeConfig(theta, head_dim, layout, llama3=llama3)
    return RopeConfig(theta, head_dim, layout)


def _longrope(c: Json, r: Json, theta: float, dim: int, spec: ArchSpec, n_ctx: int) -> RopeConfig:
    """LongRoPE: divisors of the frequencies for runs within the pretraining's context and for longer ones, and a magnitude for both.

    magnitude = √(1 + ln(n_ctx / n_ctx_orig) / ln n_ctx_orig)  Source: arXiv:2402.13753; ``_compute_longrope_parameters`` of Transformers.
    """
    if not any(row.name == "rope_factors_long.weight" for row in spec.top):
        raise r.unsupported("rope_type", f"'default', 'linear' or 'yarn' for {spec.name}")
    orig = c.count("original_max_position_embeddings", r.count("original_max_position_embeddings", n_ctx))
    stretch = n_ctx / orig if orig != n_ctx else r.number("factor", 1.0)
    magnitude = math.sqrt(1 + math.log(stretch) / math.log(orig)) if stretch > 1 else 1.0
    factors = LongFactors(*(r.numbers(f"{which}_factor", dim // 2) for which in ("short", "long")))
    magnitude = r.float32("attention_factor", magnitude) if r.values.get("attention_factor") is not None else magnitude
    return RopeConfig(theta, dim, spec.rope or "half", magnitude=magnitude, n_ctx_orig=orig, longrope=factors)


def _yarn(r: Json, theta: float, head_dim: int, spec: ArchSpec, n_ctx: int) -> RopeConfig:
    n_ctx_orig = r.count("original_max_position_embeddings", n_ctx)
    factor = r.float32("factor", n_ctx / n_ctx_orig)
    magnitude = yarn_magnitude(factor)
    if r.values.get("mscale") and r.values.get("mscale_all_dim"):
        magnitude = yarn_magnitude(factor, r.number("mscale")) / yarn_magnitude(factor, r.number("mscale_all_dim"))
    return RopeConfig(
        theta,
        head_dim,
        spec.rope or "half",
        "yarn",
        factor,
        magnitude=r.float32("attention_factor", magnitude) if r.values.get("attention_factor") is not None else magnitude,
        n_ctx_orig=n_ctx_orig,
        beta_fast=r.float32("beta_fast", 32.0),
        beta_slow=r.float32("beta_slow", 1.0),
        truncate=bool(r.values.get("truncate", True)),
    )
