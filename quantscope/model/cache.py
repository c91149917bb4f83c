"""A quantized key/value cache: what attention reads is what the cache gives back, not what was put in.

    keys after RoPE, values  →  (rotated)  →  rounded to the type, block by block along head_dim  →  (rotated back)  →  attention

Everything else is exact, so the difference from an exact run is what the cache costs.  llama.cpp turns what it stores by a
Hadamard matrix H where the type is a quantized one and head_dim is a multiple of 64: outliers are spread over the block and
cost less.  It turns queries alike; H·H = 1, so turning back what was stored is the same.

Latent attention with a matrix of each head has one vector a token in its cache, [c | turned], whose first channels are the values.
llama.cpp does not turn it, and takes one type for both.

Source: ``build_attn`` in src/llama-graph.cpp, the constructor and ``build_input_k_rot`` of src/llama-kv-cache.cpp, llama.cpp as in
llama-cpp-python 0.3.36.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from quantscope.errors import UsageError
from quantscope.model.arithmetic import Arithmetic
from quantscope.model.latent import absorbs
from quantscope.qtypes import QTYPES, QuantType
from quantscope.quants import decode, encode
from quantscope.quants.iq4_nl import stored_iq4_nl
from quantscope.weights import WeightProvider

CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")  # as llama.cpp spells them
PLAIN = ("F32", "F16", "BF16")
ROTATED = 64  # [channels] head_dim must be a multiple of it


@dataclass(frozen=True)
class Held:
    """What a cache holds of a token in each layer: n keys of key_dim channels and n values of value_dim.

    shared: a value is the first channels of its key, as with latent vectors.
    """

    n: int
    key_dim: int
    value_dim: int
    shared: bool = False


def held_by(weights: WeightProvider) -> Held:
    """What a cache of this model holds."""
    c = weights.config
    if absorbs(weights.layer_names(0)):
        return Held(1, c.axis("a"), c.axis("c"), shared=True)
    return Held(c.n_head_kv, c.head_dim, c.value_dim or c.head_dim)


@dataclass(frozen=True)
class CacheTypes:
    """The types of keys and values, ``--cache-type-k`` and ``--cache-type-v`` of llama.cpp."""

    keys: QuantType
    values: QuantType

    @property
    def name(self) -> str:
        """``q8_0``, or ``q8_0/q4_0`` where values have another type than keys."""
        k, v = self.keys.name.lower(), self.values.name.lower()
        return k if k == v else f"{k}/{v}"

    def bytes_per_token(self, n_layer: int, held: Held) -> int:
        """n_layer · n · (bytes of a key + bytes of a value)."""
        value = 0 if held.shared else self.values.row_bytes(held.value_dim)
        return n_layer * held.n * (self.keys.row_bytes(held.key_dim) + value)


def parse_cache(given: str) -> CacheTypes:
    """``q8_0`` for both, or ``q8_0/q4_0`` for keys and values.  UsageError for what is no type of a cache."""
    names = given.strip().lower().split("/")
    if not 1 <= len(names) <= 2 or any(name not in CACHE_TYPES for name in names):
        raise UsageError(
            f"--kv {given!r}: expected one of {', '.join(CACHE_TYPES)}, or two of them for keys and values, as in --kv q8_0/q4_0. These "
            f"are the types of llama.cpp's --cache-type-k and --cache-type-v."
        )
    return CacheTypes(QTYPES[names[0].upper()], QTYPES[names[-1].upper()])


def check_cache(types: CacheTypes, held: Held) -> None:
    """UsageError where the blocks of a type do not fill what is held, and for two types of one vector, as in llama.cpp."""
    if held.shared and types.keys != types.values:
        raise UsageError(
            f"--kv {types.name}: the cache of this model's latent attention holds one vector a token, which is key and value, expected one "
            f"type. llama.cpp refuses two as well: give --kv {types.keys.name.lower()}."
        )
    what = "latent vectors" if held.shared else "heads"
    for qtype, n in ((types.keys, held.key_dim), (types.values, held.value_dim)):
        if n % qtype.block_size:
            raise UsageError(
                f"--kv {types.name}: {qtype.name} has blocks of {qtype.block_size}, and the {what} of this model have {n} channels, "
                f"expected a multiple. llama.cpp refuses such a cache too: give --kv f16 or bf16."
            )


class CachedArithmetic(Arithmetic):
    """Exact but for keys and values, which attention reads from a cache of these types.  turns: whether llama.cpp may turn them."""

    def __init__(self, types: CacheTypes, *, turns: bool = True) -> None:
        self.types, self.turns = types, turns

    def attention(self, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **more: Any) -> Tensor:
        return super().attention(q, self._keys(k), rounded(v, self.types.values, ROTATED if self.turns else 0), *rest, **more)

    def attention_map(self, q: Tensor, k: Tensor, *rest: Any, **more: Any) -> Tensor:
        return super().attention_map(q, self._keys(k), *rest, **more)

    def _keys(self, k: Tensor) -> Tensor:
        return rounded(k, self.types.keys, key_rotation(k.shape[-1]) if self.turns else 0)


def key_rotation(head_dim: int) -> int:
    """Size of the matrix that turns keys: the largest power of two that divides head_dim."""
    return head_dim & -head_dim


def rounded(x: Tensor, qtype: QuantType, rotation: int) -> Tensor:
    """What a cache of this type gives back for x [...,D]: the same shape and dtype.

    rotation: size of the Hadamard matrix, where D is a multiple of ROTATED and the type has blocks; 0: nothing turns.
    """
    if qtype.name == "F32":
        return x
    D = x.shape[-1]
    turned = rotation > 0 and qtype.name not in PLAIN and D % ROTATED == 0
    values = turn(x, rotation) if turned else x
    flat = values.float().cpu().contiguous().numpy()
    kept = stored_iq4_nl(flat) if qtype.name == "IQ4_NL" else decode(encode(flat, qtype, D), qtype)
    back = torch.from_numpy(kept).reshape(x.shape).to(x)
    return turn(back, rotation) if turned else back


def turn(x: Tensor, n: int) -> Tensor:
    """H·x for every n channels of x [...,D] in turn; turned twice, x is itself again."""
    turned: Tensor = x.reshape(*x.shape[:-1], -1, n) @ hadamard(n).to(x)
    return turned.flatten(-2)


@cache
def hadamard(n: int) -> Tensor:
    """The orthonormal Walsh–Hadamard matrix [n,n] float64, n a power of two: H₁ = 1, H₂ₙ = [[Hₙ, Hₙ], [Hₙ, −Hₙ]] / √2."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    scaled: Tensor = h / n**0.5
    return scaled
