"""Why a contestant did not run, in one line: what the library said, without its stack of causes."""

from collections.abc import Iterable

# torch tells in warnings which kernel refused what, and for kernels that nobody asked for as well.
_NO_REASON = ("not used because", "runtime disabled")


def first_line(error: BaseException) -> str:
    """ "RuntimeError: no kernel for this card": the exception's type and the first line of its message."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def why(error: BaseException, warnings: Iterable[str]) -> str:
    """The exception's first line, and what `scaled_dot_product_attention` warned about before it gave up."""
    said = (text.partition(" (Triggered internally")[0].strip() for text in warnings)
    # Other warnings, such as deprecations, do not explain an exception in foreign code.
    refusals = [text for text in said if not any(words in text for words in _NO_REASON)]
    if "No available kernel" not in str(error) or not refusals:
        return first_line(error)
    return f"{first_line(error)} {'; '.join(dict.fromkeys(refusals))[:300]}"
