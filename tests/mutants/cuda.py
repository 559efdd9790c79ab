"""Mutants of the CUDA kernels, run by the emulator: python -m tests.mutants.cuda [NAME ...].

Only the instantiations for bfloat16 and float32 with 64 columns are built with the fault, besides float16's where outputs have
to overflow and those of 128 columns where a tile is chosen; the others come from build/emulator.
"""

# ruff: noqa: E501 (a mutant is read best on one line)

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

from tests.mutants.driver import ROOT, Mutant, Suite, run
from tests.support.emulator import build as build_emulator

BUILT = ROOT / "build" / "emulator"
INSTANTIATED = ("bf16_d64.cu.o", "fp32_d64.cu.o")
FLOAT16 = ("fp16_d64.cu.o",)  # the only type whose outputs overflow
WIDE = ("bf16_d128.cu.o",)  # the only one with two tiles to choose from
KERNELS = ("tests/cuda/test_cuda_emulated.py", "-k", "test_forward_and_backward and d64 or threads")
EDGES = ("tests/cuda/test_cuda_edges.py", "tests/cuda/test_cuda_exactness.py", "tests/cuda/test_cuda_paths.py")
PATHS = ("tests/cuda/test_cuda_paths.py",)
DECODE = ("tests/cuda/test_cuda_emulated.py", "-k", "test_decode")
OFFSETS = ("tests/cuda/test_cuda_edges.py", "-k", "offsets or promised")
WINDOWS = ("tests/cuda/test_cuda_edges.py", "-k", "windows or outside_of")
MASKED = ("tests/cuda/test_cuda_edges.py", "tests/cuda/test_cuda_exactness.py", "-k", "mask_hides or hidden_key")
BAD_PREFIX = ("tests/cuda/test_cuda_edges.py", "-k", "prefix_index")
ORDER = ("tests/cuda/test_cuda_edges.py", "-k", "one_order")
TAILS = ("tests/cuda/test_cuda_edges.py", "-k", "tail")
NOT_FINITE = ("tests/cuda/test_cuda_not_finite.py",)
CHOSEN_TILE = ("tests/cuda/test_cuda_paths.py", "-k", "chosen_tile")  # head_dim 128 as well
OVERFLOWS = ("tests/cuda/test_cuda_exactness.py", "-k", "beyond_float16 or scores_of_every_size")  # FLOAT16 as well


@cache
def commands() -> tuple[Path, dict[str, str], dict[str, str]]:
    """The module without faults, compile commands by object, and what each object depends on."""
    module = build_emulator(BUILT)
    database = subprocess.run(["ninja", "-C", BUILT, "-t", "compdb"], capture_output=True, text=True, check=True).stdout
    found = {entry["output"]: entry["command"] for entry in json.loads(database) if entry["output"].endswith(".o")}
    deps = subprocess.run(["ninja", "-C", BUILT, "-t", "deps"], capture_output=True, text=True, check=True).stdout
    return module, found, {part.split(":", 1)[0]: part for part in deps.split("\n\n") if part.strip()}


def build(sources: Path, site: Path, mutant: Mutant) -> None:
    """Compiles what the mutated file is part of, and links it before the other objects."""
    module, compile_commands, depends = commands()
    instantiated = INSTANTIATED
    instantiated += FLOAT16 if mutant.tests == OVERFLOWS else WIDE if mutant.tests == CHOSEN_TILE else ()
    faulty: dict[str, str] = {}
    running = []
    for name, command in compile_commands.items():
        instantiation = name.startswith(("forward_", "backward_", "decode_"))
        if str(ROOT / mutant.file) in depends.get(name, "") and (not instantiation or name.endswith(instantiated)):
            faulty[name] = str(sources / name)
            arguments = command.replace(str(ROOT / "csrc"), str(sources / "csrc")).replace(
                f"-o {name}", f"-o {sources / name}"
            )
            running.append(subprocess.Popen(arguments, shell=True, cwd=BUILT))
            if len(running) == 2 and running.pop(0).wait() != 0:
                raise RuntimeError(f"{name}: the mutant does not compile")
    if any(process.wait() != 0 for process in running):
        raise RuntimeError(f"{mutant.name}: the mutant does not compile")
    objects = [*faulty.values(), *(str(BUILT / name) for name in compile_commands if name not in faulty)]
    linked = site / module.name
    import torch

    library = Path(torch.__file__).parent / "lib"
    subprocess.run(["g++", "-shared", *objects, "-o", str(linked), f"-L{library}", "-l:libtorch_cpu.so"], check=True)
    os.environ["LAK_EMULATOR"] = str(linked)


def forward(name: str, old: str, new: str, tests: tuple[str, ...] = KERNELS) -> Mutant:
    return Mutant(f"forward: {name}", "csrc/cuda/sm80/forward.h", old, new, tests)


def backward(file: str, name: str, old: str, new: str, tests: tuple[str, ...] = KERNELS) -> Mutant:
    return Mutant(f"{file}: {name}", f"csrc/cuda/sm80/backward/{file}.h", old, new, tests)


def shared(file: str, name: str, old: str, new: str, tests: tuple[str, ...] = KERNELS) -> Mutant:
    return Mutant(f"{file}: {name}", f"csrc/cuda/{file}.h", old, new, tests)


# fmt: off
MUTANTS = [
    forward("barrier before K", "__syncthreads();  // K (and Q) is there", "// "),
    forward("barrier before V", "__syncthreads();  // V is there", "// "),
    forward("wait for K", "ptx::wait_async_copies<0>();\n    __syncthreads();  // K (and Q)", "__syncthreads();  // K (and Q)"),
    forward("wait for V", "ptx::wait_async_copies<0>();\n    __syncthreads();  // V", "__syncthreads();  // V"),
    forward("barrier before the windows", "__syncthreads();  // the windows", "// "),
    forward("tiles that begin before a window", "at >= last.begin && at + Tiles::kKeys <= first.end", "at + Tiles::kKeys <= first.end", PATHS),
    forward("tiles that end after a window", "at >= last.begin && at + Tiles::kKeys <= first.end", "at >= last.begin && at + Tiles::kKeys <= last.end"),
    forward("scores are added to what registers held", "set_zero(c);\n    if (any) multiply_abt(c", "if (any) multiply_abt(c"),
    forward("gate's sign", "weight[m][half] = gate / softmax[m].total[half];", "weight[m][half] = -gate / softmax[m].total[half];"),
    forward("gate forgotten", "weight[m][half] = gate / softmax[m].total[half];", "weight[m][half] = 1.0f / softmax[m].total[half];"),
    forward("a row without keys is divided", "sum == 0.0f ? 0.0f : 1.0f / sum;", "1.0f / sum;"),
    forward("log-sum-exp without its sum", "(largest[m][half] * scale + ptx::log2_fast(sum)) * kLn2", "(largest[m][half] * scale) * kLn2"),
    forward("prefix slots that are not there", "% 2 < slots_left ? c[m][n][e] * factor : -kInfinity;", "% 2 < 16 ? c[m][n][e] * factor : -kInfinity;"),
    forward("later prefix tiles keep the first's scores", "prefix_scores(c, memory.query, warp_row, memory.prefix_key, s.slots - slot, before);\n      }", "}"),
    forward("NaN leaves its sequence", "&& part.is_whole() && !all_finite(output));", "&& false);", NOT_FINITE),
    forward("a part copies the others' rows", "at, keys.begin, keys.end, head_dim", "at, s.key_begin, s.key_end, head_dim", NOT_FINITE),
    forward("a part stores the others' rows", "end = lower(s.rows, part.end);", "end = s.rows;", NOT_FINITE),
    forward("tokens after the last sequence keep what memory held", "if (first_row >= s.queries) return write_empty_rows<T, Memory::Tiles::kRows>(params, place);", "if (first_row >= s.queries) return;", TAILS),
    shared("sm80/softmax", "sum not rescaled", "total[m][half] = fmaf(total[m][half], rescale, sum);", "total[m][half] += sum;"),
    shared("sm80/softmax", "output not rescaled", "output[m][n][2 * half] *= rescale;", ""),
    shared("sm80/softmax", "a row without keys", "tile_max == -kInfinity ? 0.0f : tile_max,", "tile_max,"),
    shared("sm80/softmax", "prefix sum not rescaled", "total[half] *= rescale;", "", EDGES),
    shared("sm80/softmax", "weighted sum not rescaled", "weighted[half] *= rescale;", "", EDGES),
    shared("sm80/scores", "windows one key too long", "from + at < count", "from + at <= count"),
    shared("sm80/scores", "a mask shows hidden NaN", "return mask == -kInfinity ? mask : value + mask;", "return value + mask;", MASKED),
    shared("sm80/scores", "float32 loses what the shift rounds", "ptx::exp2_fast(fmaf(difference, factor, -rest))", "ptx::exp2_fast(difference * factor)", EDGES),
    shared("problem", "the diagonal of token tiles", "last - rows_after)};", "last - rows_after + 1)};", PATHS),
    shared("problem", "the diagonal of a sequence", "lower(s.key_end, row + s.diagonal + 1))};", "lower(s.key_end, row + s.diagonal + 2))};"),
    shared("problem", "the window's start", "return {s.key_begin, higher(s.key_begin,", "return {0, higher(s.key_begin,"),
    shared("problem", "the first query that sees a key", "lower(higher(first - s.diagonal, 0), s.queries)", "lower(higher(first - s.diagonal + 64, 0), s.queries)"),
    shared("problem", "the last query that sees a key of a tile", "sequence_holding(params.cu_seqlens_k, params.batch, last) + 1, params.total_q)};", "sequence_holding(params.cu_seqlens_k, params.batch, first) + 1, params.total_q)};", PATHS),
    shared("problem", "offsets past the tokens", "clamp(ptx::load_global(cu_seqlens + at), 0, total)", "ptx::load_global(cu_seqlens + at)", OFFSETS),
    shared("problem", "a window's end past the keys", "clamp(ptx::load_global(params.key_end + b), 0, s.keys)", "ptx::load_global(params.key_end + b)", WINDOWS),
    shared("problem", "a window's start before the keys", "clamp(ptx::load_global(params.key_start + b), 0, s.keys)", "ptx::load_global(params.key_start + b)", WINDOWS),
    shared("problem", "queries of a sequence longer than promised", "clamp(offset_at(params.cu_seqlens_q, b + 1, params.total_q) - s.first_query, 0, params.seq_q)", "(offset_at(params.cu_seqlens_q, b + 1, params.total_q) - s.first_query)", OFFSETS),
    shared("problem", "keys of a sequence longer than promised", "clamp(offset_at(params.cu_seqlens_k, b + 1, params.total_k) - s.first_key, 0, params.seq_k)", "(offset_at(params.cu_seqlens_k, b + 1, params.total_k) - s.first_key)", OFFSETS),
    shared("problem", "an entry outside of the prefix table is no prefix", "s.bad_prefix = entry < -1 || entry >= params.prefix_count;", "s.bad_prefix = false;", BAD_PREFIX),
    shared("problem", "the gate of a bad prefix is a number", "if (s.bad_prefix) return std::numeric_limits<float>::quiet_NaN();", "if (s.bad_prefix) return 0.0f;", BAD_PREFIX),
    forward("a bad prefix leaves the output as it is", "s.bad_prefix ? gate : 1.0f", "1.0f", BAD_PREFIX),
    shared("sm80/fragments", "rows before the first one are copied", "begin = first + own - low;", "begin = first + own;", WINDOWS),
    shared("sm80/fragments", "rows after the last one are copied", "low < high ? high - low : 0", "low < high ? high - low + 1 : 0", WINDOWS),
    shared("sm80/zero_tail", "dK keeps what memory held", "clear(params.dkey, params.heads_kv, params.cu_seqlens_k, params.total_k);", "", TAILS),
    shared("sm80/zero_tail", "dV keeps what memory held", "clear(params.dvalue, params.heads_kv, params.cu_seqlens_k, params.total_k);", "", TAILS),
    shared("sm80/zero_tail", "dQ keeps what memory held", "clear(params.dquery, params.heads_q, params.cu_seqlens_q, params.total_q);", "", TAILS),
    shared("sm80/zero_tail", "the output keeps what memory held", "clear(params.output, params.heads_q, params.cu_seqlens_q, params.total_q);", "", TAILS),
    shared("sm80/zero_tail", "the log-sum-exp keeps what memory held", "* params.logsumexp.stride_head + row, -kInfinity);", "* params.logsumexp.stride_head + row, 0.0f);", TAILS),
    backward("workspace", "the order of sums is not kept where it was asked for", "params.deterministic == 0 && ", "", ORDER),
    shared("problem", "a part begins with the next sequence", "const int last = higher(lower(end, s.queries) - 1, 0)", "const int last = higher(lower(end, s.queries) - 2, 0)", NOT_FINITE),
    backward("rows", "barrier before a tile", "__syncthreads();  // the tile is there", "// "),
    backward("rows", "wait for a tile", "ptx::wait_async_copies<0>();\n    __syncthreads();  // the tile is there", "__syncthreads();  // the tile is there"),
    backward("rows", "gate's part stays in D_w", "- gate * prefix_delta[half];", ";"),
    backward("rows", "dgate's sign", "dgate += prefix_delta[half];", "dgate -= prefix_delta[half];"),
    backward("rows", "the prefix's dS without D_p", "c[0][n][e] * (d[0][n][e] - prefix_delta[half]);", "c[0][n][e] * d[0][n][e];"),
    backward("rows", "dS of slots that have no memory is stored", "if (slot + column >= stride) continue;", ""),
    shared("sm80/fragments", "dS of slots that have no memory is read", "a.r[half + k / 4] = column < columns ?", "a.r[half + k / 4] = true ?", NOT_FINITE),
    shared("sm80/fragments", "float32 dS of slots that have no memory is read", "k < columns ? ptx::load_global", "true ? ptx::load_global", NOT_FINITE),
    shared("sm80/forward_choice", "the chosen tile is forgotten", "return keys == 0 ? !fits : keys == 32;", "return !fits;", CHOSEN_TILE),
    shared("sm80/forward_choice", "the card's own tile is the other", "return keys == 0 ? !fits : keys == 32;", "return keys == 0 ? fits : keys == 32;", CHOSEN_TILE),
    backward("rows", "few-key rows take the rounded D_w", "(few[half] || coarse || !fits)", "(coarse || !fits)", EDGES),
    backward("rows", "large scores take the coarse log-sum-exp", "(few[half] || coarse || !fits)", "(few[half] || !fits)", OVERFLOWS),
    backward("rows", "overflowed outputs keep their D_w", "(few[half] || coarse || !fits)", "(few[half] || coarse)", OVERFLOWS),
    backward("rows", "sums of dQ begin anywhere", "for (int i = 4 * lane; i < 16 * head_dim; i += 128)", "for (int i = 4 * lane; i < 0; i += 128)", PATHS),
    backward("exact", "NaN of a neighbour in D_w", "dprobability[n][e] = seen ? dprobability[n][e] : 0.0f;", "", NOT_FINITE),
    backward("pair", "dS without D_w", "c[m][n][e] * (d[m][n][e] - delta);", "c[m][n][e] * d[m][n][e];"),
    backward("pair", "scores are added to what registers held", "      set_zero(c);\n      set_zero(d);\n      if (Scores::has(warp))", "      set_zero(d);\n      if (Scores::has(warp))"),
    backward("words", "dP is added to what registers held", "    set_zero(c);\n    set_zero(d);\n    if (Scores::has(warp))", "    set_zero(c);\n    if (Scores::has(warp))"),
    backward("pair", "barrier before dO", "__syncthreads();  // dO is there", "// "),
    backward("pair", "barrier before P and dS", "__syncthreads();  // P and dS are there", "// "),
    backward("pair", "barrier after Q", "__syncthreads();  // every warp is done with Q", "// "),
    backward("pair", "barrier before the next Q", "__syncthreads();  // the next Q is there", "// "),
    backward("pair", "wait for dO", "ptx::wait_async_copies<0>();\n      __syncthreads();  // dO is there", "__syncthreads();  // dO is there"),
    backward("pair", "wait for the next Q", "ptx::wait_async_copies<0>();\n    __syncthreads();  // the next Q", "__syncthreads();  // the next Q"),
    backward("pair", "a block ends while copies are in flight", "ptx::wait_async_copies<0>();  // K and V of keys that no query sees", ""),
    backward("pair", "keys before a window", "at < last.begin || at + 8 * kN > first.end", "at + 8 * kN > first.end", PATHS),
    backward("pair", "keys after a window", "at < last.begin || at + 8 * kN > first.end", "at < last.begin"),
    backward("pair", "dK without scale", "store(params.dkey, dkey, static_cast<float>(params.scale));", "store(params.dkey, dkey, 1.0f);"),
    backward("pair", "NaN of a neighbour's statistics", "copies.clear_statistics_beside_part(row_of(step));", "", NOT_FINITE),
    backward("words", "barrier before K", "__syncthreads();  // K is there", "// "),
    backward("words", "barrier before dS", "__syncthreads();  // dS is there", "// "),
    backward("words", "barrier before the next V", "__syncthreads();  // the next V is there", "// "),
    backward("words", "wait for K", "ptx::wait_async_copies<0>();\n    __syncthreads();  // K is there", "__syncthreads();  // K is there"),
    backward("words", "wait for the next V", "ptx::wait_async_copies<0>();\n    __syncthreads();  // the next V", "__syncthreads();  // the next V"),
    backward("words", "wait for Q, dO and the first V", "ptx::wait_async_copies<1>();", ""),
    backward("words", "dQ without the prefix", "add_prefix_product(dquery, prefix_key, workspace,", "if (slot > 0) add_prefix_product(dquery, prefix_key, workspace,"),
    backward("words", "NaN leaves its sequence", "__syncthreads_or(!finite) != 0;", "__syncthreads_or(!finite) > 1;", NOT_FINITE),
    backward("words", "the pair of a part is carried on", "memory.begin_pass(part_of_queries(params, same.s, again ? same.s.rows : part.begin));\n    if (threadIdx.x == 0) memory.store_carries(false);", "memory.begin_pass(part_of_queries(params, same.s, again ? same.s.rows : part.begin));", NOT_FINITE),
    backward("keys", "dQ without the prefix", "add_prefix_product(dquery, prefix_key, workspace, b, head, row, slot, 0);", "", PATHS),
    backward("keys", "dQ without scale", "static_cast<float>(params.scale) * (s.bad_prefix", "1.0f * (s.bad_prefix", PATHS),
    backward("keys", "wait for the prefix", "ptx::wait_async_copies<0>();", "", PATHS),
    backward("keys", "a bad prefix leaves dQ as it is", "s.bad_prefix ? gate_of(params, s, head) : 1.0f", "1.0f", BAD_PREFIX),
    backward("words", "a bad prefix leaves dQ as it is", "same.s.bad_prefix ? gate_of(params, same.s, head) : 1.0f", "1.0f", BAD_PREFIX),
    backward("sums", "entries of the prefix table are mixed up", "return s.slots > 0 && s.prefix == entry;", "return s.slots > 0;"),
    backward("sums", "the first head of a group alone", "i < group * grid.chunks; ++i) {", "i < grid.chunks; ++i) {"),
]
# fmt: on

SUITE = Suite("cuda", MUTANTS, ("csrc",), build, KERNELS)

if __name__ == "__main__":
    sys.exit(min(1, run(SUITE, sys.argv[1:])))
