"""Which backend runs a call, and why another one does not."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from llama_adapter_kernels.ops import registration

BACKENDS = ("cpu", "cuda", "triton", "reference")

# Set by use_backend. A plain global, as in torch.nn.attention: torch.compile guards on it.
_forced: tuple[str, ...] = ()


def unavailable_reason(backend: str, device: torch.device | str) -> str | None:
    """Why `backend` cannot run tensors on `device`; None when it can."""
    device = torch.device(device)
    if backend == "reference":
        return None
    if backend == "cpu":
        if device.type != "cpu":
            return f"runs on cpu, not on {device.type}"
        return registration.library_error
    if backend == "cuda":
        if device.type != "cuda":
            return f"runs on cuda, not on {device.type}"
        return registration.cuda_library_error
    if backend == "triton":
        return registration.triton_unavailable_reason(device)
    raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")


def available_backends(device: torch.device | str = "cpu") -> tuple[str, ...]:
    """The backends that can run tensors on `device`, best first: a subset of ("cpu", "cuda", "triton", "reference")."""
    return tuple(backend for backend in BACKENDS if unavailable_reason(backend, device) is None)


@contextmanager
def use_backend(backend: str | Sequence[str]) -> Iterator[None]:
    """Within the context every call uses `backend` (or the first of several that can run it), like
    `torch.nn.attention.sdpa_kernel`. An explicit `backend=` argument of a call wins.

    Raises:
        ValueError: an unknown backend, or none.
    """
    global _forced
    chosen = (backend,) if isinstance(backend, str) else tuple(backend)
    if not chosen:
        raise ValueError(f"backend: expected at least one of {', '.join(BACKENDS)}, got none")
    for name in chosen:
        if name not in BACKENDS:
            raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    previous, _forced = _forced, chosen
    try:
        yield
    finally:
        _forced = previous


def choose(backend: str | None, query: Tensor) -> str:
    """The backend for one call. Reference is used only when asked for: it is many times slower.

    Raises:
        ValueError: an unknown backend.
        RuntimeError: no backend fits; the message says for each one why.
    """
    if backend is not None:
        candidates: tuple[str, ...] = (backend,)
    else:
        candidates = _forced or ("cpu", "cuda", "triton")
    reasons = []
    for name in candidates:
        reason = unavailable_reason(name, query.device) or unsupported_reason(name, query)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    hint = "" if "reference" in candidates else '; backend="reference" runs anywhere, slowly'
    raise RuntimeError(
        f"no backend fits query {list(query.shape)} {query.dtype} on {query.device}: " + "; ".join(reasons) + hint
    )


def unsupported_reason(backend: str, query: Tensor) -> str | None:
    """Why `backend` cannot run this dtype or head_dim; None when it can."""
    if backend in ("cpu", "reference"):
        return None
    if query.dtype == torch.float64:
        return "expected float32, bfloat16 or float16, got torch.float64"
    head_dim = query.shape[-1]
    if head_dim % 8 != 0 or head_dim > 256:
        return f"expected a head_dim that is a multiple of 8 up to 256, got {head_dim}"
    return None
