"""Sixteen numbers side by side, one per SIMD lane, for numba kernels: ``a * b + c`` on 16 blocks at a time.

    x: float32[n, 16]   row i = element i of sixteen blocks      v = load(x, i)      store(x, i, v)
    f32(3.0), i32(3)    the same number in every lane            where(mask, a, b)   lane by lane

Every operator is exactly one IEEE operation per lane, in the order in which it is written: LLVM may neither contract ``a * b + c``
into a fused multiply-add nor reassociate a sum (numba passes no fast-math flags).  So lane k holds what a scalar C program computes for
block k, bit for bit, and a branch of that program becomes ``where`` with a mask.  The loops over elements stay ordinary loops and their
accumulators stay in registers, which the loop vectoriser would not manage on arrays.  LLVM splits the vectors where the machine's
registers are narrower (2 × 8 with AVX2, 4 × 4 with SSE and NEON).

How it works: three numba types whose data model is an LLVM vector, and one LLVM instruction per operator, as tables.
Comparisons are ordered (false for NaN) except ``!=``, as in C.  Source: numba's "Extending Numba" manual, LLVM language reference.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

LANES = 16

Lanes = Any  # annotation of a vector inside a kernel: numba infers which of the three types below it is
Emit = Callable[..., Any]  # (builder, *operands) → LLVM value


class LanesType(types.Type):  # type: ignore[misc]
    """numba type of 16 lanes; ``llvm`` is the vector it is stored as."""

    def __init__(self, name: str, element: Any) -> None:
        self.llvm = ir.VectorType(element, LANES)
        super().__init__(name=name)


F32 = LanesType("f32x16", ir.FloatType())
I32 = LanesType("i32x16", ir.IntType(32))
MASK = LanesType("boolx16", ir.IntType(1))


@register_model(LanesType)
class _LanesModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, lanes: LanesType) -> None:
        super().__init__(manager, lanes, lanes.llvm)


# --- operators: (result, operand, the method of llvmlite's IRBuilder) ----------------------------------------------------------------

_ARITHMETIC: dict[Any, tuple[tuple[LanesType, str], ...]] = {
    operator.add: ((F32, "fadd"), (I32, "add")),
    operator.sub: ((F32, "fsub"), (I32, "sub")),
    operator.mul: ((F32, "fmul"), (I32, "mul")),
    operator.truediv: ((F32, "fdiv"),),
    operator.and_: ((I32, "and_"), (MASK, "and_")),
    operator.or_: ((I32, "or_"), (MASK, "or_")),
    operator.lshift: ((I32, "shl"),),
    operator.rshift: ((I32, "lshr"),),  # of bit patterns: zeros come in from the left
}
_COMPARISONS: dict[Any, tuple[tuple[LanesType, str, str], ...]] = {
    operator.lt: ((F32, "fcmp_ordered", "<"), (I32, "icmp_signed", "<")),
    operator.gt: ((F32, "fcmp_ordered", ">"), (I32, "icmp_signed", ">")),
    operator.eq: ((F32, "fcmp_ordered", "=="), (I32, "icmp_signed", "==")),
    operator.ne: ((F32, "fcmp_unordered", "!="),),
}


def _method(name: str, *leading: str) -> Emit:
    return lambda builder, *operands: getattr(builder, name)(*leading, *operands)


def _define_operator(symbol: Any, overloads: list[tuple[LanesType, LanesType, Emit]]) -> None:
    """``symbol`` on two operands of the same lanes type: its typing rule and its one instruction."""
    rules = [signature(result, operand, operand) for result, operand, _ in overloads]
    infer_global(symbol)(type(f"Lanes_{symbol.__name__}", (ConcreteTemplate,), {"key": symbol, "cases": rules}))
    for _, operand, emit in overloads:
        lower_builtin(symbol, operand, operand)(lambda context, builder, sig, args, emit=emit: emit(builder, *args))


for _symbol, _rows in _ARITHMETIC.items():
    _define_operator(_symbol, [(lanes, lanes, _method(name)) for lanes, name in _rows])
for _symbol, _tests in _COMPARISONS.items():
    _define_operator(_symbol, [(MASK, lanes, _method(name, sign)) for lanes, name, sign in _tests])


# --- functions of one vector ----------------------------------------------------------------------------------------------------------


def _unary(result: types.Type, operand: LanesType, emit: Emit) -> Any:
    @intrinsic
    def function(typing_context: Any, v: Any) -> Any:
        return result(operand), lambda context, builder, sig, args: emit(builder, args[0])

    return function


def _llvm_function(name: str) -> Emit:
    def emit(builder: Any, v: Any) -> Any:
        kind = ir.FunctionType(F32.llvm, [F32.llvm])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v{LANES}f32"), [v])

    return emit


def _emit_any(builder: Any, mask: Any) -> Any:
    bits = ir.IntType(LANES)
    return builder.icmp_unsigned("!=", builder.bitcast(mask, bits), ir.Constant(bits, 0))


absolute = _unary(F32, F32, _llvm_function("fabs"))
square_root = _unary(F32, F32, _llvm_function("sqrt"))
negative = _unary(F32, F32, _method("fneg"))
bits_of = _unary(I32, F32, lambda builder, v: builder.bitcast(v, I32.llvm))
of_bits = _unary(F32, I32, lambda builder, v: builder.bitcast(v, F32.llvm))
to_f32 = _unary(F32, I32, lambda builder, v: builder.sitofp(v, F32.llvm))
any_lane = _unary(types.boolean, MASK, _emit_any)


# --- between scalars, memory and lanes ------------------------------------------------------------------------------------------------


def _splat(result: LanesType, scalar: types.Type) -> Any:
    @intrinsic
    def function(typing_context: Any, value: Any) -> Any:
        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            element = context.cast(builder, args[0], sig.args[0], scalar)
            nothing = ir.Constant(result.llvm, ir.Undefined)
            first = builder.insert_element(nothing, element, ir.Constant(ir.IntType(32), 0))
            return builder.shuffle_vector(first, nothing, ir.Constant(I32.llvm, [0] * LANES))

        return result(value), emit

    return function


f32 = _splat(F32, types.float32)  # a Python float is rounded to float32, like 0.1f in C
i32 = _splat(I32, types.int32)


def _row_pointer(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    """Address of row args[1] of the array args[0], [n, 16]."""
    array = context.make_array(sig.args[0])(context, builder, args[0])
    row = context.cast(builder, args[1], sig.args[1], types.intp)
    first = builder.gep(array.data, [builder.mul(row, ir.Constant(row.type, LANES))])
    return builder.bitcast(first, _lanes_of(sig.args[0]).llvm.as_pointer())


def _lanes_of(array: Any) -> LanesType:
    """float32[n, 16] → F32, int32[n, 16] → I32."""
    lanes = {types.float32: F32, types.int32: I32}.get(array.dtype)
    if lanes is None or array.ndim != 2 or array.layout != "C":
        raise TypingError(f"{array} has no rows of lanes: expected a contiguous float32[n, {LANES}] or int32[n, {LANES}]")
    return lanes


@intrinsic
def load(typing_context: Any, array: Any, row: Any) -> Any:
    """Row ``row`` of a contiguous [n, 16] array."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value = builder.load(_row_pointer(context, builder, sig, args))
        value.align = 4  # bytes: numpy aligns to the element, not to the vector
        return value

    return _lanes_of(array)(array, row), emit


@intrinsic
def store(typing_context: Any, array: Any, row: Any, value: Any) -> Any:
    """array[row] = value, for a contiguous [n, 16] array."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store(args[2], _row_pointer(context, builder, sig, args), align=4)
        return context.get_dummy_value()

    if value != _lanes_of(array):
        raise TypingError(f"{value} cannot be stored in {array}")
    return types.void(array, row, value), emit


@intrinsic
def where(typing_context: Any, mask: Any, a: Any, b: Any) -> Any:
    """Lane by lane, ``a`` where the mask is set and ``b`` elsewhere; both are always computed."""
    if mask != MASK or a != b:
        raise TypingError(f"where({mask}, {a}, {b}): expected a mask and two operands of one type")
    return a(mask, a, b), lambda context, builder, sig, args: builder.select(*args)
