"""What one model is: sizes, norm, RoPE.  Frozen data, read from a GGUF header or a config.json by ``arch.read``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

RopeLayout: TypeAlias = Literal["interleaved", "half"]
Scaling: TypeAlias = Literal["none", "linear", "yarn"]
Norm: TypeAlias = Literal["rms", "layer"]  # x / √mean(x²), or (x − mean(x)) / σ(x)
Activation: TypeAlias = Literal["silu", "gelu", "gelu_erf", "relu", "relu2", "swiglu_oai"]
# (activation, whether a gate is multiplied in) → its name, and what ffn_swiglu is
ACTIVATION_NAMES: dict[tuple[Activation, bool], tuple[str, str]] = {
    ("silu", True): ("SwiGLU", "silu(gate)·up"),
    ("silu", False): ("SiLU", "silu(up)"),
    ("gelu", True): ("GeGLU", "gelu(gate)·up"),
    ("gelu", False): ("GELU", "gelu(up)"),
    ("gelu_erf", True): ("GeGLU", "gelu(gate)·up"),
    ("gelu_erf", False): ("GELU", "gelu(up)"),
    ("relu", True): ("ReGLU", "relu(gate)·up"),
    ("relu", False): ("ReLU", "relu(up)"),
    ("relu2", True): ("ReGLU²", "relu(gate)²·up"),
    ("relu2", False): ("ReLU²", "relu(up)²"),
    ("swiglu_oai", True): ("SwiGLU", "gate·σ(1.702·gate)·(1 + up), both cut at 7"),
}
Gating: TypeAlias = Literal["softmax", "sigmoid", "softmax of the chosen"]


@dataclass(frozen=True)
class Llama3Scaling:
    """The four numbers of Llama-3.1's frequency scaling; a GGUF file holds their result as ``rope_freqs.weight`` instead."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    n_ctx_orig: int  # [tokens] context of the pretraining


@dataclass(frozen=True)
class LongFactors:
    """LongRoPE's divisors of the frequencies, [dim/2] each; a GGUF file holds them as ``rope_factors_short.weight`` and ``_long``."""

    short: tuple[float, ...]  # of runs within the context of the pretraining
    long: tuple[float, ...]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: the pair i of a head turns by position · θᵢ, and its length is multiplied by ``magnitude``.

        θᵢ = theta^(−2i/dim) / fᵢ,  i = 0 … dim/2 − 1,  fᵢ from rope_freqs.weight, else 1
        linear:  θᵢ / factor                  YaRN:  θᵢ · (rᵢ + (1 − rᵢ) / factor),  rᵢ the ramp of ``model.rope``

    layout: the pair i is channels (2i, 2i+1) when interleaved, (i, i + dim/2) when half.  Channels from ``dim`` on do not turn.
    A model without RoPE has ``dim`` 0.
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
    truncate: bool = True  # whether the ends of YaRN's ramp are whole pairs; gpt-oss in Transformers has fractions of pairs
    llama3: Llama3Scaling | None = None  # from a config.json only
    longrope: LongFactors | None = None  # from a config.json only


@dataclass(frozen=True)
class Block:
    """How a decoder layer is put together; the defaults are Llama's.

        in turn:    h = h + post(attention(norm(h)));  h = h + post(ffn(norm(h)))
        parallel:   h = h + attention(norm(h)) + ffn(norm(h))

    A norm without a name is left out; one whose tensor the architecture does not have has no weight.
    """

    norm: Norm = "rms"
    attn_norm: str = "attn_norm"
    ffn_norm: str = "ffn_norm"  # in a parallel layer that has no such tensor, both branches read the same norm
    attn_post_norm: str = ""  # of what the attention adds to the stream
    ffn_post_norm: str = ""  # of what the feed-forward adds
    parallel: bool = False
    qk_norm: Literal["before", "after"] = "before"  # RoPE
    qk_norm_over: Literal["head", "all"] = "head"  # what a norm of q and k takes its mean over: a head, or all of them
    activation: Activation = "silu"
    fused: bool = False  # gate and up are one matrix, ffn_up [2F,E]


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: each token goes through ``n_used`` of ``n_expert`` feed-forwards, chosen by a router.

        p = gating(router(x)),  the n_used experts with the largest p (+ bias),  out = Σ wₑ · ffnₑ(x) (+ the shared experts' ffn(x))
        w = p of the chosen, divided by their sum where ``normalised``, times ``scale``

    n_group: experts are chosen from the ``n_group_used`` groups whose ``n_best`` best sum to most.  layers: which layers have experts.
    """

    n_expert: int
    n_used: int
    n_ff: int  # of one expert
    n_ff_shared: int  # of the shared experts together; 0: there are none
    layers: tuple[bool, ...]
    gating: Gating = "softmax"
    normalised: bool = True
    scale: float = 1.0
    n_group: int = 1
    n_group_used: int = 1
    n_best: int = 2  # 1 in Transformers' DeepSeek-V2


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2): keys and values come from one narrow vector a token, which all heads share.

        c = norm(kv_a · x)[:rank],  k = [k_b · c | RoPE(the rest of kv_a · x)],  v = v_b · c,  q = q_b · norm(q_a · x)

    A file has either k_b and v_b of each head, or both in one matrix kv_b.
    """

    q_rank: int  # 0: q is one product
    kv_rank: int


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
    block: Block = Block()
    value_dim: int = 0  # channels of a head's value; 0: head_dim
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what attention and feed-forward add to the stream
    logit_scale: float = 1.0
    logit_softcap: float = 0.0  # c · tanh(logits / c); 0: none
    score_softcap: float = 0.0  # c · tanh(scores / c), before the softmax
    clamp_qkv: float = 0.0  # q, k and v are cut to ± this; 0: they are not
    alibi: float = 0.0  # ALiBi's largest bias: a score falls by slope · distance
    temperature: float = 0.0  # q is multiplied by 1 + this · ln(1 + ⌊position / temperature_length⌋)
    temperature_length: int = 0  # [tokens]
    window: int = 0  # [tokens] a layer of ``window_layers`` sees this many positions, its own included
    window_layers: tuple[bool, ...] = ()  # empty: no layer
    window_rope: RopeConfig | None = None  # RoPE of these layers, where it is another
    rope_layers: tuple[bool, ...] = ()  # the layers that turn q and k; empty: all of them
    experts: Experts | None = None
    latent: Latent | None = None

    @property
    def n_group(self) -> int:
        """Query heads that share one key/value head."""
        return self.n_head // self.n_head_kv

    def window_of(self, i: int) -> int:
        """How many positions layer i sees, 0: all of them."""
        return self.window if self.window_layers and self.window_layers[i] else 0

    def rope_of(self, i: int) -> RopeConfig | None:
        """The rotation of layer i, None where there is none."""
        if self.rope.dim == 0 or (self.rope_layers and not self.rope_layers[i]):
            return None
        return self.window_rope if self.window_rope is not None and self.window_of(i) else self.rope

    def routes(self, i: int) -> bool:
        """Whether the feed-forward of layer i is a mixture of experts."""
        return self.experts is not None and self.experts.layers[i]

    def axis(self, letter: str) -> int:
        """Length of an axis of ``arch.table``, where the letters are explained."""
        x, c = self.experts or NO_EXPERTS, self.latent or NO_LATENT
        q, k, v = self.n_head * self.head_dim, self.n_head_kv * self.head_dim, self.value_dim or self.head_dim
        nope = self.head_dim - self.rope.dim  # of latent attention: channels of a key that do not turn
        return {
            "1": 1,
            "E": self.n_embd,
            "F": self.n_ff,
            "G": 2 * self.n_ff,
            "V": self.n_vocab,
            "P": self.n_ctx,
            "D": self.head_dim,
            "H": self.n_head,
            "J": self.n_head_kv,
            "Q": q,
            "K": k,
            "A": q + k + self.n_head_kv * v,
            "W": self.n_head_kv * v,
            "O": self.n_head * v,
            "R": self.rope.dim // 2,
            "X": x.n_expert,
            "M": x.n_ff,
            "2": 2 * x.n_ff,
            "S": x.n_ff_shared,
            "q": c.q_rank,
            "c": c.kv_rank,
            "a": c.kv_rank + self.rope.dim,
            "L": self.n_head * (c.kv_rank + self.rope.dim),
            "n": nope,
            "v": v,
            "b": self.n_head * (nope + v),
        }[letter]


NO_EXPERTS = Experts(0, 0, 0, 0, ())
NO_LATENT = Latent(0, 0)


def as_data(config: ModelConfig) -> dict[str, Any]:
    """The config as plain data that JSON can hold; ``rope_of`` reads its RoPE again."""
    return asdict(config) | {"biases": None if config.biases is None else sorted(config.biases)}


def rope_of(data: Mapping[str, Any]) -> RopeConfig:
    """The RoPE of a config that ``as_data`` made."""
    rope = dict(data["rope"])
    if rope.get("llama3") is not None:
        rope["llama3"] = Llama3Scaling(**rope["llama3"])
    if rope.get("longrope") is not None:
        rope["longrope"] = LongFactors(**rope["longrope"])
    return RopeConfig(**rope)
