"""8-bit floats or integers with scales beside them (FP8, compressed-tensors), and MXFP4 experts.

Source: integrations/finegrained_fp8.py and integrations/mxfp4.py of Transformers; OCP Microscaling Formats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from quantscope.sources.packed.parts import Array, Floats, Packed, Parts

SCALES = ("_scale_inv", "_scale")  # behind the name of the weight; both are multiplied with it, whatever they are called
ONE_BYTE = ("F8_E4M3", "F8_E5M2", "I8")
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)  # E2M1


def scaled(parts: Parts) -> Iterator[Packed]:
    """weight one byte a value, with one scale for all of it, one a row, or one a block of ``weight_block_size``."""
    for name in [n for n, t in parts.tensors.items() if t.qtype.name in ONE_BYTE]:
        scale = next((name + suffix for suffix in SCALES if name + suffix in parts.tensors), None)
        if scale is None:
            if parts.tensors[name].qtype.name != "I8":  # a float without a scale is its own value
                yield Packed(name, parts.shape(name), (name,), partial(parts.array, name))
            continue
        _spread(parts, name, scale)
        yield Packed(name, parts.shape(name), (name, scale), partial(_scaled_values, parts, name, scale))


def _scaled_values(parts: Parts, name: str, scale: str) -> Floats:
    values: Floats = parts.array(name).astype(np.float32) * _spread(parts, name, scale)
    return values


def _spread(parts: Parts, name: str, scale: str) -> Array:
    """The scales in a shape that is multiplied with the weight's; CorruptFileError where they do not cover it."""
    shape, values = parts.shape(name), parts.array(scale)
    if values.size == 1:
        return values.reshape(())
    if values.shape in (shape[:1], (*shape[:-1], 1)):
        return values.reshape(*values.shape, *[1] * (len(shape) - values.ndim))
    block = parts.settings.get("weight_block_size")
    known = isinstance(block, list) and len(block) == 2 and values.ndim == len(shape) > 1
    if not isinstance(block, list) or not known or values.shape != (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1])):
        raise parts.wrong(scale, f"one scale, one a row, or one a block of {block} (weight_block_size) of {list(shape)}")
    return np.repeat(np.repeat(values, block[0], -2), block[1], -1)[..., : shape[-2], : shape[-1]]


def mxfp4(parts: Parts) -> Iterator[Packed]:
    """NAME_blocks uint8 [experts, out, groups, 16]: 32 values of 4 bits, the first in the low half of a byte.  NAME_scales uint8
    [experts, out, groups]: exponents of two, plus 127.  Unpacked it is NAME [experts, in, out], as Transformers has it.
    """
    for base in parts.ending("_blocks"):
        blocks, scales = base + "_blocks", base + "_scales"
        shape = parts.shape(blocks)
        if len(shape) != 4 or shape[-1] != 16:
            raise parts.wrong(blocks, "[experts, out, groups, 16]")
        if parts.shape(scales) != shape[:-1]:
            raise parts.wrong(scales, str(list(shape[:-1])))
        yield Packed(base, (shape[0], shape[2] * 32, shape[1]), (blocks, scales), *_mxfp4_readers(parts, blocks, scales))


def _mxfp4_readers(parts: Parts, blocks: str, scales: str) -> tuple[Callable[[], Floats], Callable[[slice], Floats]]:
    """What reads all experts, and what reads some of them: a large model's experts of one layer are gigabytes in float32."""
    some = partial(_mxfp4_values, parts, blocks, scales)
    return partial(some, slice(None)), some


def _mxfp4_values(parts: Parts, blocks: str, scales: str, which: slice) -> Floats:
    codes, exponents = parts.array(blocks)[which], parts.array(scales)[which].astype(np.int32) - 127
    values = np.ldexp(FP4[np.stack([codes & 15, codes >> 4], axis=-1)], exponents[..., None, None])  # [experts,out,groups,16,2]
    return np.ascontiguousarray(values.reshape(*codes.shape[:2], -1).transpose(0, 2, 1))
