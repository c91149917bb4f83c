"""A Hugging Face folder's config.json → ModelConfig.

Numbers that a GGUF file stores as float32 are rounded to float32 here as well, so that both files of one model mean the same.
Source: the configuration classes and modeling_rope_utils.py of Transformers; ``rope_parameters`` is the dictionary of
Transformers 5, ``rope_scaling`` with a separate ``rope_theta`` the older form.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from quantscope.arch.config import Llama3Scaling, ModelConfig, RopeConfig
from quantscope.arch.gguf_keys import yarn_magnitude
from quantscope.arch.names import to_hf
from quantscope.arch.table import ArchSpec, arch_of_hf_type
from quantscope.errors import CorruptFileError, UnsupportedFeatureError
from quantscope.sources.base import Source, missing_tensor, show

# Key → values that leave the forward as it is; any other value needs an operation that is not implemented.
REFUSED: Mapping[str, tuple[object, ...]] = {
    "hidden_act": ("silu", "swish"),
    "quantization_config": (None,),
    "partial_rotary_factor": (1,),
    "num_local_experts": (None, 0),
    "is_encoder_decoder": (False,),
}
REFUSED_ROPE: Mapping[str, tuple[object, ...]] = {
    "rope_type": ("default", "linear", "llama3", "yarn"),
    "partial_rotary_factor": (1,),
    "truncate": (True,),
    "mrope_section": (None,),
}


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

    def float32(self, key: str, default: float | None = None) -> float:
        return float(np.float32(self.number(key, default)))

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number ≥ 1."""
        value = self.number(key, default)
        if value < 1 or value != int(value):
            raise self.contradiction(f"{self.path + key!r} is {value}, expected a whole number of at least 1")
        return int(value)

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

    def contradiction(self, problem: str) -> CorruptFileError:
        return CorruptFileError(
            f"{self.where}: {problem}. The file contradicts itself: it was edited, or belongs to other weights; fetch the config.json "
            f"that was published with them."
        )


def config_from_hf(source: Source) -> ModelConfig:
    c = Json(source, source.metadata)
    spec = arch_of_hf_type(c.values.get("model_type"), where=show(source.path))
    c.refuse(REFUSED)
    n_ctx = c.count("max_position_embeddings")
    _refuse_window(c, n_ctx)
    embedding = to_hf("token_embd.weight")
    if embedding not in source.tensors:
        raise missing_tensor(source.path, str(embedding), source.tensors)
    n_embd, n_head = c.count("hidden_size"), c.count("num_attention_heads")
    n_head_kv = c.count("num_key_value_heads", n_head)
    head_dim = c.count("head_dim", n_embd // n_head)
    if n_head % n_head_kv:
        raise c.contradiction(f"{n_head} attention heads do not divide among {n_head_kv} key/value heads, expected a multiple")
    return ModelConfig(
        arch=spec.name,
        n_layer=c.count("num_hidden_layers"),
        n_embd=n_embd,
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=head_dim,
        n_ff=c.count("intermediate_size"),
        n_vocab=source.tensors[str(embedding)].shape[0],
        n_ctx=n_ctx,
        norm_eps=c.float32("rms_norm_eps", 1e-6),
        kq_scale=head_dim**-0.5,
        tied=bool(c.values.get("tie_word_embeddings", False)),
        rope=_rope(source, c, spec, head_dim, n_ctx),
        biases=frozenset(key for key in ("attention_bias", "mlp_bias") if c.values.get(key)),
    )


def _refuse_window(c: Json, n_ctx: int) -> None:
    window = c.values.get("sliding_window")
    if window is not None and window < n_ctx and c.values.get("use_sliding_window", True):
        raise c.unsupported("sliding_window", f"null or at least {n_ctx} (max_position_embeddings)")


def _rope(source: Source, c: Json, spec: ArchSpec, head_dim: int, n_ctx: int) -> RopeConfig:
    given = c.values.get("rope_parameters") or c.values.get("rope_scaling") or {}
    given = {"rope_type": given.get("type") or "default", "rope_theta": c.values.get("rope_theta")} | given
    r = Json(source, given, "rope_parameters.")
    r.refuse(REFUSED_ROPE)
    kind, layout = given["rope_type"], spec.rope or "half"
    theta = r.float32("rope_theta", 10000.0)
    if kind == "linear":
        return RopeConfig(theta, head_dim, layout, "linear", r.float32("factor"))
    if kind == "yarn":
        return _yarn(r, theta, head_dim, spec, n_ctx)
    if kind == "llama3":
        if "rope_freqs.weight" not in {row.name for row in spec.top}:
            raise r.unsupported("rope_type", f"'default', 'linear' or 'yarn' for {spec.name}")
        orig = r.count("original_max_position_embeddings", n_ctx)
        llama3 = Llama3Scaling(r.number("factor"), r.number("low_freq_factor"), r.number("high_freq_factor"), orig)
        return RopeConfig(theta, head_dim, layout, llama3=llama3)
    return RopeConfig(theta, head_dim, layout)


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
    )
