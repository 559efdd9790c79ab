"""Removes every mask, clamp, comparison and sign of the Triton kernels, one at a time, and looks whether a test notices.

    python -m tests.triton.mutants [--only scores.py] [--lines 40-90] [--sample 60 --seed 1] [--seconds 120]

A mutant that no check kills is printed: either a case is missing, or the line has no effect and can go, or EQUIVALENT says
why it stays. A mutant takes up to two minutes of a core; not part of the test suite.
"""

import argparse
import ast
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILES = (
    "problem.py", "scores.py", "prefix.py", "tiles.py", "forward_kernel.py", "backward_rows.py", "backward_keys.py",
    "backward_queries.py", "backward_words.py", "backward_prefix.py", "decode_kernels.py", "zero_tail.py",
)  # fmt: skip
# (file, what stands there, what stands there instead): why no check can notice.
EQUIVALENT = {
    ("problem.py", "tl.minimum(tl.maximum(column_first + diagonal, query_first), query_first + queries)",
     "(tl.maximum(column_first + diagonal, query_first))"):
        "whatever offsets say, bisection finds the sequence that holds the key, and its last query sees it",
    ("scores.py", "tl.maximum(whole - first, 0)", "(0)"):
        "blocks that are seen whole are tested, too: it costs time alone",
    ("forward_kernel.py", "blocks - whole", "(blocks + (whole))"):
        "blocks after the last key are seen by no row: they cost time alone",
    ("backward_rows.py", "tl.where(none, 0.0, largest + tl.log2(tl.where(none, 1.0, total)))",
     "(largest + tl.log2(tl.where(none, 1.0, total)))"):
        "of a sequence without a prefix nobody reads the sums that this makes NaN",
    ("backward_rows.py", "tl.where(from_keys, row_end, 0)", "(row_end)"):
        "keys that no row asks for add nothing to those that do: they cost time alone",
    ("backward_rows.py", "row_valid & (head == 0)", "(row_valid)"):
        "every head writes the same windows",
    ("backward_keys.py", "tl.minimum(column_first + BLOCK_N, end)", "(column_first + BLOCK_N)"):
        "a block that crosses the last valid key is tested whole anyway, one after it costs time alone",
    ("backward_keys.py", "column_first < begin", "(column_first <= begin)"):
        "a block that is seen whole is tested, too: it costs time alone",
    ("backward_keys.py", "row_stop - row_first", "(row_stop + (row_first))"):
        "blocks before the first row that sees a key add nothing: they cost time alone",
    ("backward_keys.py", "tl.where(column_low <= column_high, blocks, 0)", "(blocks)"):
        "what is added up for keys none of which is valid is stored as zeros: it costs time alone",
    ("backward_keys.py", "column_valid[:, None] & row_valid[None, :]", "(column_valid[:, None])"):
        "Q, dO and statistics of rows that are not there are 0: they add nothing (but without the test ptxas spills)",
    ("backward_keys.py", "column_valid[:, None] & row_valid[None, :]", "(row_valid[None, :])"):
        "keys that are not valid only reach rows of dK and dV that are stored as zeros",
    ("zero_tail.py", "row_first + ROWS <= first", "(row_first + ROWS < first)"):
        "a block that ends where the tail begins has no row to write",
}  # fmt: skip
COMPARISONS: dict[type, str] = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">"}


@dataclass(frozen=True)
class Mutant:
    file: str
    line: int
    begin: int  # offsets in the file
    end: int
    text: str  # what stands there instead
    original: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.original!r} -> {self.text!r}"


def mutants_of(file: str, source: str) -> Iterator[Mutant]:
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line.encode()))
    encoded = source.encode()

    def span(node: Any) -> tuple[int, int]:
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

    def text(node: Any) -> str:
        begin, end = span(node)
        return encoded[begin:end].decode()

    def replaced(node: Any, new: str) -> Mutant:
        return Mutant(file, node.lineno, *span(node), new, text(node))

    for function in ast.parse(source).body:
        if not isinstance(function, ast.FunctionDef):
            continue
        for node in (inner for statement in function.body for inner in ast.walk(statement)):
            if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
                new = COMPARISONS[type(node.ops[0])]
                yield replaced(node, f"({text(node.left)} {new} {text(node.comparators[0])})")
            elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd):
                yield replaced(node, f"({text(node.left)})")
                yield replaced(node, f"({text(node.right)})")
            elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub):
                yield replaced(node, f"({text(node.left)} + ({text(node.right)}))")
            elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and "inf" not in text(node):
                if not isinstance(node.operand, ast.Constant):
                    yield replaced(node, f"({text(node.operand)})")
            elif isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                if name in ("tl.minimum", "tl.maximum"):
                    yield from (replaced(node, f"({text(argument)})") for argument in node.args)
                elif name == "tl.where":
                    yield from (replaced(node, f"({text(argument)})") for argument in node.args[1:])
                elif name in ("tl.load", "tl.store"):
                    for keyword in node.keywords:
                        if keyword.arg == "mask":
                            yield replaced(keyword, "mask=None")


def checks() -> list[tuple[Callable[..., None], tuple[Any, ...]]]:
    """What has to notice, quick and telling things first."""
    import torch

    from tests.support import triton_checks
    from tests.triton import test_triton_attention, test_triton_behaviour, test_triton_extremes

    cases = [(triton_checks.attention, (case, dtypes[0])) for case, dtypes in test_triton_attention.CASES]
    packed = [entry for entry in cases if entry[1][0].lengths is not None]
    windows = [entry for entry in cases if entry[1][0].window != "none"]
    rest = [entry for entry in cases if entry not in packed and entry not in windows]
    tails = [(triton_checks.tail_of_packed_rows_is_zero, (prefix,)) for prefix in ("shared", "sequence", "none")]
    dtypes = [torch.float32, torch.float16] * 6
    decodes = [(triton_checks.decode, pair) for pair in zip(test_triton_behaviour.DECODE, dtypes, strict=False)]
    return [
        rest[0], packed[-6], *decodes[:4], windows[2], *packed, *windows, *tails,
        *((check, ()) for check in test_triton_behaviour.BEHAVIOUR), *decodes[4:], *test_triton_extremes.CHECKS, *rest[1:],
    ]  # fmt: skip


def outcome(mutant: Mutant, source: str, package: Path, seconds: int) -> str:
    """Runs the checks on the mutant in a forked process: "killed", "survived" or "endless" (killed too, but by patience)."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(package, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        encoded = source.encode()
        changed = encoded[: mutant.begin] + mutant.text.encode() + encoded[mutant.end :]
        (Path(folder) / mutant.file).write_bytes(changed)
        child = os.fork()
        if child == 0:
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
            _run_checks(folder)
        _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        return "endless"
    return "survived" if code == 0 else "killed"


def _run_checks(folder: str) -> None:
    """In the child: never returns."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    try:
        from llama_adapter_kernels import triton_kernels

        triton_kernels.__path__ = [folder]
        for check, arguments in checks():
            check(*arguments)
    except BaseException:
        os._exit(1)
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", help="a file of the kernels; may be repeated")
    parser.add_argument(
        "--seconds", type=int, default=240, help="of processor time; a mutant that takes longer is endless"
    )
    parser.add_argument("--sample", type=int, help="so many mutants, drawn at random from all")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--lines", help="first-last: only these lines")
    arguments = parser.parse_args()
    os.environ["TRITON_INTERPRET"] = "1"
    import torch
    import triton  # noqa: F401  # so that each child need not

    from tests.support import interpreter

    torch.set_num_threads(1)
    interpreter.prepare()
    package = Path(__file__).parents[2] / "llama_adapter_kernels" / "triton_kernels"
    first, last = map(int, (arguments.lines or "0-1000000").split("-"))

    def text_of(file: str) -> str:
        return (package / file).read_text()

    sources = {file: text_of(file) for file in arguments.only or FILES}
    mutants = [
        mutant
        for file, source in sources.items()
        for mutant in mutants_of(file, source)
        if first <= mutant.line <= last
    ]
    known = {
        (mutant.file, mutant.original, mutant.text) for file in FILES for mutant in mutants_of(file, text_of(file))
    }
    if stale := EQUIVALENT.keys() - known:
        raise ValueError(f"EQUIVALENT: expected mutants that there are, got {stale}")
    if arguments.sample is not None:
        chosen = random.Random(arguments.seed).sample(range(len(mutants)), min(arguments.sample, len(mutants)))
        mutants = [mutants[number] for number in sorted(chosen)]
    counts = dict.fromkeys(("killed", "survived", "endless", "explained"), 0)
    for number, mutant in enumerate(mutants, 1):
        reason = EQUIVALENT.get((mutant.file, mutant.original, mutant.text))
        found = "explained" if reason else outcome(mutant, sources[mutant.file], package, arguments.seconds)
        counts[found] += 1
        print(f"{number}/{len(mutants)} {found}  {mutant}{f': {reason}' if reason else ''}", flush=True)
    print(", ".join(f"{count} {found}" for found, count in counts.items()))
    sys.exit(1 if counts["survived"] else 0)


if __name__ == "__main__":
    main()
