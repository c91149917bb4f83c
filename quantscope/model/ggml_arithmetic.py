"""The operations with the roundings of ggml's CPU code, flash attention off.

    forward(ids, weights, arithmetic=ggml_arithmetic(kv="F16"))

What is rounded, all in float32 otherwise:

    product with a block type    activations to Q8_0, Q8_1 or Q8_K; integers within a block (quants/dots.py)
    product with F16, BF16       activations to F16, BF16
    F16 key/value cache          k and v; q before q·k, the probabilities before their product with v: the second operand of a product is
                                 rounded to the type of the first
    RoPE                         the angle: θ is multiplied up in float32, pair by pair

    GELU                         a table of float16: its argument and its value, where |x| < 10

RMSNorm, softmax and SwiGLU are float32 as everywhere, in ggml's order of operations: where an activation lies between two codes, a
difference in the last place decides which it becomes, and some layers later that is no small difference any more.  So the order of ggml's
AVX2 code is followed throughout (docs/decisions/0008-ggml-arithmetic.md).

Source: ggml-cpu/ops.cpp, vec.h, ggml-cpu.c (``ggml_compute_forward_mul_mat``), llama-graph.cpp (``build_attn_mha``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from quantscope.arch.config import Activation, RopeConfig
from quantscope.images import Requantized
from quantscope.model import ops
from quantscope.model.arithmetic import Arithmetic
from quantscope.model.ops import PLAIN, Scores
from quantscope.model.rope import RopeTables, yarn_ramp
from quantscope.qtypes import KVType, QuantType
from quantscope.quants.dots import product
from quantscope.quants.float_dots import float_product
from quantscope.quants.float_ops import cos_sin, softmax, swiglu
from quantscope.quants.integers import LAYOUTS, Bytes
from quantscope.weights import LazyTensors, WeightProvider, Weights

# what activations become before a product with such weights
ROUNDED: dict[str, torch.dtype] = {"F16": torch.float16, "BF16": torch.bfloat16}
READS_A_PART = ("attn_k_b.weight",)  # its inputs are some channels of q; ggml multiplies float32 matrices only where all lie together


def ggml_arithmetic(kv: KVType = "F16") -> Arithmetic:
    """The arithmetic of llama.cpp on a CPU with a key/value cache of this type.  Float32 on the CPU only."""
    return GgmlArithmetic(kv)


class StoredTensors(LazyTensors):
    """The tensors of a layer, decoded when asked for, and how the file stores them."""

    def __init__(self, names: Mapping[str, str], tensors: Mapping[str, Tensor], weights: WeightProvider) -> None:
        super().__init__({name: name for name in tensors}, tensors.__getitem__, lambda name, n: ops.expert_matrix(tensors, name, n))
        self._canonical, self._weights = names, weights

    def type_of(self, local: str) -> QuantType:
        return _type_of(self._weights, self._canonical[local])

    def rows_of(self, local: str) -> Bytes:
        """The rows of a matrix of a block type as they are stored, uint8 [out, bytes of a row]; of a stack of them [n, out · bytes]."""
        return _rows_of(self._weights, self._canonical[local])


class GgmlArithmetic(Arithmetic):
    """See the head of this file."""

    def __init__(self, kv: KVType) -> None:
        self.kv = kv

    def layer(self, weights: WeightProvider, i: int, dtype: torch.dtype) -> StoredTensors:
        return StoredTensors(weights.layer_names(i), weights.layer(i), weights)

    def top(self, weights: WeightProvider, dtype: torch.dtype) -> StoredTensors:
        return StoredTensors(weights.top_names(), weights.top(), weights)

    def rope_tables(self, config: RopeConfig, positions: Tensor, factors: Tensor | None, dtype: torch.dtype) -> RopeTables:
        return rope_tables(config, positions, factors)

    def rotate(self, x: Tensor, tables: RopeTables, which: Literal["q", "k"]) -> Tensor:
        """One of the two products of each sum is rounded, the other is added to it in one step."""
        R = tables.cos.shape[-1]
        turning, still = x[..., : 2 * R], x[..., 2 * R :]
        interleaved = tables.layout == "interleaved"
        a, b = (turning[..., ::2], turning[..., 1::2]) if interleaved else turning.chunk(2, dim=-1)  # [B,T,H,R] each
        cos, sin = tables.cos[:, None], tables.sin[:, None]  # [T,1,R]
        turned = _multiply_add(a, cos, -(b * sin)), _multiply_add(a, sin, b * cos)
        return torch.cat([torch.stack(turned, dim=-1 if interleaved else -2).flatten(-2), still], dim=-1)

    def rms_norm(self, x: Tensor, w: Mapping[str, Tensor], name: str, eps: float) -> Tensor:
        """The squares and the mean are rounded to float32, the sum is not."""
        mean = ((x * x).sum(-1, keepdim=True, dtype=torch.float64) / x.shape[-1]).float().numpy()
        return x * torch.from_numpy(1 / np.sqrt(mean + np.float32(eps))) * w[f"{name}.weight"]  # torch's root can be off by one unit

    def layer_norm(self, x: Tensor, w: Mapping[str, Tensor], name: str, eps: float) -> Tensor:
        """Mean and variance in float32."""
        centred = x - x.mean(-1, keepdim=True)
        normed = centred * (1 / (centred.square().mean(-1, keepdim=True) + eps).sqrt())
        weight, bias = w.get(f"{name}.weight"), w.get(f"{name}.bias")
        normed = normed if weight is None else normed * weight
        return normed if bias is None else normed + bias

    def linear(self, x: Tensor, w: Mapping[str, Tensor], name: str, *, scale_last: bool = False) -> Tensor:
        assert isinstance(w, StoredTensors)  # what layer() and top() give
        return ops.scaled_and_shifted(_product(x, w, f"{name}.weight"), w, name, scale_last=scale_last)

    def expert_linear(self, x: Tensor, w: Mapping[str, Tensor], name: str, e: int) -> Tensor:
        """A row at a time, as ``ggml_mul_mat_id`` does."""
        assert isinstance(w, StoredTensors)
        return ops.expert_scaled_and_shifted(_expert_product(x, w, f"{name}.weight", e), w, name, e)

    def by_head(self, x: Tensor, w: Mapping[str, Tensor], name: str) -> Tensor:
        """A stack of matrices with a stack of inputs: nothing is interleaved."""
        assert isinstance(w, StoredTensors)
        heads = [_head_product(x[:, :, h].flatten(0, 1), w, f"{name}.weight", h) for h in range(x.shape[2])]  # [B·T,out] each
        return torch.stack(heads, dim=1).reshape(*x.shape[:3], -1)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float, how: Scores = PLAIN) -> Tensor:
        return self._mixed(self._probabilities(q, k, scale, how), v)

    def weighted_values(self, probs: Tensor, v: Tensor) -> Tensor:
        filled = F.pad(probs, (0, -probs.shape[-1] % 16))  # [B,H,T,S₁₆]
        return self._mixed(filled.reshape(len(v) * v.shape[2], -1, *filled.shape[2:]), v)

    def _mixed(self, groups: Iterable[Tensor], v: Tensor) -> Tensor:
        """The probabilities, B·K times [H/K,T,S₁₆], are rounded to the type of v [B,S,K,D]; one key/value head at a time → [B,T,H,D]."""
        mixed = []
        for probs, values in zip(groups, v.transpose(1, 2).flatten(0, 1), strict=True):  # [G,T,S₁₆], [S,D]
            T = probs.shape[1]
            columns = F.pad(self._cached(values), (0, 0, 0, probs.shape[-1] - len(values))).T.contiguous()  # [D,S₁₆]
            out = float_product(self._cached(probs.flatten(0, 1)).numpy(), columns.numpy(), by_rows=T == 1)
            mixed.append(torch.from_numpy(out).reshape(-1, T, out.shape[-1]))  # [G,T,D]
        return torch.cat(mixed).reshape(len(v), -1, *mixed[0].shape[1:]).transpose(1, 2)  # [B,T,H,D]

    def attention_map(self, q: Tensor, k: Tensor, scale: float, how: Scores = PLAIN) -> Tensor:
        probs = torch.cat(list(self._probabilities(q, k, scale, how)))  # [B·H,T,S₁₆]
        return probs.reshape(len(q), -1, *probs.shape[1:])[..., : k.shape[1]]

    def _probabilities(self, q: Tensor, k: Tensor, scale: float, how: Scores = PLAIN) -> Iterator[Tensor]:
        """softmax(q·kᵀ·scale + mask): [B,T,H,D], [B,S,K,D] → B·K times [H/K,T,S₁₆], the keys filled up to a multiple of 16."""
        T, S, n_kv = q.shape[1], k.shape[1], k.shape[2]
        queries = q.reshape(len(q), T, n_kv, -1, q.shape[-1]).permute(0, 2, 3, 1, 4).flatten(0, 1)  # [B·K,G,T,D]
        for n, (group, keys) in enumerate(zip(queries, k.transpose(1, 2).flatten(0, 1), strict=True)):
            columns = F.pad(self._cached(keys), (0, 0, 0, -S % 16))  # [S₁₆,D]
            rows = self._cached(group).reshape(-1, group.shape[-1])  # [G·T,D]
            scores = float_product(rows.numpy(), columns.numpy(), by_rows=T == 1 or self.kv == "F32").reshape(-1, T, len(columns))
            if how.plain:
                softmax(scores, scale, S - T)
                yield torch.from_numpy(scores)
            else:
                heads = slice(n % n_kv * len(group), (n % n_kv + 1) * len(group))
                yield _probabilities_of(torch.from_numpy(scores), scale, how, heads, q.shape[2], S)

    def _cached(self, x: Tensor) -> Tensor:
        """Rounded to the type of the cache: what is in it, and what is multiplied with it."""
        return x if self.kv == "F32" else x.half().float()

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        return torch.from_numpy(swiglu(gate.contiguous().numpy(), up.contiguous().numpy()))

    def activate(self, kind: Activation, gate: Tensor, up: Tensor | None) -> Tensor:
        if kind != "gelu":
            return super().activate(kind, gate, up)
        made = torch.where(gate.abs() < GELU_TABLE, ops.activate("gelu", gate.half().float(), None).half().float(), F.relu(gate))
        return made if up is None else made * up


GELU_TABLE = 10.0  # [−10, 10] is what the table is used for


def _probabilities_of(scores: Tensor, scale: float, how: Scores, heads: slice, n_head: int, S: int) -> Tensor:
    """The softmax of scores [G,T,S₁₆] with a window, a soft cap, ALiBi or sinks; in float32, the order of its sums is torch's."""
    seen = scores[..., :S] * scale  # [G,T,S]
    probs = ops.probabilities(seen[None], how, heads, n_head)[0]
    return F.pad(probs, (0, scores.shape[-1] - S))


def _expert_product(x: Tensor, w: StoredTensors, name: str, e: int) -> Tensor:
    """x · Wₑᵀ: x float32 [n,in] → [n,out]."""
    kind = w.type_of(name)
    if kind.name in LAYOUTS:
        return torch.from_numpy(product(x.numpy(), w.rows_of(name)[e].reshape(-1, kind.row_bytes(x.shape[-1])), kind))
    return _float_product(x, w.part(name, e), kind, by_rows=True)


def _head_product(x: Tensor, w: StoredTensors, name: str, h: int) -> Tensor:
    """x · Wₕᵀ: x float32 [n,in] → [n,out]."""
    kind = w.type_of(name)
    if kind.name in LAYOUTS:
        rows = w.rows_of(name)[h].reshape(-1, kind.row_bytes(x.shape[-1]))
        return torch.from_numpy(product(x.contiguous().numpy(), rows, kind, interleaves=False))
    return _float_product(x, w.part(name, h), kind, by_rows=kind.name == "F32" and name in READS_A_PART)


def _product(x: Tensor, w: StoredTensors, name: str) -> Tensor:
    """x · Wᵀ: x float32 [...,in] → [...,out]."""
    kind, rows = w.type_of(name), x.flatten(0, -2)
    y = torch.from_numpy(product(rows.numpy(), w.rows_of(name), kind)) if kind.name in LAYOUTS else _float_product(rows, w[name], kind)
    return y.reshape(*x.shape[:-1], -1)


def _float_product(x: Tensor, w: Tensor, kind: QuantType, *, by_rows: bool = False) -> Tensor:
    """x · Wᵀ of a type without blocks: x float32 [n,in], w float32 [out,in] → [n,out]."""
    as_matrices = not by_rows and len(x) > 1 and w.shape[0] % 4 == 0 and w.shape[1] % 8 == 0
    rounded = x.to(ROUNDED.get(kind.name, torch.float32)).float()
    return torch.from_numpy(float_product(rounded.numpy(), w.numpy(), by_rows=not as_matrices))


def _multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a · b + c with one rounding."""
    return (a.double() * b.double() + c.double()).float()


def rope_tables(rope: RopeConfig, positions: Tensor, factors: Tensor | None = None) -> RopeTables:
    """cos and sin of float32 angles: θ₀ = position, θᵢ₊₁ = θᵢ · theta^(−2/dim), each product rounded.

    Source: ``ggml_rope_cache_init`` and ``rope_yarn`` in ggml-cpu/ops.cpp.
    """
    R, one = rope.dim // 2, np.float32(1)
    step = np.float32(rope.theta) ** np.float32(-2.0 / rope.dim)
    theta = np.empty((len(positions), R), np.float32)
    theta[:, 0] = positions.numpy()
    for i in range(1, R):
        theta[:, i] = theta[:, i - 1] * step
    if factors is not None:
        theta /= factors.numpy()
    angles = theta
    if rope.scaling != "none":
        angles = theta * (one / np.float32(rope.factor))
    if rope.scaling == "yarn":
        keep = yarn_ramp(rope).float().numpy()
        angles = angles * (one - keep) + theta * keep
    magnitude = np.float32(rope.magnitude)
    cos, sin = cos_sin(angles)
    return RopeTables(torch.from_numpy(cos * magnitude), torch.from_numpy(sin * magnitude), rope.layout)


def _type_of(weights: WeightProvider, name: str) -> QuantType:
    """The type in which a provider stores a tensor."""
    if isinstance(weights, Requantized):
        return weights.types.get(name) or _type_of(weights.images.weights, name)
    assert isinstance(weights, Weights)
    return weights.stored(name).qtype


def _rows_of(weights: WeightProvider, name: str) -> Bytes:
    """The bytes of a matrix, uint8 [out, bytes of a row].  Rows of block types are never reordered: only GGUF files have them."""
    if isinstance(weights, Requantized):
        if name in weights.types:
            return weights.images.encoded(name, weights.types[name]).numpy().reshape(weights.images.weights.shape(name)[0], -1)
        return _rows_of(weights.images.weights, name)
    assert isinstance(weights, Weights)
    stored = weights.stored(name)
    return weights.source.raw(stored.name).reshape(stored.shape[0], -1)
