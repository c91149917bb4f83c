"""What one model is: sizes, norm, RoPE.  Frozen data, read from a GGUF header or a config.json by ``arch.read``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

RopeLayout: TypeAlias = Literal["interleaved", "half"]
Scaling: TypeAlias = Literal["none", "linear", "yarn"]


@dataclass(frozen=True)
class Llama3Scaling:
    """The four numbers of Llama-3.1's frequency scaling; a GGUF file holds their result as ``rope_freqs.weight`` instead."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    n_ctx_orig: int  # [tokens] context of the pretraining


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: the pair i of a head turns by position · θᵢ, and its length is multiplied by ``magnitude``.

        θᵢ = theta^(−2i/dim) / fᵢ,  i = 0 … dim/2 − 1,  fᵢ from rope_freqs.weight, else 1
        linear:  θᵢ / factor                  YaRN:  θᵢ · (rᵢ + (1 − rᵢ) / factor),  rᵢ the ramp of ``model.rope``

    layout: the pair i is channels (2i, 2i+1) when interleaved, (i, i + dim/2) when half.  Channels from ``dim`` on do not turn.
    """

    theta: float
    dim: int  # channels of a head that turn, ≤ head_dim
    layout: RopeLayout
    scaling: Scaling = "none"
    factor: float = 1.0
    magnitude: float = 1.0  # YaRN's "attention factor": multiplies cos and sin, so q·k is multiplied by its square
    n_ctx_orig: int = 0  # [tokens] context of the pretraining, YaRN only
    beta_fast: float = 32.0  # [turns over n_ctx_orig] pairs that turn more often keep their frequency
    beta_slow: float = 1.0  # [turns over n_ctx_orig] pairs that turn less often are interpolated by ``factor``
    llama3: Llama3Scaling | None = None  # from a config.json only


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of one model, under GGUF's names."""

    arch: str  # a key of ``arch.table.ARCHS``
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int
    n_vocab: int  # rows of token_embd.weight
    n_ctx: int  # [tokens] longest context of the training
    norm_eps: float
    kq_scale: float  # attention scores are q·k times this; 1/√head_dim unless the file says otherwise
    tied: bool  # the head is token_embd.weight
    rope: RopeConfig
    biases: frozenset[str] | None = None  # config.json's flags that are true (attention_bias, mlp_bias); None: the tensors decide
    ignored_keys: tuple[str, ...] = ()  # metadata keys of the architecture that nothing here knows, for the report

    @property
    def n_group(self) -> int:
        """Query heads that share one key/value head."""
        return self.n_head // self.n_head_kv

    def axis(self, letter: str) -> int:
        """Length of an axis of ``arch.table``: E F V D as everywhere, Q = H·D, K = n_head_kv·D, R = rope.dim/2, 1."""
        return {
            "E": self.n_embd,
            "F": self.n_ff,
            "V": self.n_vocab,
            "D": self.head_dim,
            "Q": self.n_head * self.head_dim,
            "K": self.n_head_kv * self.head_dim,
            "R": self.rope.dim // 2,
            "1": 1,
        }[letter]


def as_data(config: ModelConfig) -> dict[str, Any]:
    """The config as plain data that JSON can hold; ``rope_of`` reads its RoPE again."""
    return asdict(config) | {"biases": None if config.biases is None else sorted(config.biases)}


def rope_of(data: Mapping[str, Any]) -> RopeConfig:
    """The RoPE of a config that ``as_data`` made."""
    rope = dict(data["rope"])
    if rope.get("llama3") is not None:
        rope["llama3"] = Llama3Scaling(**rope["llama3"])
    return RopeConfig(**rope)
