"""Mutants of the CUDA kernels that no test can notice, and why."""

EQUAL = "of two equal numbers it is the same which is taken"

# By Mutant.name: file, what stands there, what stands there instead.
EXPLAINED: dict[str, str] = {
    "cuda/problem.h: x < low -> x <= low": EQUAL,
    "cuda/problem.h: x > high -> x >= high": EQUAL,
    "cuda/problem.h: a < b -> a <= b": EQUAL,
    "cuda/problem.h: a > b -> a >= b": EQUAL,
    "cuda/launch_kernel.h: blocks > std::numeric_limits<int32_t>::max() -> blocks >= std::numeric_limits<int32_t>::max()":
        "a grid of exactly 2^31 - 1 blocks is as far out of reach of a test as of a problem",
}  # fmt: skip
