"""Random problems and the tolerance rule that every backend is held to. Tests and benchmarks share them."""

from llama_adapter_kernels.testing.problems import Case, Problem, make_problem
from llama_adapter_kernels.testing.rule import (
    Deviation,
    Truth,
    assert_matches_reference,
    deviation,
    deviations,
    truth_of,
)

__all__ = [
    "Case",
    "Deviation",
    "Problem",
    "Truth",
    "assert_matches_reference",
    "deviation",
    "deviations",
    "make_problem",
    "truth_of",
]
