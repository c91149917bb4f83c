"""bitsandbytes: 4-bit codes (NF4, FP4) with one scale a block, these scales quantized again or not; and LLM.int8.

Source: ``QuantState`` and ``dequantize_4bit`` in bitsandbytes/functional.py, ``Int8Params`` in bitsandbytes/nn/modules.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from quantscope.errors import CorruptFileError
from quantscope.sources.base import show
from quantscope.sources.packed.parts import Floats, Packed, Parts

STATE = ".quant_state.bitsandbytes__"  # then "nf4" or "fp4"
NESTED = ("nested_absmax", "nested_quant_map")


def four_bits(parts: Parts) -> Iterator[Packed]:
    """NAME uint8 [n/2, 1]: two codes a byte, the first in its high half.  NAME.absmax, one a block of ``blocksize`` values in a row:
    float32, or uint8 codes of a second quantization (``nested``).  NAME.quant_map float32 [16]: value of each code.
    """
    for kind in ("nf4", "fp4"):
        for name in parts.ending(STATE + kind):
            state_name = name + STATE + kind
            state = _state(parts, state_name)
            names = [name, state_name, f"{name}.absmax", f"{name}.quant_map"]
            names += [f"{name}.{part}" for part in NESTED] if "nested_blocksize" in state else []
            parts.need(*names)
            shape = tuple(int(n) for n in state["shape"])
            if math.prod(parts.shape(name)) != -(-math.prod(shape) // 2):
                raise parts.wrong(name, f"{-(-math.prod(shape) // 2)} bytes for {list(shape)}")
            yield Packed(name, shape, tuple(names), partial(_four_bit_values, parts, name, state, shape))


def _state(parts: Parts, name: str) -> Mapping[str, Any]:
    """The JSON object that is stored as a tensor of its bytes."""
    try:
        state = json.loads(parts.array(name).tobytes())
        if isinstance(state, dict) and state["blocksize"] > 0 and all(n > 0 for n in state["shape"]):
            return state
    except (ValueError, KeyError, TypeError):
        pass
    raise CorruptFileError(
        f"{show(parts.path)}: tensor {name!r} holds no description of packed weights, expected JSON with 'blocksize' and 'shape'. The file "
        f"was damaged or written by another program: fetch it again."
    )


def _four_bit_values(parts: Parts, name: str, state: Mapping[str, Any], shape: tuple[int, ...]) -> Floats:
    n, codes = math.prod(shape), parts.array(name).reshape(-1)
    values = parts.array(f"{name}.quant_map")[np.stack([codes >> 4, codes & 15], axis=1).reshape(-1)[:n]]
    absmax = parts.array(f"{name}.absmax").reshape(-1)
    if "nested_blocksize" in state:
        outer = np.repeat(parts.array(f"{name}.nested_absmax"), state["nested_blocksize"])[: len(absmax)]
        absmax = parts.array(f"{name}.nested_quant_map")[absmax] * outer + np.float32(state["nested_offset"])
    out: Floats = values * np.repeat(absmax, state["blocksize"])[:n]
    return out.reshape(shape)


def eight_bits(parts: Parts) -> Iterator[Packed]:
    """NAME.weight int8 [out,in] with NAME.SCB float32 [out], the largest absolute value of each row: weight = code · SCB / 127."""
    for base in parts.ending(".SCB"):
        name, scale = f"{base}.weight", f"{base}.SCB"
        shape = parts.shape(name)
        if parts.shape(scale) != shape[:1]:
            raise parts.wrong(scale, str(list(shape[:1])))
        extra = [f"{base}.weight_format"] if f"{base}.weight_format" in parts.tensors else []
        yield Packed(name, shape, (name, scale, *extra), partial(_eight_bit_values, parts, name, scale))


def _eight_bit_values(parts: Parts, name: str, scale: str) -> Floats:
    rows = parts.array(scale) / np.float32(127)
    values: Floats = np.multiply(parts.array(name), rows[:, None], dtype=np.float32)
    return values
