"""How much work a problem asks for at the least: floating-point operations and bytes from and to memory.

Counted for the problem, not for what a contestant does: a causal or padded key that nobody sees is no work, and a
contestant that computes it anyway is slower. Backward is 2.5 times forward (five matrix products against two; the one
that recomputes the scores included, as in the papers of FlashAttention).
"""

from dataclasses import dataclass

from llama_adapter_kernels.bench.cases import INFERENCE, Mode, ModelShape
from llama_adapter_kernels.testing import Problem

BACKWARD_OVER_FORWARD = 2.5


@dataclass(frozen=True)
class Work:
    """flop: multiplications and additions; bytes: every input read once, every result written once."""

    flop: float
    bytes: float


def score_pairs(problem: Problem) -> int:
    """How many (query, key) pairs per head take part, over all sequences."""
    case, arguments = problem.case, problem.arguments
    if case.lengths is not None:
        pairs = list(case.lengths)
    else:
        ends = arguments.get("key_end")
        keys = [case.seq_k] * case.batch if ends is None else ends.tolist()
        pairs = [(case.seq_q, count) for count in keys]
    return sum(_pairs(queries, keys, case.is_causal) for queries, keys in pairs)


def _pairs(queries: int, keys: int, is_causal: bool) -> int:
    if not is_causal:
        return queries * keys
    return sum(max(0, row + 1 + keys - queries) for row in range(queries))  # bottom-right aligned


def attention_work(problem: Problem, mode: Mode) -> Work:
    """Two matrix products of 2 D operations per pair and head; the prefix adds P keys to every query."""
    case = problem.case
    query, prefix_key = problem.tensors["query"], problem.tensors["prefix_key"]
    assert query is not None
    width = query.element_size()
    rows = query.numel() // (case.heads_q * case.head_dim)  # queries over all sequences
    if case.lengths is not None:
        keys = sum(pair[1] for pair in case.lengths)
    else:
        ends = problem.arguments.get("key_end")
        keys = case.batch * case.seq_k if ends is None else int(ends.sum())
    prefix = 0 if prefix_key is None else case.prefix_length
    flop = 4.0 * case.head_dim * case.heads_q * (score_pairs(problem) + rows * prefix)
    queries = float(rows * case.heads_q * case.head_dim * width)
    keys_and_values = 2.0 * keys * case.heads_kv * case.head_dim * width
    prefixes = 0.0 if prefix_key is None else 2.0 * prefix_key.numel() * width
    read_and_written = 2 * queries + keys_and_values + prefixes  # Q, K, V, prefix in; O out
    if mode == "forward":
        return Work(flop, read_and_written)
    statistics = 4.0 * rows * case.heads_q
    # Forward, log-sum-exp out; then Q, K, V, O, dO, log-sum-exp, prefix in; dQ, dK, dV and the prefix gradients out.
    backward = 4 * queries + 2 * keys_and_values + 2 * prefixes + statistics
    return Work(flop * (1 + BACKWARD_OVER_FORWARD), read_and_written + statistics + backward)


def model_work(model: ModelShape, mode: Mode, width: int, prefix: int) -> Work:
    """A Llama model with frozen weights: backward is one product per forward product (gradients of activations only).

    Module cases (modes forward and forward+backward) are the attention module alone: no feed-forward part, no head.
    """
    lengths = model.lengths or (model.sequence,) * model.batch
    tokens, inner, inner_kv = sum(lengths), model.heads_q * model.head_dim, model.heads_kv * model.head_dim
    weights = model.hidden * (2 * inner + 2 * inner_kv)
    pairs = sum(_pairs(length, length + model.cached, True) for length in lengths)
    attention = 4.0 * inner * (pairs + tokens * prefix)
    whole = mode in ("step", "token")
    if whole:
        weights += 3 * model.hidden * model.inner
    head = model.hidden * model.vocabulary if whole else 0
    products = 2.0 * tokens * (model.layers * weights + head)
    passes = 1 if mode in INFERENCE else 2
    flop = passes * products + (1 if mode in INFERENCE else 1 + BACKWARD_OVER_FORWARD) * model.layers * attention
    cache = 2.0 * model.batch * model.cached * inner_kv
    moved = width * passes * (model.layers * (weights + cache + 4 * tokens * model.hidden) + head)
    return Work(flop, moved)
