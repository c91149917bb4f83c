"""GGUF metadata → ModelConfig.

Source: ``load_hparams`` in llama.cpp's src/llama-model.cpp and the key names of src/llama-arch.cpp.  A key of the architecture
falls into one of three classes: read here, refused unless it has a value that changes nothing, or known to change nothing.
Any other key is listed in ``ModelConfig.ignored_keys``, so that a report can say so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from quantscope.arch.config import ModelConfig, RopeConfig, Scaling
from quantscope.arch.table import ArchSpec, arch_spec
from quantscope.errors import CorruptFileError, UnsupportedFeatureError
from quantscope.sources.base import Source, missing_tensor, show

# Key → values that leave the forward as it is; any other value needs an operation that is not implemented.
REFUSED: Mapping[str, tuple[object, ...]] = {
    "expert_count": (0,),
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
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "hidden_activation": ("silu",),
    "use_parallel_residual": (False,),
    "swin_norm": (False,),
    "nextn_predict_layers": (0,),
    "num_loops": (0, 1),
    "rescale_every_n_layers": (0,),
    "tensor_data_layout": ("Meta AI original pth", "reference"),
    "rope.dimension_sections": (0,),
    "rope.scaling.alpha": (0, 1),
    "rope.scaling.yarn_ext_factor": (1, -1),
    "rope.scaling.yarn_log_multiplier": (0,),
}
HARMLESS = frozenset({"vocab_size", "rope.scaling.finetuned", "pooling_type", "expert_used_count", "attention.layer_norm_epsilon"})


class Keys:
    """The metadata keys of one architecture, "llama.block_count" as "block_count"; remembers which were asked for."""

    def __init__(self, source: Source, arch: str) -> None:
        self.where, self.prefix = show(source.path), f"{arch}."
        self.values = {k[len(self.prefix) :]: v for k, v in source.metadata.items() if k.startswith(self.prefix)}
        self.asked: set[str] = set()

    def get(self, key: str) -> Any:
        """The value, or None; an array of equal numbers (one a layer) as that number."""
        self.asked.add(key)
        value = self.values.get(key)
        if not isinstance(value, np.ndarray):
            return value
        if value.size == 0 or (value != value[0]).any():
            raise self.unsupported(key, np.array2string(value, threshold=8, separator=", "), "the same value for every layer")
        return value[0].item()

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        if value is None:
            value = default
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
            value = self.get(key) if key != "rope.dimension_sections" else self._any(key)
            if value is not None and value not in neutral:
                raise self.unsupported(key, repr(value), f"{' or '.join(map(repr, neutral))}, or no such key")

    def _any(self, key: str) -> Any:
        self.asked.add(key)
        value = self.values.get(key)
        return None if value is None else int(np.any(value))

    def ignored(self) -> tuple[str, ...]:
        return tuple(self.prefix + key for key in self.values if key not in self.asked and key not in HARMLESS)


def config_from_gguf(source: Source) -> ModelConfig:
    spec = arch_spec(source.metadata.get("general.architecture"), where=show(source.path))
    keys = Keys(source, spec.name)
    keys.refuse()
    if "token_embd.weight" not in source.tensors:
        raise missing_tensor(source.path, "token_embd.weight", source.tensors)
    n_embd, n_head, n_ctx = keys.count("embedding_length"), keys.count("attention.head_count"), keys.count("context_length")
    n_head_kv = keys.count("attention.head_count_kv", n_head)
    head_dim = keys.count("attention.key_length", n_embd // n_head)
    value_length = keys.count("attention.value_length", head_dim)
    if value_length != head_dim:
        raise keys.unsupported("attention.value_length", value_length, f"{head_dim}, the length of a key")
    if n_head % n_head_kv:
        raise keys.contradiction(f"{n_head} attention heads do not divide among {n_head_kv} key/value heads, expected a multiple")
    return ModelConfig(
        arch=spec.name,
        n_layer=keys.count("block_count"),
        n_embd=n_embd,
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=head_dim,
        n_ff=keys.count("feed_forward_length"),
        n_vocab=source.tensors["token_embd.weight"].shape[0],
        n_ctx=n_ctx,
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        kq_scale=keys.number("attention.scale", 0) or head_dim**-0.5,
        tied="output.weight" not in source.tensors,
        rope=_rope(keys, spec, head_dim, n_ctx),
        ignored_keys=keys.ignored(),
    )


def _rope(keys: Keys, spec: ArchSpec, head_dim: int, n_ctx: int) -> RopeConfig:
    dim = keys.count("rope.dimension_count", head_dim)
    if dim > head_dim or dim % 2:
        raise keys.contradiction(f"{keys.prefix}rope.dimension_count is {dim}, expected an even number of at most {head_dim} (a head)")
    scaling: Scaling = keys.get("rope.scaling.type") or "linear"  # llama.cpp's default; with no factor it scales nothing
    factor = keys.number("rope.scaling.factor", 0) or keys.number("rope.scale_linear", 0) or 1.0
    if scaling not in ("none", "linear", "yarn"):
        raise keys.unsupported("rope.scaling.type", repr(scaling), "'none', 'linear' or 'yarn'")
    if scaling == "linear" and factor == 1.0:
        scaling = "none"
    default_magnitude = yarn_magnitude(factor) if scaling == "yarn" else 1.0
    magnitude = keys.number("rope.scaling.yarn_attn_factor", default_magnitude)
    return RopeConfig(
        theta=keys.number("rope.freq_base", 10000.0),
        dim=dim,
        layout=spec.rope,
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
