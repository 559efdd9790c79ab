"""Mutants of the CUDA kernels that no test can notice, and why."""

EQUAL = "of two equal numbers it is the same which is taken"
LIES = "a length below 0 is no row and no key, as 0 is"

# By Mutant.name: file, what stands there, what stands there instead.
EXPLAINED: dict[str, str] = {
    "cuda/problem.h: x < low -> x <= low": EQUAL,
    "cuda/problem.h: x > high -> x >= high": EQUAL,
    "cuda/problem.h: a < b -> a <= b": EQUAL,
    "cuda/problem.h: a > b -> a >= b": EQUAL,
    "cuda/launch_kernel.h: blocks > std::numeric_limits<int32_t>::max() -> blocks >= std::numeric_limits<int32_t>::max()":
        "a grid of exactly 2^31 - 1 blocks is as far out of reach of a test as of a problem",
    "cuda/sm80/backward/launch.h: rows > keys -> rows >= keys": EQUAL,
    "cuda/sm80/backward/rows.h: tile - first_tile -> tile + first_tile": "modulo two it is the same",
}  # fmt: skip
