"""Mutants of the CPU kernels, compiled for AVX2 alone: python -m tests.mutants.cpu [NAME ...].

The library's other objects are those of build/cmake, which an installation leaves there.
"""

# ruff: noqa: E501 (a mutant is read best on one line)

import importlib.util
import json
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

from tests.mutants.driver import ROOT, Mutant, Suite, run

KERNELS = ("forward.cpp", "backward.cpp", "decode.cpp")
ATTENTION = ("tests/cpu/test_attention_cpu.py", "-k", "avx2")
SPECIAL = ("tests/cpu/test_special_values.py", "tests/ops/test_invariants.py", "-k", "avx2 or cpu")
ONE_KEY = ("tests/ops/test_invariants.py", "-k", "cpu and (sees_one_key or causal_row)")
SCALES = ("tests/cpu/test_scales.py", "-k", "avx2")
DECODE = ("tests/cpu/test_attention_cpu.py", "-k", "avx2 and (decode or every_row)")


@cache
def commands() -> dict[str, str]:
    """Compile command by object file."""
    database = ROOT / "build" / "cmake" / "compile_commands.json"
    if not database.exists():
        raise FileNotFoundError(f"{database}: expected the build of an installation, got none; run `make install`")
    return {
        entry["output"]: entry["command"] for entry in json.loads(database.read_text()) if "/cuda/" not in entry["file"]
    }


def build(sources: Path, site: Path, mutant: Mutant) -> None:
    """Compiles the AVX2 kernels that the mutated file is part of, without optimisation that takes long, and links."""
    of_kernels = KERNELS if mutant.file.endswith(".h") else (Path(mutant.file).name,)
    objects = []
    for output, command in commands().items():
        path = ROOT / "build" / "cmake" / output
        if "cpu_avx2.dir" in output and output.endswith(tuple(f"{kernel}.o" for kernel in of_kernels)):
            new = sources / Path(output).name
            arguments = [a.replace(str(ROOT / "csrc"), str(sources / "csrc")) for a in shlex.split(command)]
            arguments[arguments.index("-o") + 1] = str(new)
            subprocess.run([*arguments, "-O1", "-w"], check=True)
            path = new
        objects.append(str(path))
    library = site / "llama_adapter_kernels" / "libllama_adapter_kernels.so"
    # torch's own libraries are local to it: this one has to say that it needs them.
    torch = Path(importlib.util.find_spec("torch").origin).parent / "lib"  # type: ignore[union-attr, arg-type]
    subprocess.run(["c++", "-shared", "-o", str(library), *objects, f"-L{torch}", "-ltorch_cpu"], check=True)


def decode(name: str, old: str, new: str, **more: object) -> Mutant:
    return Mutant(f"decode: {name}", "csrc/cpu/decode.cpp", old, new, **({"tests": DECODE} | more))  # type: ignore[arg-type]


def forward(name: str, old: str, new: str, **more: object) -> Mutant:
    return Mutant(f"forward: {name}", "csrc/cpu/forward.cpp", old, new, **({"tests": ATTENTION} | more))  # type: ignore[arg-type]


def backward(name: str, old: str, new: str, **more: object) -> Mutant:
    return Mutant(f"backward: {name}", "csrc/cpu/backward.cpp", old, new, **({"tests": ATTENTION} | more))  # type: ignore[arg-type]


# fmt: off
MUTANTS = [
    decode("maximum of the first range only", "i < count; ++i) highest = larger_of", "i < 1; ++i) highest = larger_of"),
    decode(
        "ranges combined without rescaling",
        "const C factor = shrinking(maximum_of(part, row), reference);",
        "const C factor = 1;",
    ),
    decode("sums of ranges not rescaled", "sum += factor * sum_of(part, row);", "sum += sum_of(part, row);"),
    decode(
        "a row that sees no key is divided",
        "const C inverse = sum == 0 ? C(0) : C(1) / sum;",
        "const C inverse = C(1) / sum;",
    ),
    decode("gate forgotten", "gate / sum_of(scratch.prefix, row), out", "C(1) / sum_of(scratch.prefix, row), out"),
    decode("prefix not normalised", "gate / sum_of(scratch.prefix, row), out", "gate, out"),
    decode(
        "causal limit off by one",
        "begin, end, seq.diagonal + 1, state);",
        "begin, end, seq.diagonal + 2, state);",
    ),
    decode("hidden keys keep their scores", "step.scores[t * kCount + r] = kMinusInfinity;", "(void)t;"),
    decode("softmax's tail is not hidden", "i < end; ++i) scores[i] = kMinusInfinity;", "i < end; ++i) scores[i] = 0;"),
    decode("sum not rescaled between tiles", "load(sum_so_far) * shrinking_by + sum[0]", "load(sum_so_far) + sum[0]"),
    decode("accumulator not rescaled", "load(to) * broadcast(rescale[i / kVecs]) + sum[i]", "load(to) + sum[i]"),
    decode("scale forgotten", "to[d] *= static_cast<C>(params.scale);", "to[d] *= C(1);"),
    decode("the last range is lost", "count = larger(1, (seen + keys - 1) / keys);", "count = larger(1, seen / keys);"),
    decode(
        "window's start ignored",
        "Ranges(const Sequence& seq, int64_t rows) : begin(seq.key_begin)",
        "Ranges(const Sequence& seq, int64_t rows) : begin(0)",
    ),
    forward("window's start ignored", "for (int64_t k0 = seq.key_begin; k0 < end;", "for (int64_t k0 = 0; k0 < end;"),
    forward("diagonal not masked", "sees<C>(m, t, hidden) ? load(row) : broadcast(kMinusInfinity)", "load(row)"),
    forward("mask not added", "if (params.mask.type != MaskType::kNone) add_mask", "if (false) add_mask"),
    forward(
        "old sum not rescaled",
        "total[v] = load(scratch.sum + m + v * kLane) * rescale;",
        "total[v] = load(scratch.sum + m + v * kLane);",
    ),
    forward(
        "gate's sign",
        "broadcast(gate) * load(sum + m) / load(scratch.sum + m)",
        "-broadcast(gate) * load(sum + m) / load(scratch.sum + m)",
    ),
    forward(
        "prefix not normalised", "broadcast(gate) * load(sum + m) / load(scratch.sum + m)", "broadcast(gate) * load(sum + m)"
    ),
    forward(
        "words' sum not in the prefix's weight",
        "broadcast(gate) * load(sum + m) / load(scratch.sum + m)",
        "broadcast(gate) / load(scratch.sum + m)",
    ),
    forward("a row without keys has no prefix", "sum[m] = scratch.sum[m] == 0 ? C(1) : scratch.sum[m];", "sum[m] = scratch.sum[m];"),
    forward(
        "log-sum-exp without its maximum",
        "static_cast<C>(scratch.maximum[m] + __builtin_log",
        "static_cast<C>(0 * scratch.maximum[m] + __builtin_log",
    ),
    forward(
        "log-sum-exp of a row without keys",
        "out[m] = scratch.sum[m] == 0 ? kMinusInfinity",
        "out[m] = scratch.sum[m] == 0 ? C(0)",
        tests=SPECIAL,
    ),
    forward(
        "later prefix blocks lose their maximum",
        "exp2_nonpositive((load(at) - highest) * log2e)) * factor",
        "exp2_nonpositive(load(at) * log2e)) * factor",
    ),
    backward(
        "keys that are not seen keep their probability",
        "probability = sees<C>(m, t, hidden) ? probability : Vec<C>{};",
        "(void)t;",
    ),
    backward(
        "delta forgotten",
        "load(scratch.scores + t * kBlockQueries + m) * (load(d_at) - delta)",
        "load(scratch.scores + t * kBlockQueries + m) * load(d_at)",
    ),
    backward(
        "only the first block's D_w is exact",
        "if (!all_here) take_block &=",
        "if (!all_here) take_block = IntVec<C>{}; else take_block &=",
        tests=ONE_KEY,
    ),
    backward(
        "every block's own D_w",
        "if (!all_here) take_block &= apart * apart <= load(scratch.squared_noise + q0 + m);",
        "take_block |= sums.p > C(0);",
    ),
    backward(
        "D_w of overflowed outputs is not mended",
        "for (int64_t i = 0; i < blocks; ++i) mend_delta(head, i);",
        "",
        tests=SCALES,
    ),
    backward("gate's part stays in D_w", "load(scratch.delta + first + m) - in_output", "load(scratch.delta + first + m)"),
    backward(
        "the prefix's dS without D_p",
        "store(d_at, probability * (load(d_at) - d_prefix));",
        "store(d_at, probability * load(d_at));",
    ),
    backward("the prefix's probabilities without the gate", "factor = broadcast(gate) * inverse;", "factor = inverse;"),
    backward(
        "dQ without scale",
        "narrow_row(dquery + i * padded_depth, scale, depth,",
        "narrow_row(dquery + i * padded_depth, C(1), depth,",
    ),
    backward("dK without scale", "narrow_row(scratch.dkeys + from, scale, depth,", "narrow_row(scratch.dkeys + from, C(1), depth,"),
    backward(
        "keys outside of the window are not written",
        "narrow(C(0), dkey[d]), narrow(C(0), dvalue[d]);",
        "(void)dkey, (void)dvalue;",
    ),
    backward(
        "rows that see nothing",
        "scratch.logsumexp[i] = sees_keys ? saved[i] : C(__builtin_huge_val());",
        "scratch.logsumexp[i] = i < seq.queries ? saved[i] : C(0);",
    ),
    backward(
        "the first split's dQ alone",
        "for (int64_t split = 1; split < part.key_splits; ++split) {",
        "for (int64_t split = 1; split < 1; ++split) {",
    ),
    backward(
        "the prefix counts in every split",
        "if (dquery && split == 0) add_to_dquery(summed_k",
        "if (dquery) add_to_dquery(summed_k",
    ),
    backward(
        "entries of the prefix table are mixed up",
        "if (sequence_of(params, b).prefix != entry) continue;",
        "if (false) continue;",
    ),
    Mutant(
        "mask added to hidden keys",
        "csrc/cpu/scores.h",
        "square[i] == broadcast(C(-__builtin_huge_val())) ? square[i] : load(row) + square[i]",
        "load(row) + square[i]",
        SPECIAL,
    ),
    Mutant(
        "exp2 keeps bits of NaN",
        "csrc/cpu/simd.h",
        "return (power * f) * p + power;\n#endif\n}",
        "return (V)((IntVec<float>)(p * f + 1.0f) + ((IntVec<float>)(shifted - 127.0f) << 23));\n#endif\n}",
        SPECIAL,
    ),
]
# fmt: on

# Tests that name no instruction set shall run the mutated kernels too, on processors that have better ones.
SUITE = Suite("cpu", MUTANTS, ("csrc",), build, ATTENTION, {"LAK_CPU_ISA": "avx2"})

if __name__ == "__main__":
    sys.exit(min(1, run(SUITE, sys.argv[1:])))
