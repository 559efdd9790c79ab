"""A packed fine-tuning batch as bench.lengths makes it, and what the Triton kernels do with it."""

from typing import Any

import torch
from torch import Tensor

from llama_adapter_kernels import triton_kernels
from llama_adapter_kernels.bench.lengths import alpaca_lengths
from llama_adapter_kernels.triton_kernels import backward_launcher, launchers, tuning

HEAD_DIM, PREFIX = 128, 10


def packed_lengths(tokens: int) -> list[int]:
    """Alpaca's lengths, as many whole sequences as `tokens` hold."""
    lengths: list[int] = []
    for length in alpaca_lengths(tokens):
        if sum(lengths) + length > tokens:
            break
        lengths.append(length)
    return lengths


def _batch(tokens: int, heads: int) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """(query to gate, mask to is_causal) as the ops take them, all tokens in use."""
    lengths = packed_lengths(tokens)
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    query, key, value = (torch.zeros(sum(lengths), heads, HEAD_DIM, dtype=torch.bfloat16) for _ in range(3))
    prefix_key, prefix_value = (torch.zeros(1, heads, PREFIX, HEAD_DIM, dtype=torch.bfloat16) for _ in range(2))
    inputs = (query, key, value, prefix_key, prefix_value, torch.ones(1, heads))
    return inputs, (None, None, None, None, offsets, offsets, max(lengths), max(lengths), 0.1, True)


def _tiles(card: str) -> dict[str, tuning.Tile]:
    """Those of packed batches."""
    return {phase: tuning.table_entry(phase, torch.bfloat16, HEAD_DIM, card, tokens=True) for phase in tuning.PHASES}


def rows_in_use(card: str, tokens: int) -> dict[str, float]:
    """For forward and backward of the words: tokens / rows of the tiles of all programs that would be launched."""
    inputs, optional = _batch(tokens, heads=2)
    tiles, programs = _tiles(card), {}

    def record(kernel: Any, grid: tuple[int, ...], *rest: Any, **constants: Any) -> None:
        programs[kernel.__name__] = grid[0]

    runs = [(module, module.run) for module in (launchers, backward_launcher)]
    try:
        for module, _ in runs:
            module.run = record
        with tuning.use_tiles(**tiles):
            output, logsumexp = triton_kernels.forward(*inputs, *optional)
            triton_kernels.backward(output, *inputs, output, logsumexp, *optional, True, True, True, False)
    finally:
        for module, run in runs:
            module.run = run
    rows = inputs[0].shape[0] * inputs[0].shape[1]
    keys, queries = tiles["backward_keys"].block_n, tiles["backward_queries"].block_m
    assert keys == queries, "else owners of keys and queries do not alternate"
    return {
        "forward": rows / (programs["forward_kernel"] * tiles["forward"].block_m),
        "backward": 2 * rows / (programs["backward_words_kernel"] * keys),
    }


def count(tokens: int) -> dict[str, dict[str, float]]:
    """Runs forward and backward in the interpreter with the tiles of an sm90 card; bytes in units of one tensor."""
    from tests.support.triton_counts import counting

    inputs, optional = _batch(tokens, heads=1)
    processors = tuning.processors
    tuning.processors = lambda device: 1  # as on a card that the heads of a real model fill: chunks of 1024 rows
    try:
        with tuning.use_tiles(**_tiles("sm90")), counting() as counter:
            output, logsumexp = triton_kernels.forward(*inputs, *optional)
            doutput = torch.zeros_like(output)
            triton_kernels.backward(doutput, *inputs, output, logsumexp, *optional, True, True, True, False)
    finally:
        tuning.processors = processors
    size = output.numel() * output.element_size()
    return {
        name: {"programs": kernel.programs, "with_work": kernel.with_work / kernel.programs,
               "asked": kernel.asked / size, "fetched": kernel.fetched / size}
        for name, kernel in counter.kernels.items()
    }  # fmt: skip
