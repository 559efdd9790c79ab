"""What the tests change about Triton's interpreter: twice the speed, the roundings of a device, and an error where a kernel
leaves its tensors."""

from typing import Any

import numpy as np


def prepare() -> None:
    """For a process that does nothing but interpret."""
    _patch_language_once()
    _fuse_multiply_add()
    _round_bfloat16()
    _check_bounds()


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


def _check_bounds() -> None:
    """Every address that is not masked lies in the memory of some argument of the kernel."""
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, call = builder.create_masked_load, builder.create_masked_store, executor.__call__
    memory: list[tuple[int, int]] = []

    def add(argument: Any) -> None:
        if isinstance(argument, tuple):
            for part in argument:
                add(part)
        elif hasattr(argument, "base"):
            add(argument.base)
        elif hasattr(argument, "untyped_storage"):
            storage = argument.untyped_storage()
            memory.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))

    def check(kind: str, pointers: Any, mask: Any) -> None:
        used = (mask if isinstance(mask, np.ndarray) else mask.data).astype(bool)  # of a descriptor the former
        addresses = np.broadcast_to(pointers.data, used.shape)[used]
        if addresses.size > 0:
            first, last = int(addresses.min()), int(addresses.max())
            last += pointers.get_element_ty().primitive_bitwidth // 8
            if not any(begin <= first and last <= end for begin, end in memory):
                near = [(first - begin, last - end) for begin, end in memory if begin - 4096 <= first < end + 4096]
                raise IndexError(f"{kind} outside of every tensor; beyond the begin and end of those near it: {near}")

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        check("load", pointers, mask)
        return load(self, pointers, mask, *rest, **options)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check("store", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def checked_call(self: Any, *arguments: Any, **options: Any) -> Any:
        memory.clear()
        add(tuple(arguments))
        return call(self, *arguments, **options)

    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
    executor.__call__ = checked_call
