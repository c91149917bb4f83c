"""The operations with the roundings of a Transformers model in bfloat16 on a CPU, eager attention.

    forward(ids, weights, arithmetic=Bf16Arithmetic())

bfloat16 keeps 8 significant bits, so rounding changes a value by up to 2⁻⁸ of it.  What is rounded:

    weights             all of them, also biases and norms
    every operation     its result: of a product after sums in float32; of q·kᵀ, and again when it is scaled; of a residual sum
    RMSNorm, softmax    float32 inside, rounded at the end; a norm's weight is multiplied after that, in bfloat16
    RoPE                cos and sin of float32 angles; both products of each sum, and the sum
    SwiGLU              silu(gate), and its product with up

The same operations of torch are called in the same order.  What comes in and goes out is float32 that holds bfloat16 values.

That is so for the architectures in TO_THE_BIT; ``limits`` says it of the others.

Source: modeling_llama.py, modeling_qwen2.py and modeling_qwen3.py of Transformers 5 (``eager_attention_forward``, ``apply_rotary_pos_emb``,
``LlamaRMSNorm``, ``LlamaMLP``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from quantscope.arch.config import Activation, RopeConfig
from quantscope.errors import UnsupportedFeatureError
from quantscope.language import english
from quantscope.model import ops
from quantscope.model.arithmetic import Arithmetic, cast
from quantscope.model.ops import PLAIN, Scores
from quantscope.model.rope import RopeTables, frequencies
from quantscope.weights import WeightProvider
from quantscope.wording import listed

BF16 = torch.bfloat16
# architectures whose taps are Transformers' own to the bit; others that are not refused round somewhere else too: OLMo 2 in the norms,
# ERNIE 4.5 in RoPE, Granite and MiniCPM3 where the embedding is scaled, Ministral 3 where q is
TO_THE_BIT = ("llama", "qwen2", "qwen3", "smollm3", "seed_oss", "hunyuan-dense", "glm4", "phi3")


def limits(arch: str) -> tuple[str, ...]:
    """What to say of a run in bfloat16, or of one that stands for it: that its prediction is no more than near, or nothing."""
    if arch in TO_THE_BIT:
        return ()
    return (
        english(
            "What Transformers rounds in bfloat16 is emulated to the bit for {known}, not for {arch}: a floor predicted for it is an "
            "estimate. Compare in float32 to be sure.",
            known=listed(TO_THE_BIT),
            arch=arch,
        ),
    )


def unsupported(feature: str) -> UnsupportedFeatureError:
    return UnsupportedFeatureError(
        f"--arithmetic bf16: the model has {feature}, expected a model like llama, qwen2 or qwen3. What Transformers rounds there in "
        f"bfloat16 is not emulated; use `--arithmetic exact`, or compare in float32 with `--engine transformers --dtype float32`."
    )


class Bf16Arithmetic(Arithmetic):
    """See the head of this file."""

    def embed(self, weights: WeightProvider, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return super().embed(weights, ids, dtype).to(BF16).to(dtype)

    def layer(self, weights: WeightProvider, i: int, dtype: torch.dtype) -> Mapping[str, Tensor]:
        return cast(weights.layer(i), BF16)

    def top(self, weights: WeightProvider, dtype: torch.dtype) -> Mapping[str, Tensor]:
        return cast(weights.top(), BF16)

    def rope_tables(self, config: RopeConfig, positions: Tensor, factors: Tensor | None, dtype: torch.dtype) -> RopeTables:
        angles = positions.float()[:, None] * frequencies(config, factors).float().to(positions.device)  # [T,R] in float32
        return RopeTables((angles.cos() * config.magnitude).to(BF16), (angles.sin() * config.magnitude).to(BF16), config.layout)

    def rotate(self, x: Tensor, tables: RopeTables, which: Literal["q", "k"]) -> Tensor:
        R = tables.cos.shape[-1]
        x = x.to(BF16)
        turning, still = x[..., : 2 * R], x[..., 2 * R :]
        interleaved = tables.layout == "interleaved"
        a, b = (turning[..., ::2], turning[..., 1::2]) if interleaved else turning.chunk(2, dim=-1)  # [B,T,H,R] each
        cos, sin = tables.cos[:, None], tables.sin[:, None]  # [T,1,R]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1 if interleaved else -2).flatten(-2)
        return torch.cat([turned, still], dim=-1).float()

    def rms_norm(self, x: Tensor, w: Mapping[str, Tensor], name: str, eps: float) -> Tensor:
        x = x.to(BF16).float()
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)  # in float32
        return (w[f"{name}.weight"] * normed.to(BF16)).float()

    def linear(self, x: Tensor, w: Mapping[str, Tensor], name: str, *, scale_last: bool = False) -> Tensor:
        x = x.to(BF16)
        if f"{name}.scale" in w:  # of llama.cpp only
            return ops.linear(x, w, name, scale_last=scale_last).float()
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias")).float()  # the bias is added before the sum is rounded

    def layer_norm(self, x: Tensor, w: Mapping[str, Tensor], name: str, eps: float) -> Tensor:
        raise unsupported("LayerNorm")

    def expert_linear(self, x: Tensor, w: Mapping[str, Tensor], name: str, e: int) -> Tensor:
        raise unsupported("a mixture of experts")

    def by_head(self, x: Tensor, w: Mapping[str, Tensor], name: str) -> Tensor:
        raise unsupported("latent attention with a matrix of each head")

    def activate(self, kind: Activation, gate: Tensor, up: Tensor | None) -> Tensor:
        if kind != "silu" or up is None:
            raise unsupported(f"the activation {kind}" if up is not None else f"a feed-forward without a gate ({kind})")
        return self.swiglu(gate, up)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float, how: Scores = PLAIN) -> Tensor:
        return self.weighted_values(self.attention_map(q, k, scale, how), v)

    def attention_map(self, q: Tensor, k: Tensor, scale: float, how: Scores = PLAIN) -> Tensor:
        if not how.plain:
            raise unsupported("attention with a window, a soft cap, ALiBi or sinks")
        T, S, G = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
        q, k = (z.to(BF16).transpose(1, 2) for z in (q, k.repeat_interleave(G, 2)))  # [B,H,T,D], [B,H,S,D]
        future = torch.full((T, S), -torch.inf, dtype=BF16, device=q.device).triu(S - T + 1)
        scores = torch.matmul(q, k.transpose(2, 3)) * scale + future  # [B,H,T,S]
        return scores.softmax(-1, dtype=torch.float32).to(BF16).float()

    def weighted_values(self, probs: Tensor, v: Tensor) -> Tensor:
        values = v.repeat_interleave(probs.shape[1] // v.shape[2], 2).to(BF16).transpose(1, 2)  # [B,H,S,D]
        return torch.matmul(probs.to(BF16), values).transpose(1, 2).float()  # [B,T,H,D]

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        return (F.silu(gate.to(BF16)) * up.to(BF16)).float()

    def residual(self, h: Tensor, x: Tensor, branch: Literal["attn", "ffn"]) -> Tensor:
        return (h.to(BF16) + x.to(BF16)).float()
