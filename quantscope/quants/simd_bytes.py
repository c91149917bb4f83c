"""Blocks of bytes ↔ sixteen lanes: what unpacking and packing needs beside ``simd.py``.

    q = load_u8(blocks, at)                                      lane j = byte at + j, widened to int32
    store_f32(out, at, to_f32((q & i32(15)) - i32(8)) * f32(d))  element at + j = lane j

Without this, kernels would be scalar: numba cannot promise LLVM that input and output do not overlap, so LLVM unrolls the short loop over
a block before it could vectorise it.

Arrays are contiguous; ``at`` counts elements from the array's start, whatever its shape, and is not checked.
Every ggml block is a multiple of 16 elements.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from quantscope.quants.simd import F32, I32, LANES, MASK, LanesType

_BYTE, _SHORT = ir.IntType(8), ir.IntType(16)


def _address(context: Any, builder: Any, array_type: Any, array: Any, at: Any, element: Any) -> Any:
    """Pointer to the 16 elements from ``at`` on."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), ir.VectorType(element, LANES).as_pointer())


def _load(array: Any, element: Any, result: LanesType, widen: str | None) -> Any:
    """Signature and code of a load, widened by the LLVM instruction ``widen``."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        loaded = builder.load(_address(context, builder, sig.args[0], args[0], args[1], element), align=_align(element))
        return getattr(builder, widen)(loaded, result.llvm) if widen else loaded

    return result(array, types.intp), emit


def _store(array: Any, element: Any, source: LanesType) -> Any:
    """Signature and code of a store, cut to ``element`` where that is narrower."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value = builder.trunc(args[2], ir.VectorType(element, LANES)) if element in (_BYTE, _SHORT) else args[2]
        builder.store(value, _address(context, builder, sig.args[0], args[0], args[1], element), align=_align(element))
        return context.get_dummy_value()

    return types.void(array, types.intp, source), emit


def _align(element: Any) -> int:
    return {_BYTE: 1, _SHORT: 2}.get(element, 4)  # bytes: numpy aligns to the element, not to the vector


@intrinsic
def load_u8(_typing: Any, array: Any, _at: Any) -> Any:
    """uint8[...] → 0 … 255 as int32."""
    return _load(array, _BYTE, I32, "zext")


@intrinsic
def load_i8(_typing: Any, array: Any, _at: Any) -> Any:
    """uint8[...], each read as a signed byte → −128 … 127 as int32."""
    return _load(array, _BYTE, I32, "sext")


@intrinsic
def load_f32(_typing: Any, array: Any, _at: Any) -> Any:
    """float32[...] → float32."""
    return _load(array, F32.llvm.element, F32, None)


@intrinsic
def store_f32(_typing: Any, array: Any, _at: Any, _lanes: Any) -> Any:
    """float32 → float32[...]."""
    return _store(array, F32.llvm.element, F32)


@intrinsic
def store_u8(_typing: Any, array: Any, _at: Any, _lanes: Any) -> Any:
    """The low 8 bits of int32 → uint8[...]."""
    return _store(array, _BYTE, I32)


@intrinsic
def store_i16(_typing: Any, array: Any, _at: Any, _lanes: Any) -> Any:
    """The low 16 bits of int32 → int16[...]."""
    return _store(array, _SHORT, I32)


def _unary(result: Any, operand: LanesType, llvm_function: str) -> Any:
    """The numba function that is one LLVM function of one vector."""

    @intrinsic
    def function(_typing: Any, _lanes: Any) -> Any:
        def emit(context: Any, builder: Any, _sig: Any, args: Any) -> Any:
            kind = ir.FunctionType(context.get_value_type(result), [operand.llvm])
            return builder.call(cgutils.get_or_insert_function(builder.module, kind, llvm_function), args)

        return result(operand), emit

    return function


round_half_away = _unary(F32, F32, f"llvm.round.v{LANES}f32")  # C's roundf
round_half_even = _unary(F32, F32, f"llvm.rint.v{LANES}f32")  # C's nearbyintf
smallest = _unary(types.int32, I32, f"llvm.vector.reduce.smin.v{LANES}i32")  # of 16 int32
largest = _unary(types.int32, I32, f"llvm.vector.reduce.smax.v{LANES}i32")
total = _unary(types.int32, I32, f"llvm.vector.reduce.add.v{LANES}i32")


@intrinsic
def pair_products(_typing: Any, _a: Any, _b: Any) -> Any:
    """Two vectors of 16 pairs of int16, each pair in one int32 → a₀·b₀ + a₁·b₁ of each pair, exact in int32.

    One instruction (pmaddwd) with SSE2, AVX2 and AVX-512, where LLVM recognises this form.
    """

    def emit(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        shorts, words = ir.VectorType(_SHORT, 2 * LANES), ir.VectorType(ir.IntType(32), 2 * LANES)
        a, b = (builder.sext(builder.bitcast(v, shorts), words) for v in args)
        products = builder.mul(a, b)
        halves = [ir.Constant(I32.llvm, list(range(first, 2 * LANES, 2))) for first in (0, 1)]
        even, odd = (builder.shuffle_vector(products, products, half) for half in halves)
        return builder.add(even, odd)

    return I32(I32, I32), emit


@intrinsic
def multiply_add(_typing: Any, _a: Any, _b: Any, _c: Any) -> Any:
    """a · b + c in float32 with one rounding."""

    def emit(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        kind = ir.FunctionType(F32.llvm, [F32.llvm] * 3)
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32"), args)

    return F32(F32, F32, F32), emit


def _swapped(distance: int) -> Any:
    """Lane i gets lane i ^ distance."""

    @intrinsic
    def function(_typing: Any, _lanes: Any) -> Any:
        partners = ir.Constant(I32.llvm, [i ^ distance for i in range(LANES)])
        return F32(F32), lambda context, builder, sig, args: builder.shuffle_vector(args[0], args[0], partners)

    return function


swap_1, swap_2, swap_4 = _swapped(1), _swapped(2), _swapped(4)


@intrinsic
def lane(_typing: Any, _lanes: Any, _i: Any) -> Any:
    """Lane i of float32, 0 … 15."""
    return types.float32(F32, types.intp), lambda context, builder, sig, args: builder.extract_element(args[0], args[1])


@intrinsic
def to_i32(_typing: Any, _lanes: Any) -> Any:
    """float32 → int32 towards zero; the caller makes sure that it fits."""
    return I32(F32), lambda context, builder, sig, args: builder.fptosi(args[0], I32.llvm)


@intrinsic
def spread_bits(_typing: Any, _word: Any) -> Any:
    """uint32 → lane j = bit j, 0 or 1."""

    def emit(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        nothing = ir.Constant(I32.llvm, ir.Undefined)
        first = builder.insert_element(nothing, args[0], ir.Constant(ir.IntType(32), 0))
        words = builder.shuffle_vector(first, nothing, ir.Constant(I32.llvm, [0] * LANES))
        bits = builder.lshr(words, ir.Constant(I32.llvm, list(range(LANES))))
        return builder.and_(bits, ir.Constant(I32.llvm, [1] * LANES))

    return I32(types.uint32), emit


@intrinsic
def collect_bits(_typing: Any, _mask: Any) -> Any:
    """Mask → uint32 whose bit j is lane j."""

    def emit(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return builder.zext(builder.bitcast(args[0], ir.IntType(LANES)), ir.IntType(32))

    return types.uint32(MASK), emit
