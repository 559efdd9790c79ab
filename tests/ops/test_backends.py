"""Which backend runs: what is available and why not, the order, what falls through, `use_backend`."""

import threading
import warnings
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import llama_adapter_kernels as lak
from llama_adapter_kernels import triton_kernels, zero_gate_attention
from llama_adapter_kernels.ops import availability, backends, cuda_library, registration

NEEDS_8 = "needs a GPU of compute capability 8.0 or later"


@pytest.fixture(autouse=True)
def _nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "_settled", {})
    monkeypatch.setattr(backends, "_warned", set())


class Cards:
    """A torch with CUDA and two cards, of which `probe` gives what the CUDA library finds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.current = 0
        self.probed: list[int] = []
        self.answers: dict[int, tuple[str | None, bool]] = {0: (None, False), 1: (None, False)}
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(registration, "cuda_library_error", None)
        monkeypatch.setattr(cuda_library, "torch_problem", lambda: None)
        monkeypatch.setattr(cuda_library, "probe", self.probe)
        monkeypatch.setattr(triton_kernels, "unavailable_reason", lambda device: None)
        properties = SimpleNamespace(name="A card", major=7, minor=5)
        self.patch(init=lambda: None, device_count=lambda: 2, current_device=lambda: self.current, device=self.device,
                   get_device_properties=lambda index: properties)  # fmt: skip

    def patch(self, **functions: Any) -> None:
        for name, function in functions.items():
            self.monkeypatch.setattr(torch.cuda, name, function)

    @contextmanager
    def device(self, index: int) -> Any:
        before, self.current = self.current, index
        yield
        self.current = before

    def probe(self) -> tuple[str | None, bool]:
        self.probed.append(self.current)
        return self.answers[self.current]


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Cards:
    return Cards(monkeypatch)


def on(device: str, dtype: torch.dtype = torch.bfloat16, head_dim: int = 64) -> Any:
    return SimpleNamespace(device=torch.device(device), dtype=dtype, shape=torch.Size([1, 2, 3, head_dim]))


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built with CUDA")
def test_a_torch_without_cuda_has_the_reference_there_and_says_why() -> None:
    assert lak.available_backends("cuda") == ("reference",)
    for backend in ("cuda", "triton"):
        assert backends.unavailable_reason(backend, "cuda:1") == "this torch is built without CUDA"


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (RuntimeError("Found no NVIDIA driver on your system. Please check"), "Found no NVIDIA driver on your system"),
        (RuntimeError("The NVIDIA driver on your system is too old (found version 11040). Please"),
         "The NVIDIA driver on your system is too old (found version 11040)"),
        (RuntimeError("No CUDA GPUs are available"), "No CUDA GPUs are available"),
        (AssertionError("libcudart functions unavailable. It looks"), "libcudart functions unavailable"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might"), "CUDA error: out of memory"),
    ],
)  # fmt: skip
def test_what_torch_says_of_the_driver_is_a_reason_and_no_exception(
    cards: Cards, error: Exception, sentence: str
) -> None:
    def fail() -> None:
        raise error

    cards.patch(init=fail)
    assert lak.available_backends("cuda") == ("reference",)
    assert backends.unavailable_reason("cuda", "cuda") == sentence
    assert backends.unavailable_reason("triton", "cuda:0") == sentence
    with pytest.raises(RuntimeError, match="no backend fits"):
        backends.choose("cuda", on("cuda:0"))


def test_a_device_that_is_not_there(cards: Cards) -> None:
    assert backends.unavailable_reason("cuda", "cuda:2") == "there is no device cuda:2: 2 here"
    cards.patch(device_count=lambda: 0)
    assert backends.unavailable_reason("triton", "cuda") == "there is no CUDA device here"


def test_each_device_is_asked_once_and_left_alone(cards: Cards) -> None:
    cards.answers[1] = (NEEDS_8, False)
    for _ in range(2):
        assert backends.choose(None, on("cuda:0")) == "cuda"
        assert backends.choose(None, on("cuda:1")) == "triton"  # falls through
        assert backends.choose(None, on("cuda")) == "cuda"  # the current one
    assert cards.probed == [0, 1]
    assert cards.current == 0
    assert lak.available_backends("cuda:1") == ("triton", "reference")
    assert backends.unavailable_reason("cuda", "cuda:1") == f"A card (compute capability 7.5): {NEEDS_8}"


def test_a_lack_of_memory_is_asked_again(cards: Cards) -> None:
    cards.answers[0] = ("no memory", True)
    assert backends.choose(None, on("cuda:0")) == "triton"
    cards.answers[0] = (None, False)
    assert backends.choose(None, on("cuda:0")) == "cuda"

    def fail(index: int) -> None:
        raise RuntimeError("CUDA error: out of memory")

    cards.patch(device=fail)
    assert "CUDA error: out of memory" in str(backends.unavailable_reason("cuda", "cuda:1"))


@pytest.mark.parametrize("what", ["library", "torch"])
def test_a_library_that_does_not_work_leaves_triton(cards: Cards, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    if what == "library":
        monkeypatch.setattr(registration, "cuda_library_error", "it does not load: wrong ELF class")
    else:
        monkeypatch.setattr(cuda_library, "torch_problem", lambda: "no libtorch_cuda.so")
    assert backends.choose(None, on("cuda:0")) == "triton"
    with pytest.raises(RuntimeError, match=r"cuda: (it does not load: wrong ELF class|no libtorch_cuda.so)"):
        backends.choose("cuda", on("cuda:0"))
    assert cards.probed == []


def test_what_no_kernel_does_the_reference_does_with_one_warning(cards: Cards) -> None:
    for query in (on("cuda:0", torch.float64), on("cuda:0", head_dim=60)):
        with pytest.warns(
            RuntimeWarning, match=r"no backend fits .*cuda: expected .*triton: expected .*many times slower"
        ):
            assert backends.choose(None, query) == "reference"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert backends.choose(None, query) == "reference"
    with pytest.raises(RuntimeError, match="no backend fits"), lak.use_backend(["cuda", "triton"]):
        backends.choose(None, on("cuda:0", torch.float64))


def test_on_the_cpu() -> None:
    assert set(lak.available_backends("cpu")) >= {"cpu", "reference"}
    assert "cpu" not in lak.available_backends("cuda")
    q = torch.randn(1, 1, 2, 8)
    with pytest.raises(RuntimeError, match=r"no backend fits.*cuda: runs on cuda, not on cpu"):
        zero_gate_attention(q, q, q, None, None, None, backend="cuda")
    with lak.use_backend(["cuda", "reference"]):
        zero_gate_attention(q, q, q, None, None, None)
    with pytest.raises(ValueError, match="expected one of"), lak.use_backend("fpga"):
        pass
    with pytest.raises(ValueError, match="expected at least one of"), lak.use_backend([]):
        pass


def test_use_backend_nests_and_ends_with_an_error() -> None:
    q = torch.randn(1, 1, 2, 8)
    with lak.use_backend("cuda"):
        with lak.use_backend("cpu"):
            zero_gate_attention(q, q, q, None, None, None)
        with pytest.raises(RuntimeError, match="no backend fits"):
            zero_gate_attention(q, q, q, None, None, None)
        zero_gate_attention(q, q, q, None, None, None, backend="cpu")  # an argument wins
    zero_gate_attention(q, q, q, None, None, None)


def in_a_thread(call: Any) -> Any:
    result: list[Any] = []
    thread = threading.Thread(target=lambda: result.append(call()))
    thread.start()
    thread.join()
    return result[0]


def test_contexts_that_overlap_in_two_threads_end_with_their_own() -> None:
    """The first entered is the first left: nothing may stay forced, and each thread has its own choice."""
    entered, left = threading.Event(), threading.Event()
    seen: list[tuple[str, ...]] = []

    def other() -> None:
        with lak.use_backend("reference"):
            entered.set()
            left.wait(10)
            seen.append(backends.forced())
        seen.append(backends.forced())

    thread = threading.Thread(target=other)
    with lak.use_backend("cpu"):
        thread.start()
        assert entered.wait(10)
        assert backends.forced() == ("cpu",)
    assert backends.forced() == ("reference",)  # of the thread that is still inside: this one has no choice of its own
    left.set()
    thread.join()
    assert seen == [("reference",), ()]
    assert backends.forced() == ()


def test_contexts_left_in_another_order_than_they_nest() -> None:
    """As tasks or generators in one thread leave them; equal choices are told apart."""
    first, second, third = (lak.use_backend(name) for name in ("cpu", "reference", "cpu"))
    with ExitStack() as stack:
        for context in (first, second, third):
            stack.enter_context(context)
        stack.pop_all()
    first.__exit__(None, None, None)
    assert backends.forced() == ("cpu",)
    third.__exit__(None, None, None)
    assert backends.forced() == ("reference",)
    second.__exit__(None, None, None)
    assert backends.forced() == ()


def test_a_thread_without_a_choice_takes_the_latest() -> None:
    """Autograd's threads recompute checkpointed layers, and must do as the forward pass did."""
    with lak.use_backend("reference"):
        assert in_a_thread(backends.forced) == ("reference",)
    assert in_a_thread(backends.forced) == ()


def test_the_compiler_sees_every_change() -> None:
    chosen: list[str] = []

    @torch.compiler.assume_constant_result
    def note(name: str) -> int:
        chosen.append(name)
        return 0

    @torch.compile(backend="eager", fullgraph=True)
    def call(x: torch.Tensor) -> torch.Tensor:
        return x + note(backends.choose(None, x))

    x = torch.randn(1, 1, 2, 8)
    call(x)
    with lak.use_backend("reference"):
        call(x)
        with lak.use_backend("cpu"):
            call(x)
        in_a_thread(lambda: call(x))
    call(x)
    assert chosen[:2] == ["cpu", "reference"]
    # What was compiled is used again only under the choice that it was compiled for.
    before = len(chosen)
    with lak.use_backend("reference"):
        call(x)
    call(x)
    assert len(chosen) == before
