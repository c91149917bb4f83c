"""Which architectures there are: one ArchSpec row each.  A new one is a new row here and nothing else.

Tensors are listed under GGUF names with row-major shapes in axis letters (``ModelConfig.axis``): E n_embd, F n_ff, V n_vocab,
D head_dim, Q = n_head·D, K = n_head_kv·D, R = rope.dim/2, 1.  Sources: ``load_arch_tensors`` in llama.cpp's src/models/*.cpp and
the modules of Transformers' modeling_{llama,qwen2,qwen3}.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quantscope.arch.config import ModelConfig, RopeLayout
from quantscope.errors import UnsupportedArchitectureError


@dataclass(frozen=True)
class TensorRow:
    """One tensor of an architecture: its (layer-local) name, its axes, and whether a file may lack it."""

    name: str
    axes: str
    needed: bool = True
    flag: str | None = None  # the key of a config.json that says whether the tensor is there

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        return tuple(config.axis(a) for a in self.axes)


@dataclass(frozen=True)
class ArchSpec:
    """What distinguishes one decoder architecture from another."""

    name: str  # general.architecture
    hf_types: tuple[str, ...]  # model_type in config.json
    rope: RopeLayout  # of the canonical tensors
    top: tuple[TensorRow, ...]
    layer: tuple[TensorRow, ...]
    hf_half_split: tuple[str, ...] = ()  # linears whose HF rows are in half-split order where the canonical ones are interleaved


def need(*rows: tuple[str, str]) -> tuple[TensorRow, ...]:
    return tuple(TensorRow(name, axes) for name, axes in rows)


def may(*rows: tuple[str, str], flag: str | None = None) -> tuple[TensorRow, ...]:
    return tuple(TensorRow(name, axes, needed=False, flag=flag) for name, axes in rows)


LINEARS = (
    ("attn_q", "QE"),
    ("attn_k", "KE"),
    ("attn_v", "KE"),
    ("attn_output", "EQ"),
    ("ffn_gate", "FE"),
    ("ffn_up", "FE"),
    ("ffn_down", "EF"),
)

TOP = need(("token_embd.weight", "VE"), ("output_norm.weight", "E")) + may(("output.weight", "VE"), ("output.scale", "1"))
ROPE_FREQS = may(("rope_freqs.weight", "R"))
LAYER = (
    need(("attn_norm.weight", "E"), ("ffn_norm.weight", "E"))
    + need(*((f"{name}.weight", axes) for name, axes in LINEARS))
    + may(*((f"{name}.scale", "1") for name, _ in LINEARS))
)
QKV_BIAS = (("attn_q.bias", "Q"), ("attn_k.bias", "K"), ("attn_v.bias", "K"))
OUT_BIAS = (("attn_output.bias", "E"),)
FFN_BIAS = (("ffn_gate.bias", "F"), ("ffn_up.bias", "F"), ("ffn_down.bias", "E"))
QK_NORM = (("attn_q_norm.weight", "D"), ("attn_k_norm.weight", "D"))

ARCHS: dict[str, ArchSpec] = {
    spec.name: spec
    for spec in (
        ArchSpec(
            name="llama",
            hf_types=("llama", "mistral"),
            rope="interleaved",
            top=TOP + ROPE_FREQS,
            layer=LAYER + may(*QKV_BIAS, *OUT_BIAS, flag="attention_bias") + may(*FFN_BIAS, flag="mlp_bias"),
            hf_half_split=("attn_q", "attn_k"),
        ),
        ArchSpec(
            name="qwen2",
            hf_types=("qwen2",),
            rope="half",
            top=TOP + may(("output.bias", "V")),
            layer=LAYER + need(*QKV_BIAS),
        ),
        ArchSpec(
            name="qwen3",
            hf_types=("qwen3",),
            rope="half",
            top=TOP,
            layer=LAYER + need(*QK_NORM) + may(*QKV_BIAS, *OUT_BIAS, flag="attention_bias"),
        ),
    )
}


def arch_spec(name: object, *, where: str) -> ArchSpec:
    """The row of a GGUF file's ``general.architecture``; UnsupportedArchitectureError with the list of names otherwise."""
    return _pick("general.architecture", name, ARCHS, where)


def arch_of_hf_type(model_type: object, *, where: str) -> ArchSpec:
    """The row of a config.json's ``model_type``; UnsupportedArchitectureError with the list of types otherwise."""
    return _pick("model_type", model_type, {t: spec for spec in ARCHS.values() for t in spec.hf_types}, where)


def _pick(key: str, name: object, rows: Mapping[str, ArchSpec], where: str) -> ArchSpec:
    if isinstance(name, str) and name in rows:
        return rows[name]
    found = "is missing" if name is None else f"is {name!r}"
    raise UnsupportedArchitectureError(
        f"{where}: the architecture ({key}) {found}, expected one of {', '.join(rows)}. The reference forward does not know "
        f"it yet, or the file is no language model: `quantscope inspect {where}` lists what it holds."
    )
