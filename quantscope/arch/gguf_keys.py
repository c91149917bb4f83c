"""GGUF metadata → ModelConfig.

Source: ``load_hparams`` in llama.cpp's src/llama-model.cpp and the key names of src/llama-arch.cpp.  A key of the architecture
falls into one of three classes: read here, refused unless it has a value that changes nothing, or known to change nothing.
Any other key is listed in ``ModelConfig.ignored_keys``, so that a report can say so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from quantscope.arch.config import Block, Experts, Gating, Latent, ModelConfig, RopeConfig, Scaling
from quantscope.arch.spec import Sizes
from quantscope.arch.table import ArchSpec, arch_spec
from quantscope.errors import CorruptFileError, MissingTensorError, UnsupportedFeatureError
from quantscope.sources.base import Source, missing_tensor, show
from quantscope.wording import count

# Key → values that leave the forward as it is; any other value needs an operation that an architecture without the key in its ``reads``
# does not have.
REFUSED: Mapping[str, tuple[object, ...]] = {
    "expert_count": (0,),
    "expert_group_count": (0, 1),
    "moe_every_n_layers": (0, 1),
    "leading_dense_block_count": (0,),
    "interleave_moe_layer_step": (0, 1),
    "attention.sliding_window": (0,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.output_scale": (0, 1),
    "attention.value_scale": (0, 1),
    "attention.temperature_scale": (0,),
    "attention.q_lora_rank": (0,),
    "attention.kv_lora_rank": (0,),
    "attention.shared_kv_layers": (0,),
    "attn_logit_softcapping": (0, 50),  # llama.cpp writes 50 and 30 into every file that it saves, and reads them of few
    "final_logit_softcapping": (0, 30),
    "router_logit_softcapping": (0, 30),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "hidden_activation": ("silu",),
    "use_parallel_residual": (False,),
    "swin_norm": (False,),
    "n_deepstack_layers": (0,),
    "num_loops": (0, 1),
    "rescale_every_n_layers": (0,),
    "swiglu_clamp_exp": (0,),
    "swiglu_clamp_shexp": (0,),
    "tensor_data_layout": ("Meta AI original pth", "reference"),
    "rope.dimension_sections": (0,),
    "rope.scaling.alpha": (0, 1),
    "rope.scaling.yarn_ext_factor": (1, -1),
    "rope.scaling.yarn_log_multiplier": (0,),
}
HARMLESS = frozenset({
    "vocab_size", "rope.scaling.finetuned", "pooling_type", "expert_used_count", "attention.layer_norm_epsilon",
    "attention.layer_norm_rms_epsilon", "attention.sliding_window_pattern", "rope.freq_base_swa", "expert_feed_forward_length",
    "expert_shared_feed_forward_length", "expert_shared_count", "expert_weights_scale", "expert_weights_norm", "expert_gating_func",
    "expert_group_used_count", "attention.temperature_length", "attention.key_length_mla", "attention.value_length_mla",
})  # fmt: skip
SECTIONS = ("rope.dimension_sections", "swiglu_clamp_exp", "swiglu_clamp_shexp")  # arrays, neutral when they are all 0
GATINGS: Mapping[int, Gating] = {0: "softmax", 1: "softmax", 2: "sigmoid", 3: "softmax of the chosen"}


class Keys:
    """The metadata keys of one architecture, "llama.block_count" as "block_count"; remembers which were asked for."""

    def __init__(self, source: Source, spec: ArchSpec) -> None:
        self.where, self.prefix, self.reads = show(source.path), f"{spec.name}.", spec.reads
        self.values = {k[len(self.prefix) :]: v for k, v in source.metadata.items() if k.startswith(self.prefix)}
        self.mrope, self.ignores = spec.mrope, spec.ignores
        self.asked: set[str] = set()
        self.defaults: Mapping[str, object] = {}

    def get(self, key: str) -> Any:
        """The value, or None; an array of equal numbers (one a layer) as that number."""
        self.asked.add(key)
        value = self.values.get(key)
        if not isinstance(value, np.ndarray):
            return value
        if value.size == 0 or (value != value[0]).any():
            raise self.unsupported(key, np.array2string(value, threshold=8, separator=", "), "the same value for every layer")
        return value[0].item()

    def own(self, key: str) -> Any:
        """The value of a key that not every architecture has: the file's where this one reads it, else the architecture's, else None.

        llama.cpp writes 0 for what a model does not have.
        """
        given = self.get(key) if key in self.reads else None
        return given or self.defaults.get(key, given)

    def own_number(self, key: str) -> float:
        """``own`` as a number, 0 where there is none."""
        value = self.own(key)
        return self._number(key, 0 if value is None else value)

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        return self._number(key, default if value is None else value)

    def _number(self, key: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            found = "is missing" if value is None else f"is {value!r}"
            raise CorruptFileError(
                f"{self.where}: the metadata key {self.prefix + key} {found}, expected a number. The header was written by a faulty "
                f"converter or edited: convert the original model again, and look at the keys with `quantscope inspect {self.where}`."
            )
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number ≥ 1."""
        value = self.number(key, default)
        if value < 1 or value != int(value):
            raise self.contradiction(f"{self.prefix + key} is {value}, expected a whole number of at least 1")
        return int(value)

    def unsupported(self, key: str, found: object, expected: str) -> UnsupportedFeatureError:
        return UnsupportedFeatureError(
            f"{self.where}: the metadata key {self.prefix + key} is {found}, expected {expected}. It changes the computation in a way "
            f"that the reference forward does not implement, so its results would be wrong; `quantscope inspect {self.where}` still works."
        )

    def contradiction(self, problem: str) -> CorruptFileError:
        return CorruptFileError(
            f"{self.where}: {problem}. The header contradicts itself: it was written by a faulty converter or edited; "
            f"convert the original model again, and look at the keys with `quantscope inspect {self.where}`."
        )

    def refuse(self) -> None:
        """Raise UnsupportedFeatureError for the first key of REFUSED whose value is not neutral."""
        for key, neutral in REFUSED.items():
            if key in self.reads or key in self.ignores or (key == "rope.dimension_sections" and self.mrope):
                continue
            value = self.get(key) if key not in SECTIONS else self.any(key)
            if value is not None and value not in neutral and value != self.defaults.get(key):
                raise self.unsupported(key, repr(value), f"{' or '.join(map(repr, neutral))}, or no such key")

    def any(self, key: str) -> Any:
        """1 where an array has a number other than 0, 0 where it has none; None where there is no such key."""
        self.asked.add(key)
        value = self.values.get(key)
        return None if value is None else int(np.any(value))

    def layers(self, key: str) -> list[Any] | None:
        """An array with a value for each layer; None where the key is absent or is one number."""
        value = self.values.get(key) if key in self.reads else None
        if not isinstance(value, np.ndarray):
            return None
        self.asked.add(key)
        return list(value.tolist())

    def ignored(self) -> tuple[str, ...]:
        """Keys with a value that nothing asked for; llama.cpp writes a 0 for everything that a model does not have."""
        unknown = (key for key in self.values if key not in self.asked and key not in HARMLESS)
        return tuple(self.prefix + key for key in unknown if np.any(self.values[key]))


def config_from_gguf(source: Source) -> ModelConfig:
    spec = arch_spec(source.metadata.get("general.architecture"), where=show(source.path))
    keys = Keys(source, spec)
    if "token_embd.weight" not in source.tensors:
        raise missing_tensor(source.path, "token_embd.weight", source.tensors)
    sizes = _sizes(keys, spec)
    _check_layers(source, keys, spec, sizes.n_layer)
    keys.defaults = spec.defaults(sizes)
    keys.refuse()
    n_ctx, n_head = keys.count("context_length"), sizes.n_head
    latent = _latent(keys)
    n_head_kv = keys.count("attention.head_count_kv", n_head)
    n_head_kv = n_head if latent else n_head_kv  # latent attention has one key a token in the cache, and one a head in the scores
    head_dim, value_dim = _head(keys, sizes, latent)
    if n_head % n_head_kv:
        raise keys.contradiction(f"{n_head} attention heads do not divide among {n_head_kv} key/value heads, expected a multiple")
    rope = _rope(keys, spec, head_dim, n_ctx)
    windows = _windows(keys, sizes.n_layer)
    logit_scale = keys.own_number("logit_scale") or 1.0
    return ModelConfig(
        arch=spec.name,
        n_layer=sizes.n_layer,
        n_embd=sizes.n_embd,
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=head_dim,
        n_ff=sizes.n_ff // (2 if spec.halved_ff else 1),
        n_vocab=source.tensors["token_embd.weight"].shape[0],
        n_ctx=n_ctx,
        norm_eps=keys.number("attention.layer_norm_rms_epsilon" if spec.block.norm == "rms" else "attention.layer_norm_epsilon"),
        kq_scale=_kq_scale(keys, head_dim) * (_yarn_scale(keys, rope) ** 2 if latent else 1.0),
        tied="output.weight" not in source.tensors,
        rope=rope,
        block=_block(source, keys, spec),
        value_dim=value_dim if value_dim != head_dim else 0,
        embedding_scale=keys.own_number("embedding_scale") or 1.0,
        residual_scale=keys.own_number("residual_scale") or 1.0,
        logit_scale=1 / logit_scale if spec.divides_logits else logit_scale,
        logit_softcap=keys.own_number("final_logit_softcapping"),
        score_softcap=keys.own_number("attn_logit_softcapping"),
        clamp_qkv=keys.own_number("attention.clamp_kqv"),
        alibi=keys.own_number("attention.max_alibi_bias"),
        temperature=keys.own_number("attention.temperature_scale"),
        temperature_length=int(keys.number("attention.temperature_length", 0)) or rope.n_ctx_orig,
        window=int(keys.own_number("attention.sliding_window")) if any(windows) else 0,
        window_layers=windows if any(windows) else (),
        window_rope=_window_rope(keys, spec, rope) if any(windows) else None,
        rope_layers=_turning(spec, windows),
        experts=_experts(keys, sizes),
        latent=latent,
        ignored_keys=keys.ignored(),
    )


def _check_layers(source: Source, keys: Keys, spec: ArchSpec, n_layer: int) -> None:
    """MissingTensorError when the header counts more layers than there are tensors of, CorruptFileError when it counts fewer.

    The layers that predict further tokens (nextn, MTP) come last; a file may have them or not.
    """
    numbers = (name.split(".")[1] for name in source.tensors if name.startswith("blk."))
    n_there = 1 + max((int(n) for n in numbers if n.isdigit()), default=-1)
    if n_layer > n_there:
        raise MissingTensorError(
            f"{keys.where}: there is no tensor 'blk.{n_there}.{spec.layer[0].name}': {keys.prefix}block_count is {n_layer}, but the file "
            f"has tensors of {count(n_there, 'layer')}. The header belongs to another model, or the file was converted incompletely: run "
            f"`quantscope inspect {keys.where}` to list its tensors."
        )
    if n_there > keys.count("block_count"):
        raise keys.contradiction(
            f"{keys.prefix}block_count is {keys.count('block_count')}, but the file has tensors of {count(n_there, 'layer')}"
        )


def _block(source: Source, keys: Keys, spec: ArchSpec) -> Block:
    if spec.lacking is not None and spec.lacking[0] not in source.tensors:
        return spec.lacking[1]
    return replace(spec.block, parallel=True) if keys.own("use_parallel_residual") else spec.block


def _sizes(keys: Keys, spec: ArchSpec) -> Sizes:
    n_embd, n_head = keys.count("embedding_length"), keys.count("attention.head_count")
    n_used = keys.get("expert_used_count") if "expert_used_count" in spec.reads else 0
    return Sizes(
        n_layer=keys.count("block_count") - int(keys.number("nextn_predict_layers", 0)),
        n_embd=n_embd,
        n_head=n_head,
        head_dim=keys.count("attention.key_length", n_embd // n_head),
        n_ff=keys.count("feed_forward_length"),
        n_expert_used=int(n_used or 0),
    )


def _head(keys: Keys, sizes: Sizes, latent: Latent | None) -> tuple[int, int]:
    """Channels of a head's key and value.  Latent attention's are those of the heads, not of the one vector in the cache."""
    value_length = keys.count("attention.value_length", sizes.head_dim)
    if latent and keys.get("attention.key_length_mla"):
        return keys.count("attention.key_length_mla"), keys.count("attention.value_length_mla")
    if value_length != sizes.head_dim and not latent:
        raise keys.unsupported("attention.value_length", value_length, f"{sizes.head_dim}, the length of a key")
    return sizes.head_dim, value_length


def _kq_scale(keys: Keys, head_dim: int) -> float:
    return keys.number("attention.scale", 0) or keys.own_number("attention.scale") or head_dim**-0.5


def _yarn_scale(keys: Keys, rope: RopeConfig) -> float:
    """By how much latent attention's q and k would each be longer under YaRN; its scores are multiplied by the square."""
    log = keys.own_number("rope.scaling.yarn_log_multiplier")
    return 1 + log * math.log(rope.factor) if rope.scaling == "yarn" and rope.factor > 1 else 1.0


def _latent(keys: Keys) -> Latent | None:
    rank = int(keys.own_number("attention.kv_lora_rank"))
    return Latent(int(keys.own_number("attention.q_lora_rank")), rank) if rank else None


def _windows(keys: Keys, n_layer: int) -> tuple[bool, ...]:
    """Which layers see a window: the file says it layer by layer, or that each last one of a period sees everything."""
    if not keys.own_number("attention.sliding_window"):
        return (False,) * n_layer
    pattern = keys.layers("attention.sliding_window_pattern")
    if pattern is not None:
        return tuple(bool(x) for x in pattern[:n_layer])
    period = int(keys.own_number("attention.sliding_window_pattern"))
    return tuple(period == 0 or i % period < period - 1 for i in range(n_layer))


def _turning(spec: ArchSpec, windows: tuple[bool, ...]) -> tuple[bool, ...]:
    turning = tuple(spec.turns(i, windowed, any(windows)) for i, windowed in enumerate(windows))
    return () if all(turning) else turning


def _window_rope(keys: Keys, spec: ArchSpec, rope: RopeConfig) -> RopeConfig | None:
    """The rotation of layers with a window, None where it is that of the others."""
    base = replace(rope, theta=keys.own_number("rope.freq_base_swa") or rope.theta)
    own = RopeConfig(base.theta, rope.dim, rope.layout, n_ctx_orig=rope.n_ctx_orig) if spec.window_unscaled else base
    return None if own == rope else own


def _experts(keys: Keys, sizes: Sizes) -> Experts | None:
    n_expert = int(keys.own_number("expert_count"))
    if n_expert == 0:
        return None
    if not 0 < sizes.n_expert_used <= n_expert:
        raise keys.contradiction(
            f"{keys.prefix}expert_used_count is {sizes.n_expert_used} and {keys.prefix}expert_count is {n_expert}, expected at least "
            f"one expert in use and no more than there are"
        )
    n_ff = int(keys.own_number("expert_feed_forward_length")) or sizes.n_ff
    shared, n_shared = int(keys.own_number("expert_shared_feed_forward_length")), int(keys.own_number("expert_shared_count"))
    lead, step = int(keys.own_number("leading_dense_block_count")), int(keys.own_number("interleave_moe_layer_step")) or 1
    gating = keys.own("expert_gating_func") or 0
    if gating not in GATINGS:
        raise keys.unsupported("expert_gating_func", gating, "1 (softmax), 2 (sigmoid) or 3 (softmax of the chosen)")
    return Experts(
        n_expert,
        sizes.n_expert_used,
        n_ff,
        (shared or n_ff) * n_shared if n_shared else shared,
        tuple(i >= lead and (i + 1) % step == 0 for i in range(sizes.n_layer)),
        GATINGS[gating],
        bool(keys.own("expert_weights_norm")) if {"expert_weights_norm"} & (keys.reads | keys.defaults.keys()) else True,
        keys.own_number("expert_weights_scale") or 1.0,
        int(keys.own_number("expert_group_count")) or 1,
        int(keys.own_number("expert_group_used_count")) or 1,
    )


def _scaling(keys: Keys, spec: ArchSpec) -> tuple[Scaling, float]:
    """How frequencies are scaled, and by how much."""
    kind = keys.get("rope.scaling.type") or "linear"  # llama.cpp's default; with no factor it scales nothing
    factor = keys.number("rope.scaling.factor", 0) or keys.number("rope.scale_linear", 0) or 1.0
    if kind == "longrope" and any(row.name == "rope_factors_long.weight" for row in spec.top):
        return "none", 1.0  # all of it is in tensors of factors, and in rope.scaling.attn_factor
    if kind not in ("none", "linear", "yarn"):
        raise keys.unsupported("rope.scaling.type", repr(kind), "'none', 'linear' or 'yarn'")
    scaling: Scaling = {"none": "none", "linear": "linear", "yarn": "yarn"}[kind]  # type: ignore[assignment]
    return ("none", 1.0) if kind == "linear" and factor == 1.0 else (scaling, factor)


def _rope(keys: Keys, spec: ArchSpec, head_dim: int, n_ctx: int) -> RopeConfig:
    turns = spec.rope is not None and keys.defaults.get("rope.dimension_count") != 0
    dim = keys.count("rope.dimension_count", head_dim) if turns else 0
    if dim > head_dim or dim % 2:
        raise keys.contradiction(f"{keys.prefix}rope.dimension_count is {dim}, expected an even number of at most {head_dim} (a head)")
    scaling, factor = _scaling(keys, spec)
    log = keys.own_number("rope.scaling.yarn_log_multiplier")
    default_magnitude = yarn_magnitude(factor) / (yarn_magnitude(factor, log) if log else 1.0) if scaling == "yarn" else 1.0
    if "attention.kv_lora_rank" in keys.reads and log:  # all of it is in the scale of the scores
        default_magnitude = 1.0
    magnitude = keys.number("rope.scaling.yarn_attn_factor", default_magnitude)
    return RopeConfig(
        theta=keys.number("rope.freq_base", 10000.0),
        dim=dim,
        layout=(spec.mrope if keys.any("rope.dimension_sections") else None) or spec.rope or "half",
        scaling=scaling,
        factor=factor,
        magnitude=(magnitude if scaling == "yarn" else 1.0) * keys.number("rope.scaling.attn_factor", 1.0),
        n_ctx_orig=keys.count("rope.scaling.original_context_length", n_ctx),
        beta_fast=keys.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=keys.number("rope.scaling.yarn_beta_slow", 1.0),
    )


def yarn_magnitude(factor: float, mscale: float = 1.0) -> float:
    """0.1 · mscale · ln(factor) + 1, or 1 where nothing is stretched.  Source: the YaRN paper, section 3.4."""
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0
