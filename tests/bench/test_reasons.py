"""The reason a user reads for a contestant that did not run."""

import warnings

import torch

from llama_adapter_kernels import testing
from llama_adapter_kernels.bench import reasons, runner
from llama_adapter_kernels.bench.cases import BenchCase
from llama_adapter_kernels.bench.peer import Peer, Prepared
from llama_adapter_kernels.bench.workload import AttentionWorkload


def test_first_line() -> None:
    assert reasons.first_line(RuntimeError("\nno kernel\nlong trace")) == "RuntimeError: no kernel"
    assert reasons.first_line(AssertionError()) == "AssertionError"


def refused(problem: testing.Problem, backward: bool) -> Prepared:
    """What `scaled_dot_product_attention` does on a GPU when the one backend that is allowed does not fit."""
    for text in ("Memory efficient kernel not used because:", "Memory Efficient attention has been runtime disabled.",
                 "Flash attention kernel not used because:", "Flash Attention does not support non-null attn_mask.",
                 "CuDNN attention has been runtime disabled."):  # fmt: skip
        warnings.warn(f"{text} (Triggered internally at sdp_utils.cpp:1.)", UserWarning, stacklevel=1)
    raise RuntimeError("No available kernel. Aborting execution.")


def test_what_torch_warned_about_is_the_reason(recwarn) -> None:
    case = BenchCase("small", "small", "attention", testing.Case(seq_q=8, seq_k=8))
    workload = AttentionWorkload(case, "forward", "float32", torch.device("cpu"))
    peer = Peer("two-sdpa-flash", "two SDPA calls (flash)", refused)
    entry = runner.blank(workload, peer)
    assert runner.admit(workload, peer, entry) is None
    assert entry.reason == (
        "RuntimeError: No available kernel. Aborting execution. Flash Attention does not support non-null attn_mask."
    )
    assert not recwarn.list  # not in the middle of the progress bar as well
