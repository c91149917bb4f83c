"""Integers with a scale and a zero a group of inputs: GPTQ, AWQ and the ``pack-quantized`` format of compressed-tensors.

    weight[o,i] = scale[g,o] · (code[i,o] − zero[g,o]),  g the group of input i

Source: ``QuantLinear`` of AutoGPTQ and GPTQModel, awq/utils/packing_utils.py of AutoAWQ, compressed_tensors/compressors of
compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from quantscope.sources.packed.parts import Array, Floats, Packed, Parts, unpacked

GPTQ_BITS = (2, 3, 4, 8)
GPTQ_PARTS = (".qweight", ".qzeros", ".scales")
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word of eight 4-bit codes each output is


def gptq(parts: Parts) -> Iterator[Packed]:
    """qweight int32 [in·bits/32, out], qzeros int32 [groups, out·bits/32], scales [groups, out], g_idx int32 [in]: group of each input.

    Version 1 of the format, the one that names none, stores every zero less one.
    """
    given, own = parts.setting("bits", GPTQ_BITS), "dynamic" in parts.settings  # own: some matrices have other bits than the rest
    one = int(parts.setting("checkpoint_format", ("gptq", "gptq_v2"), "gptq") == "gptq")
    for base in parts.ending(".qweight"):
        names = [base + suffix for suffix in GPTQ_PARTS]
        parts.need(*names)
        rows, n_out = parts.shape(names[0])
        bits = parts.shape(names[1])[1] * 32 // n_out if own else given
        if bits not in GPTQ_BITS:
            raise parts.wrong(names[1], f"zeros of {', '.join(map(str, GPTQ_BITS))} bits for {n_out} outputs")
        n_in = rows * 32 // bits
        groups = parts.shape(names[2])[0]
        if parts.shape(names[2]) != (groups, n_out):
            raise parts.wrong(names[2], f"[groups, {n_out}]")
        if parts.shape(names[1]) != (groups, -(-n_out * bits // 32)):
            raise parts.wrong(names[1], f"[{groups}, {-(-n_out * bits // 32)}]")
        if base + ".g_idx" in parts.tensors:
            names.append(base + ".g_idx")
            if parts.shape(names[3]) != (n_in,):
                raise parts.wrong(names[3], f"[{n_in}]")
        yield Packed(base + ".weight", (n_out, n_in), tuple(names), partial(_gptq_values, parts, names, bits, one))


def _gptq_values(parts: Parts, names: list[str], bits: int, one: int) -> Floats:
    codes = unpacked(parts.array(names[0]), bits)  # [in,out]
    scales = parts.array(names[2])  # [groups,out]
    zeros = unpacked(parts.array(names[1]).T, bits).T[:, : scales.shape[1]] + one & 2**bits - 1
    return _scaled(codes, zeros, scales, parts.array(names[3]) if len(names) > 3 else _even_groups(len(codes), len(scales)))


def awq(parts: Parts) -> Iterator[Packed]:
    """qweight int32 [in, out/8], qzeros int32 [groups, out/8], scales [groups, out]; the codes of a word are not in order."""
    parts.setting("bits", (4,))
    parts.setting("version", ("gemm", "GEMM"), "gemm")
    for base in parts.ending(".qweight"):
        names = [base + suffix for suffix in GPTQ_PARTS]
        parts.need(*names)
        n_in, words = parts.shape(names[0])
        groups = parts.shape(names[2])[0]
        for name, expected in ((names[1], (groups, words)), (names[2], (groups, words * 8))):
            if parts.shape(name) != expected:
                raise parts.wrong(name, str(list(expected)))
        yield Packed(base + ".weight", (words * 8, n_in), tuple(names), partial(_awq_values, parts, names))


def _awq_values(parts: Parts, names: list[str]) -> Floats:
    codes, zeros = (_in_order(parts.array(name)) for name in names[:2])
    scales = parts.array(names[2])
    return _scaled(codes, zeros, scales, _even_groups(len(codes), len(scales)))


def _in_order(words: Array) -> Array:
    """[n,m] words → [n,8·m] codes"""
    codes = unpacked(words.T, 4).T.reshape(len(words), -1, 8)
    return codes[:, :, AWQ_ORDER].reshape(len(words), -1)


def pack_quantized(parts: Parts) -> Iterator[Packed]:
    """weight_packed int32 [out, in·bits/32], weight_scale [out, groups], weight_shape int64 [2], weight_zero_point int32 or none.

    Zeros are packed along the outputs; without them a code of 2^(bits−1) is 0.  weight_g_idx: group of each input.
    """
    for base in parts.ending(".weight_packed"):
        names = [f"{base}.weight_{part}" for part in ("packed", "scale", "shape")]
        parts.need(*names)
        n_out, n_in = (int(n) for n in parts.array(names[2]))
        scheme = _weights_of_group(parts, base)
        bits = 32 * parts.shape(names[0])[1] // n_in if scheme is None else scheme
        if parts.shape(names[0]) != (n_out, -(-n_in * bits // 32)) or parts.shape(names[1])[0] != n_out:
            raise parts.wrong(names[0], f"[{n_out}, {-(-n_in * bits // 32)}] for {bits} bits")
        more = [f"{base}.weight_{part}" for part in ("zero_point", "g_idx") if f"{base}.weight_{part}" in parts.tensors]
        yield Packed(base + ".weight", (n_out, n_in), (*names, *more), partial(_pack_values, parts, base, bits, n_out, n_in))


def _weights_of_group(parts: Parts, base: str) -> int | None:
    """num_bits of the only group of quantization_config; None where there are several."""
    groups = parts.settings.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        return None
    bits = (next(iter(groups.values())).get("weights") or {}).get("num_bits")
    return bits if isinstance(bits, int) and 0 < bits <= 8 else None


def _pack_values(parts: Parts, base: str, bits: int, n_out: int, n_in: int) -> Floats:
    codes = unpacked(parts.array(f"{base}.weight_packed").T, bits)[:n_in]  # [in,out]
    scales = parts.array(f"{base}.weight_scale").reshape(n_out, -1).T  # [groups,out]
    if f"{base}.weight_zero_point" in parts.tensors:
        zeros = unpacked(parts.array(f"{base}.weight_zero_point"), bits)[:n_out].T  # [groups,out]
    else:
        zeros = np.full(scales.shape, 2 ** (bits - 1), np.uint8)
    index = f"{base}.weight_g_idx"
    return _scaled(codes, zeros, scales, parts.array(index) if index in parts.tensors else _even_groups(n_in, len(scales)))


def _even_groups(n_in: int, n_groups: int) -> Array:
    """The group of each input: equally many in each, the last may have fewer."""
    return np.arange(n_in) // -(-n_in // n_groups)


def _scaled(codes: Array, zeros: Array, scales: Array, group: Array) -> Floats:
    """codes [in,out], zeros and scales [groups,out], group [in] → weight [out,in]"""
    steps = codes.astype(np.int16) - zeros.astype(np.int16)[group]
    return np.ascontiguousarray((scales[group] * steps).T, np.float32)
