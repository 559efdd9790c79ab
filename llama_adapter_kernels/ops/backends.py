"""Which backend runs a call, and why another one does not."""

import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from llama_adapter_kernels.ops import availability, order

BACKENDS = ("cpu", "cuda", "triton", "reference")

# What use_backend has forced. Every thread keeps the choices it is inside of; a thread without any, such as autograd's that
# recomputes a checkpointed layer, takes the latest of all threads. Both are plain attributes, which torch.compile guards on.
_lock = threading.Lock()
_everywhere: tuple[tuple[str, ...], ...] = ()
_thread = threading.local()

# Problems (dtype, device, head_dim) whose fall to the reference was told.
_warned: set[tuple[Any, ...]] = set()


def unavailable_reason(backend: str, device: torch.device | str) -> str | None:
    """Why `backend` cannot run tensors on `device`; None when it can. Never raises for a device that does not work.

    Raises:
        ValueError: an unknown backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    return None if backend == "reference" else availability.unavailable_reason(backend, torch.device(device))


def available_backends(device: torch.device | str = "cpu") -> tuple[str, ...]:
    """The backends that can run tensors on `device`, best first: a subset of ("cpu", "cuda", "triton", "reference")."""
    return tuple(backend for backend in BACKENDS if unavailable_reason(backend, device) is None)


@contextmanager
def use_backend(backend: str | Sequence[str]) -> Iterator[None]:
    """Within the context every call uses `backend` (or the first of several that can run it), like
    `torch.nn.attention.sdpa_kernel`. An explicit `backend=` argument of a call wins.

    It holds for the thread that enters it and for threads that are in no such context of their own. Contexts may overlap
    in any order, in one thread or in several: leaving one ends that one.

    Raises:
        ValueError: an unknown backend, or none.
    """
    chosen = [backend] if isinstance(backend, str) else list(backend)
    if not chosen:
        raise ValueError(f"backend: expected at least one of {', '.join(BACKENDS)}, got none")
    for name in chosen:
        if name not in BACKENDS:
            raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    global _everywhere
    entry = tuple(chosen)  # a new object: its identity tells it from an equal one
    if not hasattr(_thread, "choices"):
        _thread.choices = []
    here = _thread.choices
    with _lock:
        here.append(entry)
        _everywhere = (*_everywhere, entry)
    try:
        yield
    finally:
        with _lock:
            here[:] = [other for other in here if other is not entry]
            _everywhere = tuple(other for other in _everywhere if other is not entry)


def forced() -> tuple[str, ...]:
    """What `use_backend` has chosen for this thread; () when nothing."""
    if not _everywhere:  # what threads keep for themselves is among it; a decode step asks in every layer
        return ()
    own: list[tuple[str, ...]] = getattr(_thread, "choices", [])
    if own:
        return own[-1]
    return _everywhere[-1]


def choose(backend: str | None, query: Tensor, pass_name: order.Pass = "forward") -> str:
    """The backend for one call: the one that is asked for, else the first of the device's order (`order`) that fits.

    Where nobody asked and no kernel fits (float64 on a GPU, say), the reference does, with one warning that says why.

    Raises:
        ValueError: an unknown backend.
        RuntimeError: none that was asked for fits; the message says for each one why.
    """
    asked = (backend,) if backend is not None else forced()
    reasons = []
    for name in asked or order.candidates(query.device, pass_name, query.dtype, query.shape[-1]):
        reason = unavailable_reason(name, query.device) or unsupported_reason(name, query)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    what = f"no backend fits query {list(query.shape)} {query.dtype} on {query.device}: " + "; ".join(reasons)
    if not asked:
        _warn_once((query.dtype, query.device, query.shape[-1]), what)
        return "reference"
    raise RuntimeError(what + ("" if "reference" in asked else '; backend="reference" runs anywhere, slowly'))


@torch.compiler.assume_constant_result
def _warn_once(problem: tuple[Any, ...], text: str) -> None:
    if problem not in _warned:
        _warned.add(problem)
        warnings.warn(f'{text}; backend="reference" runs instead, many times slower', RuntimeWarning, stacklevel=4)


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
