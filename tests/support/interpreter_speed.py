"""The interpreter redirects Triton's language at every call of a device function, which is nearly half of the time that
small tiles take. A process that does nothing but interpret can do it once."""

from typing import Any


def patch_language_once() -> None:
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
