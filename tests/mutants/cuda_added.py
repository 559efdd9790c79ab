"""Faults of the CUDA kernels that no rule of schemata.py makes: one expression each, and what stands there instead."""

from dataclasses import dataclass

NOTHING = "(void)0"


@dataclass(frozen=True)
class Added:
    file: str
    name: str
    old: str
    new: str
    where: str = ""  # a text with `old` in it that occurs once in the file, where `old` does not


def _in(file: str, *faults: tuple[str, ...]) -> list[Added]:
    return [Added(file, *fault) for fault in faults]


# fmt: off
# ruff: noqa: E501 (a mutant is read best on one line)
ADDED = [
    *_in("cuda/problem.h",
         ("the diagonal of token tiles", "last - rows_after", "last - rows_after + 1"),
         ("the diagonal of a sequence", "row + s.diagonal + 1", "row + s.diagonal + 2"),
         ("the window's start", "s.key_begin", "0", "return {s.key_begin, higher("),
         ("the first query that sees a key", "first - s.diagonal", "first - s.diagonal + 64"),
         ("the last query that sees a key of a tile", "last", "first", "params.batch, last) + 1"),
         ("an entry outside of the prefix table is no prefix", "entry < -1 || entry >= params.prefix_count", "false"),
         ("the gate of a bad prefix is a number", "std::numeric_limits<float>::quiet_NaN()", "0.0f"),
         ("a part begins with the next sequence", "lower(end, s.queries) - 1", "lower(end, s.queries) - 2")),
    *_in("cuda/sm80/forward.h",
         ("tiles that end after a window", "at + Tiles::kKeys <= first.end", "at + Tiles::kKeys <= last.end"),
         ("gate's sign", "gate / softmax[m].total[half]", "-gate / softmax[m].total[half]"),
         ("gate forgotten", "gate / softmax[m].total[half]", "1.0f / softmax[m].total[half]"),
         ("log-sum-exp without its sum", "(largest[m][half] * scale + ptx::log2_fast(sum)) * kLn2", "largest[m][half] * scale * kLn2"),
         ("later prefix tiles keep the first's scores", "prefix_scores(c, memory.query, warp_row, memory.prefix_key, s.slots - slot, before)", NOTHING,
          "        prefix_scores(c, memory.query, warp_row, memory.prefix_key, s.slots - slot, before);\n      }"),
         ("NaN leaves its sequence", "!all_finite(output)", "false"),
         ("a part copies rows before it", "keys.begin", "s.key_begin", "at, keys.begin, keys.end"),
         ("a part copies rows after it", "keys.end", "s.key_end", "at, keys.begin, keys.end"),
         ("tokens after the last sequence keep what memory held", "write_empty_rows<T, Memory::Tiles::kRows>(params, place)", NOTHING)),
    *_in("cuda/sm80/softmax.h",
         ("sum not rescaled", "fmaf(total[m][half], rescale, sum)", "total[m][half] + sum")),
    *_in("cuda/sm80/scores.h",
         ("float32 loses what the shift rounds", "ptx::exp2_fast(fmaf(difference, factor, -rest))", "ptx::exp2_fast(difference * factor)")),
    *_in("cuda/sm80/fragments.h",
         ("rows before the first one are copied", "first + own - low", "first + own"),
         ("rows after the last one are copied", "high - low", "high - low + 1")),
    *_in("cuda/sm80/zero_tail.h",
         ("dK keeps what memory held", "clear(params.dkey, params.heads_kv, params.cu_seqlens_k, params.total_k)", NOTHING),
         ("dV keeps what memory held", "clear(params.dvalue, params.heads_kv, params.cu_seqlens_k, params.total_k)", NOTHING),
         ("dQ keeps what memory held", "clear(params.dquery, params.heads_q, params.cu_seqlens_q, params.total_q)", NOTHING),
         ("the output keeps what memory held", "clear(params.output, params.heads_q, params.cu_seqlens_q, params.total_q)", NOTHING)),
    *_in("cuda/sm80/forward_choice.h",
         ("the card's own tile is the other", "!fits", "fits")),
    *_in("cuda/sm80/backward/rows.h",
         ("gate's part stays in D_w", "output.product(doutput, warp_row, half) - gate * prefix_delta[half]", "output.product(doutput, warp_row, half)"),
         ("the prefix's dS without D_p", "d[0][n][e] - prefix_delta[half]", "d[0][n][e]"),
         ("sums of dQ begin anywhere", "i < 16 * head_dim", "false")),
    *_in("cuda/sm80/backward/pair.h",
         ("dS without D_w", "d[m][n][e] - delta", "d[m][n][e]"),
         ("dK without scale", "static_cast<float>(params.scale)", "1.0f", "dkey, static_cast<float>(params.scale)"),
         ("NaN of a neighbour's statistics", "copies.clear_statistics_beside_part(row_of(step))", NOTHING)),
    *_in("cuda/sm80/backward/words.h",
         ("dQ without the prefix", "add_prefix_product(dquery, prefix_key, workspace, b, head, first + row, slot, column)", NOTHING),
         ("NaN leaves its sequence", "!finite", "false"),
         ("the pair of a part is carried on, queries", "memory.store_carries(false)", NOTHING,
          "same.s.rows : part.begin));\n    if (threadIdx.x == 0) memory.store_carries(false)"),
         ("the pair of a part is carried on, keys", "memory.store_carries(false)", NOTHING,
          "same.s.key_rows : part.begin));\n  if (threadIdx.x == 0) memory.store_carries(false)")),
    *_in("cuda/sm80/backward/keys.h",
         ("dQ without the prefix", "add_prefix_product(dquery, prefix_key, workspace, b, head, row, slot, 0)", NOTHING),
         ("dQ without scale", "static_cast<float>(params.scale)", "1.0f")),
    *_in("cuda/sm80/backward/sums.h",
         ("the first head of a group alone", "i < group * grid.chunks", "i < grid.chunks")),
]
# fmt: on
