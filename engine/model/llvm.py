"""What the modules that write LLVM code for Numba share."""

from __future__ import annotations

from typing import Any

from llvmlite import ir


def call(builder: ir.IRBuilder, name: str, kind: ir.Type, *args: ir.Value, **flags: Any) -> ir.Value:
    """Calls a function of LLVM's own by name; `kind` is what it returns."""
    module = builder.module
    if name not in module.globals:
        ir.Function(module, ir.FunctionType(kind, [arg.type for arg in args]), name)
    return builder.call(module.globals[name], args, **flags)


def pointer(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
    """An address as a pointer to `kind`."""
    return builder.inttoptr(address, kind.as_pointer())
