"""Mutants of the CPU kernels that no test can notice, and why."""

# By Mutant.name: file, what stands there, what stands there instead.
EXPLAINED: dict[str, str] = {}
