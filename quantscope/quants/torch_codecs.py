"""Bytes ↔ float32 as torch operations: the same bits as ``quantscope.quants``, on the device where the tensor is.

    decode(raw, qtype)      uint8 [n_bytes]             →  float32 [n]
    encode(x, qtype)        float32 [..., n_per_row]    →  uint8 [n_bytes]

For weights on a GPU, which then never travel to the host and back; on the CPU the numba kernels are many times as fast.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from quantscope.errors import BlockError, NonFiniteError, ShapeError, UnsupportedTypeError
from quantscope.qtypes import QuantType
from quantscope.quants.torch_k import K_TYPES
from quantscope.quants.torch_legacy import LEGACY

SLAB = 1 << 24  # [elements] of one pass: 64 MiB as float32; the search for scales holds eleven of this size


class TorchCodec(Protocol):
    def decode(self, blocks: Tensor) -> Tensor:
        """uint8 [n_blocks, type_size] → float32 [n_blocks, block_size]."""

    def encode(self, x: Tensor, blocks: Tensor) -> None:
        """Write the blocks of finite x: float32 [n_blocks, block_size] → uint8 [n_blocks, type_size]."""


CODECS: dict[str, TorchCodec] = {**LEGACY, **K_TYPES}
TORCH_TYPES = tuple(CODECS)


def decode(raw: Tensor, qtype: QuantType) -> Tensor:
    """The float32 values stored in ``raw``, on its device.

    raw: uint8 [n_blocks · type_size] → float32 [n_blocks · block_size].
    Raises UnsupportedTypeError for types not in TORCH_TYPES, BlockError when the bytes are no whole number of blocks.
    """
    codec = _codec(qtype, "decode")
    if raw.dtype != torch.uint8 or raw.ndim != 1 or raw.numel() % qtype.type_size:
        raise BlockError(
            f"{raw.dtype}{list(raw.shape)} cannot be decoded as {qtype}: expected torch.uint8[n], n a multiple of {qtype.type_size} bytes "
            f"(one block of {qtype.block_size} elements). The tensor is probably cut short or of another type; `quantscope inspect FILE` "
            f"lists the type and size of every tensor."
        )
    blocks = raw.reshape(-1, qtype.type_size)
    out = torch.empty(len(blocks), qtype.block_size, dtype=torch.float32, device=raw.device)
    for slab in _slabs(blocks, qtype):
        out[slab] = codec.decode(blocks[slab])
    return out.flatten()


def encode(x: Tensor, qtype: QuantType) -> Tensor:
    """The bytes ggml makes of ``x`` without an importance matrix, on the device of x.

    x: float32 [..., n_per_row], blocks do not cross rows → uint8 [x.numel() / block_size · type_size].
    Raises UnsupportedTypeError for types not in TORCH_TYPES, ShapeError unless x is float32 with an axis, BlockError when n_per_row is no
    multiple of the block, NonFiniteError naming the first NaN or infinity.
    """
    codec = _codec(qtype, "encode")
    if x.dtype != torch.float32 or x.ndim == 0:
        raise ShapeError(
            f"{x.dtype}{list(x.shape)} cannot be encoded as {qtype}: expected torch.float32[..., n_per_row]. Convert it with `x.float()`, "
            f"and give a single number an axis."
        )
    qtype.row_bytes(x.shape[-1])
    values = x.reshape(-1, qtype.block_size)
    blocks = torch.empty(len(values), qtype.type_size, dtype=torch.uint8, device=x.device)
    for slab in _slabs(blocks, qtype):
        if not values[slab].isfinite().all():
            raise _non_finite(x, qtype)
        codec.encode(values[slab], blocks[slab])
    return blocks.flatten()


def _slabs(blocks: Tensor, qtype: QuantType) -> Iterator[slice]:
    """Consecutive blocks of up to SLAB elements."""
    step = SLAB // qtype.block_size
    for a in range(0, len(blocks), step):
        yield slice(a, a + step)


def _codec(qtype: QuantType, verb: str) -> TorchCodec:
    if qtype.name not in CODECS:
        raise UnsupportedTypeError(f"cannot {verb} {qtype} with torch: expected one of {', '.join(TORCH_TYPES)}. Use quantscope.quants.")
    return CODECS[qtype.name]


def _non_finite(x: Tensor, qtype: QuantType) -> NonFiniteError:
    """The error that names the first NaN or infinity in ``x``."""
    bad = ~x.isfinite()
    index = torch.unravel_index(bad.flatten().byte().argmax(), x.shape)
    at = "][".join(str(int(i)) for i in index)
    return NonFiniteError(
        f"element [{at}] of {list(x.shape)} is {float(x[index])}: expected finite numbers to encode as {qtype}, found {int(bad.sum())} of "
        f"{x.numel()} that are not. The file is damaged, or the model diverged in training, or overflowed when it was converted to F16: "
        f"`quantscope inspect FILE` lists its tensors; compare the file with the published one."
    )
