"""What the tests change about Triton's interpreter: twice the speed, and the roundings of a device."""

from typing import Any

import numpy as np


def prepare() -> None:
    """For a process that does nothing but interpret."""
    _patch_language_once()
    _fuse_multiply_add()
    _round_bfloat16()


def _patch_language_once() -> None:
    """The interpreter redirects Triton's language at every call of a device function, which is nearly half of the time
    that small tiles take."""
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._patch_lang
    done: set[frozenset[int]] = set()

    def patch(function: Any) -> Any:
        languages = frozenset(id(value) for value in function.__globals__.values() if value is tl or value is tl.core)
        if languages not in done:
            done.add(languages)
            original(function)
        return interpreter._LangPatchScope()  # nothing to restore

    interpreter._patch_lang = patch


def _fuse_multiply_add() -> None:
    """tl.fma rounds once on a device; the interpreter rounds the product as well."""
    from triton.runtime import interpreter

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        wide = [np.asarray(operand.data, dtype=np.float64) for operand in (x, y, z)]
        return interpreter.TensorHandle((wide[0] * wide[1] + wide[2]).astype(z.data.dtype), z.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = create_fma


def _round_bfloat16() -> None:
    """float32 becomes the nearest bfloat16 (even at ties) on a device; the interpreter of Triton 3.6 cuts the digits off."""
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter.InterpreterBuilder.cast_impl

    def cast(self: Any, source: Any, target_type: Any) -> Any:
        kinds = source.dtype.scalar, target_type.scalar
        if kinds == (tl.float32, tl.bfloat16):
            bits = np.ascontiguousarray(source.data).view(np.uint32)
            rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
            nearest = np.where(np.isnan(source.data), np.uint32(0x7FC0), rounded).astype(np.uint16)
            return interpreter.TensorHandle(nearest, tl.bfloat16)
        if kinds == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle((source.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        return original(self, source, target_type)

    builder = interpreter.InterpreterBuilder
    builder.cast_impl = cast
    for name in ("create_fp_ext", "create_fp_trunc"):
        setattr(builder, name, lambda self, source, target_type: self.cast_impl(source, target_type))
