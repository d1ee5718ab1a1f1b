"""Counter-based noise as Numba code, equal to `tailserve.engine.speculation.sampling.exponentials` but for rounding."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from tailserve.engine.model.llvm import call
from tailserve.engine.model.vectors import WIDTH, vector

_F32, _I32 = ir.FloatType(), ir.IntType(32)
_VF, _VI = ir.VectorType(_F32, WIDTH), ir.VectorType(_I32, WIDTH)


def _ints(value: int) -> ir.Constant:
    return ir.Constant(_VI, [value] * WIDTH)


def _floats(value: float) -> ir.Constant:
    return ir.Constant(_VF, [value] * WIDTH)


def _spread(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    undefined = ir.Constant(_VI, ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_VI, None))


def _mix(builder: ir.IRBuilder, bits: ir.Value) -> ir.Value:
    """lowbias32 (Wellons 2018)."""
    bits = builder.xor(bits, builder.lshr(bits, _ints(16)))
    bits = builder.mul(bits, _ints(0x7FEB352D))
    bits = builder.xor(bits, builder.lshr(bits, _ints(15)))
    bits = builder.mul(bits, _ints(0x846CA68B))
    return builder.xor(bits, builder.lshr(bits, _ints(16)))


def _log(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """Natural logarithm of positive normal numbers to 2 units in the last place (Cephes, logf)."""

    def fma(a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        return call(builder, "llvm.fma.v16f32", _VF, a, b, c)

    bits = builder.bitcast(x, _VI)
    exponent = builder.sub(builder.lshr(bits, _ints(23)), _ints(126))
    mantissa = builder.bitcast(builder.or_(builder.and_(bits, _ints(0x7FFFFF)), _ints(0x3F000000)), _VF)
    small = builder.fcmp_ordered("<", mantissa, _floats(0.70710678118654752))
    e = builder.sitofp(builder.sub(exponent, builder.zext(small, _VI)), _VF)
    doubled = builder.select(small, builder.fadd(mantissa, mantissa), mantissa)
    m = builder.fsub(doubled, _floats(1.0))
    z = builder.fmul(m, m)
    p = _floats(7.0376836292e-2)
    for c in (-1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1, 2.0000714765e-1):
        p = fma(p, m, _floats(c))
    for c in (-2.4999993993e-1, 3.3333331174e-1):
        p = fma(p, m, _floats(c))
    y = builder.fmul(builder.fmul(p, m), z)
    y = fma(e, _floats(-2.12194440e-4), y)
    y = fma(z, _floats(-0.5), y)
    return fma(e, _floats(0.693359375), builder.fadd(m, y))


@intrinsic
def log_exponential(context, token, low, high):
    """Logarithms of the exponential noise of 16 tokens from `token` on, under the two 32-bit keys of a seed and position."""

    def codegen(own, builder, signature, args):
        first, low, high = (builder.trunc(arg, _I32) for arg in args)
        bits = builder.add(_spread(builder, first), ir.Constant(_VI, list(range(WIDTH))))
        bits = _mix(builder, builder.xor(bits, _spread(builder, low)))
        bits = _mix(builder, builder.xor(bits, _spread(builder, high)))
        uniform = builder.uitofp(builder.lshr(bits, _ints(9)), _VF)
        uniform = builder.fmul(builder.fadd(uniform, _floats(0.5)), _floats(2.0**-23))
        return _log(builder, builder.fneg(_log(builder, uniform)))

    return vector(types.int64, types.int64, types.int64), codegen
