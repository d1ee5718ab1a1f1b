"""Sixteen float32 side by side as a type of Numba code, with the operations that the kernels need.

Loops over them do what they say: whether Numba's own loops become vectors depends on how an index is written, and what a
loop leaves behind its last full vector takes longer than the vectors. Memory is addressed in bytes.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, overload, register_model

from tailserve.engine.model.llvm import call, pointer

WIDTH = 16

_F32, _I32 = ir.FloatType(), ir.IntType(32)
_VF, _VI, _VH, _VB = (ir.VectorType(kind, WIDTH) for kind in (_F32, _I32, ir.IntType(16), ir.IntType(8)))


class VectorType(types.Type):
    """The Numba type."""

    def __init__(self) -> None:
        super().__init__(name="float32x16")


vector = VectorType()


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, _VF)


def _all(kind: ir.VectorType, value: float) -> ir.Constant:
    return ir.Constant(kind, [value] * WIDTH)


@intrinsic
def hold(context, array):
    """Keeps a kernel's own array up to here. Numba frees an array behind its last use, and knows of none by address."""

    def codegen(own, builder, signature, args):
        return own.get_dummy_value()

    return types.void(array), codegen


@intrinsic
def read(context, address):
    """16 float32."""

    def codegen(own, builder, signature, args):
        return builder.load(pointer(builder, args[0], _VF), align=4)

    return vector(types.intp), codegen


@intrinsic
def read_bfloat16(context, address):
    """16 bfloat16, as float32."""

    def codegen(own, builder, signature, args):
        narrow = builder.load(pointer(builder, args[0], _VH), align=2)
        return builder.bitcast(builder.shl(builder.zext(narrow, _VI), _all(_VI, 16)), _VF)

    return vector(types.intp), codegen


@intrinsic
def read_integers(context, address, offset):
    """16 signed integers of 32 bits, less `offset`, as float32."""

    def codegen(own, builder, signature, args):
        undefined = ir.Constant(_VI, ir.Undefined)
        first = builder.insert_element(undefined, builder.trunc(args[1], _I32), ir.Constant(_I32, 0))
        offsets = builder.shuffle_vector(first, undefined, ir.Constant(_VI, None))
        values = builder.load(pointer(builder, args[0], _VI), align=4)
        return builder.sitofp(builder.sub(values, offsets), _VF)

    return vector(types.intp, types.int64), codegen


@intrinsic
def write_int8(context, address, value):
    """16 whole numbers from -128 to 127, a byte each."""

    def codegen(own, builder, signature, args):
        narrow = builder.trunc(builder.fptosi(args[1], _VI), _VB)
        builder.store(narrow, pointer(builder, args[0], _VB), align=1)
        return own.get_dummy_value()

    return types.void(types.intp, vector), codegen


@intrinsic
def get(context, address):
    """One float32."""

    def codegen(own, builder, signature, args):
        return builder.load(pointer(builder, args[0], _F32), align=4)

    return types.float32(types.intp), codegen


@intrinsic
def write(context, address, value):
    """16 float32."""

    def codegen(own, builder, signature, args):
        builder.store(args[1], pointer(builder, args[0], _VF), align=4)
        return own.get_dummy_value()

    return types.void(types.intp, vector), codegen


@intrinsic
def write_narrow(context, address, value):
    """16 bfloat16, rounded to nearest even."""

    def codegen(own, builder, signature, args):
        bits = builder.bitcast(args[1], _VI)
        odd = builder.and_(builder.lshr(bits, _all(_VI, 16)), _all(_VI, 1))
        rounded = builder.add(bits, builder.add(odd, _all(_VI, 0x7FFF)))
        narrow = builder.trunc(builder.lshr(rounded, _all(_VI, 16)), _VH)
        builder.store(narrow, pointer(builder, args[0], _VH), align=2)
        return own.get_dummy_value()

    return types.void(types.intp, vector), codegen


@intrinsic
def spread(context, value):
    """A float32 in all places."""

    def codegen(own, builder, signature, args):
        undefined = ir.Constant(_VF, ir.Undefined)
        first = builder.insert_element(undefined, args[0], ir.Constant(_I32, 0))
        return builder.shuffle_vector(first, undefined, ir.Constant(_VI, None))

    return vector(types.float32), codegen


def _operation(emit: Callable[..., ir.Value], arity: int) -> Any:
    def codegen(own, builder, signature, args):
        return emit(builder, *args)

    if arity == 1:
        return intrinsic(lambda context, a: (vector(vector), codegen))
    if arity == 2:
        return intrinsic(lambda context, a, b: (vector(vector, vector), codegen))
    return intrinsic(lambda context, a, b, c: (vector(vector, vector, vector), codegen))


def _larger(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _smaller(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.select(builder.fcmp_ordered("<", a, b), a, b)


def _fma(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    return call(builder, "llvm.fma.v16f32", _VF, a, b, c)


def _exp(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    low = _all(_VF, -87.0)
    under = builder.fcmp_ordered("<", x, low)
    x = _smaller(builder, _larger(builder, x, low), _all(_VF, 88.0))
    n = call(builder, "llvm.floor.v16f32", _VF, _fma(builder, x, _all(_VF, 1.44269504), _all(_VF, 0.5)))
    f = _fma(builder, n, _all(_VF, -0.693359375), x)
    f = _fma(builder, n, _all(_VF, 2.12194440e-4), f)
    p = _all(_VF, 1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = _fma(builder, p, f, _all(_VF, c))
    p = _fma(builder, builder.fmul(p, f), f, builder.fadd(f, _all(_VF, 1.0)))
    exponent = builder.add(builder.fptosi(n, _VI), _all(_VI, 127))
    scale = builder.bitcast(builder.shl(exponent, _all(_VI, 23)), _VF)
    return builder.select(under, ir.Constant(_VF, None), builder.fmul(p, scale))


larger = _operation(_larger, 2)
"""The larger of each pair."""
fma = _operation(_fma, 3)
"""a * b + c, rounded once."""
nearest = _operation(lambda builder, a: call(builder, "llvm.nearbyint.v16f32", _VF, a), 1)
"""The nearest whole number, the even one of two."""
magnitude = _operation(lambda builder, a: call(builder, "llvm.fabs.v16f32", _VF, a), 1)
exp = _operation(_exp, 1)
"""e**x to 2 units in the last place (Cephes, expf); 0 below -87, e**88 above 88."""

_OPERATORS: dict[Any, Any] = {
    operator.add: _operation(ir.IRBuilder.fadd, 2),
    operator.sub: _operation(ir.IRBuilder.fsub, 2),
    operator.mul: _operation(ir.IRBuilder.fmul, 2),
    operator.truediv: _operation(ir.IRBuilder.fdiv, 2),
}


def _overload(symbol: Any, operation: Any) -> None:
    @overload(symbol)
    def combine(a, b):
        if isinstance(a, VectorType) and isinstance(b, VectorType):
            return lambda a, b: operation(a, b)
        return None


for _symbol, _combine in _OPERATORS.items():
    _overload(_symbol, _combine)


@intrinsic
def total(context, value):
    """Sum of the 16, pairs first."""

    def codegen(own, builder, signature, args):
        zero = ir.Constant(_F32, -0.0)
        return call(builder, "llvm.vector.reduce.fadd.v16f32", _F32, zero, args[0], fastmath=("reassoc",))

    return types.float32(vector), codegen


@intrinsic
def peak(context, value):
    """The largest of the 16."""

    def codegen(own, builder, signature, args):
        return call(builder, "llvm.vector.reduce.fmax.v16f32", _F32, args[0], fastmath=("nnan",))

    return types.float32(vector), codegen
