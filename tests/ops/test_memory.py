"""No buffer of size sequence x sequence: peak memory at S = 8192 against what the tensors themselves take."""

import subprocess
import sys

SCRIPT = """
import resource, torch, llama_adapter_kernels as lak
torch.set_num_threads(2)
S, D = 8192, 64
q, k, v = (torch.randn(1, 2, S, D, requires_grad={grad}) for _ in range(3))
pk, pv = (torch.randn(1, 2, 10, D) for _ in range(2))
gate = torch.randn(2)
small = [t[:, :, :64].detach().requires_grad_({grad}) for t in (q, k, v)]
out = lak.zero_gate_attention(*small, pk, pv, gate, is_causal=True)   # loads everything once
if {grad}: out.sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out = lak.zero_gate_attention(q, k, v, pk, pv, gate, is_causal=True)
if {grad}: out.backward(torch.ones_like(out))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""

ROWS = 2 * 8192 * 64 * 4  # bytes of one [1, 2, S, D] float32 tensor: 4 MiB. S x S of one head would be 256 MiB.


def peak(grad: bool) -> int:
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(grad=grad)], capture_output=True, text=True, check=True
    )
    return int(result.stdout)


def test_forward_allocates_output_and_logsumexp() -> None:
    assert peak(grad=False) < 1.5 * ROWS + (1 << 20)


def test_backward_stays_linear_in_the_sequence() -> None:
    # output, dO, three gradients; per worker 5 and per key split 1 buffers of the size of one head's rows
    assert peak(grad=True) < 5 * ROWS + (2 * 7 + 2 * 4) * ROWS / 2 + (4 << 20)
