"""How much goes through the model at a time, so that a study stays within a bound of memory.

    planned = runtime + weights of one layer, encoded in every type + one float32 tensor + hidden states of a batch
              + the larger of (one slice of chunks in a layer, one slice of positions and ids in the head)

A batch is what walks together from the embedding to the logits: the weights are read, encoded and decoded once for all of it, so it is as
large as the bound allows, up to BATCH_TOKENS, where preparing the weights no longer counts.  Batches are also what is stored and resumed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from quantscope.arch.config import ModelConfig
from quantscope.errors import UsageError
from quantscope.lockstep import Slices
from quantscope.qtypes import QuantType
from quantscope.results import PlanInfo
from quantscope.weights import Weights
from quantscope.wording import count, size

RUNTIME = 500 << 20  # [bytes] Python, torch, compiled kernels, the threads' and the allocator's own memory, as measured
BATCH_TOKENS = 8192
SLICE_TOKENS = 1024  # a matrix product is as fast as it gets from about here on
SLICE_POSITIONS = 1024
LOGIT_BYTES = 192 << 20  # [bytes] logits of all members at a time
BAND_BYTES = 64 << 20  # [bytes] the part of the output matrix that is decoded at a time

Types = Mapping[str, QuantType]  # canonical tensor name → type
Shapes = Mapping[str, tuple[int, ...]]


def make_plan(
    config: ModelConfig,
    shapes: Shapes,
    stored: Types,
    types: Sequence[Types],
    *,
    n_chunks: int,
    n_ctx: int,
    n_scored: int,
    memory: int,
    bytes_per_value: int = 4,
    n_stored: int = 0,
) -> PlanInfo:
    """The plan for ``n_chunks`` rows of ``n_ctx`` tokens, of which ``n_scored`` positions each go through the head.

    stored: how the file holds the tensors; types: how each variant holds them (the original's are ``stored``).  n_stored: distributions
    that are read from a file beside the variants' own.
    Raises UsageError when not even one chunk fits, with the bound that would do.
    """
    M, E, V = len(types), config.n_embd, config.n_vocab
    L = M + n_stored  # logits side by side
    fixed = RUNTIME + _weights(config, shapes, stored, types, bytes_per_value)
    stream = M * n_ctx * E * bytes_per_value  # hidden states of a chunk
    work = n_ctx * _channels_at_work(config) * bytes_per_value  # a chunk in a layer
    ids = max(1, min(V, BAND_BYTES // (bytes_per_value * E)))

    def positions(chunks: int) -> int:
        return max(1, min(SLICE_POSITIONS, chunks * n_scored, LOGIT_BYTES // (L * ids * bytes_per_value)))

    def needed(chunks: int, in_slice: int) -> int:
        n = positions(chunks)
        head = n * (L * ids + M * E) * bytes_per_value + ids * E * bytes_per_value
        return fixed + chunks * stream + max(in_slice * work, head)

    if needed(1, 1) > memory:
        raise _too_small(memory, needed(1, 1), config, M, n_ctx)
    most_in_slice = max(1, min(n_chunks, SLICE_TOKENS // n_ctx))
    in_slice = max(s for s in range(1, most_in_slice + 1) if needed(s, s) <= memory)
    most = max(in_slice, min(n_chunks, BATCH_TOKENS // n_ctx))
    chunks = max(c for c in range(in_slice, most + 1) if needed(c, in_slice) <= memory)
    n_batches = math.ceil(n_chunks / chunks)
    chunks = math.ceil(n_chunks / n_batches)  # equal batches
    return PlanInfo(n_batches, chunks, in_slice, positions(chunks), ids, needed(chunks, in_slice), memory)


def plan_of(weights: Weights, ids: Tensor, n_scored: int, stored: Types, types: Sequence[Types], memory: int, **sizes: int) -> PlanInfo:
    """``make_plan`` for ids [C,T] and the tensors of a file."""
    shapes = {name: weights.shape(name) for name in stored}
    n_chunks, n_ctx = ids.shape
    return make_plan(weights.config, shapes, stored, types, n_chunks=n_chunks, n_ctx=n_ctx, n_scored=n_scored, memory=memory, **sizes)


def slices(plan: PlanInfo) -> Slices:
    return Slices(plan.chunks_per_slice, plan.positions_per_slice, plan.ids_per_slice)


def _channels_at_work(c: ModelConfig) -> int:
    """Values per token while a member passes a layer: the reference's taps, which are kept, and the member's own at the widest moment."""
    q, kv = c.n_head * c.head_dim, c.n_head_kv * c.head_dim
    latent = c.axis("L") if c.latent else 0  # q as wide as latent vectors; key and value are repeated for every head
    taps = 6 * c.n_embd + 3 * q + 3 * kv + 3 * c.n_ff + latent
    return taps + max(3 * c.n_ff + 4 * c.n_embd, 6 * q + 4 * c.n_embd, 4 * latent + 4 * c.n_embd)


def _weights(config: ModelConfig, shapes: Shapes, stored: Types, types: Sequence[Types], bytes_per_value: int) -> int:
    """The largest layer (or head): its pages of the file, its bytes in every other type, and one tensor in float32."""
    layers: list[list[str]] = [[] for _ in range(config.n_layer)]
    top: list[str] = []
    for name in stored:
        number = name.split(".")[1] if name.startswith("blk.") else ""
        (layers[int(number)] if number.isdigit() and int(number) < config.n_layer else top).append(name)

    def held(names: Iterable[str]) -> int:
        kinds = {(name, t[name]) for name in names for t in (stored, *types) if name in t}  # another file may have split or joined matrices
        return sum(_bytes(shapes[name], qtype) for name, qtype in kinds)

    def largest(names: Iterable[str]) -> int:
        return max((math.prod(shapes[name]) for name in names), default=0) * bytes_per_value

    head = [name for name in top if name.startswith("output")] or top  # a tied head is the embedding
    of_layers = max((held(names) + 2 * largest(names) for names in layers), default=0)  # decoded, and while it is encoded
    return max(of_layers, held(head) + min(2 * BAND_BYTES, largest(head)))


def _bytes(shape: tuple[int, ...], qtype: QuantType) -> int:
    return math.prod(shape[:-1]) * qtype.row_bytes(shape[-1]) if shape else qtype.type_size


def _too_small(memory: int, needed: int, c: ModelConfig, n_members: int, n_ctx: int) -> UsageError:
    enough = math.ceil(needed / 1e8) / 10
    return UsageError(
        f"--memory {size(memory)}: one layer of this model ({count(c.n_layer, 'layer')} × {c.n_embd:,} channels) with "
        f"{count(n_members, 'variant')} (the original included) and one chunk of {n_ctx:,} tokens needs about {size(needed)}. Give "
        f"`--memory {enough:.1f}G`, fewer `--types`, or smaller chunks with `--ctx`."
    )
