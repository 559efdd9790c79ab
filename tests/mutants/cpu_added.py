"""Faults of the CPU kernels that no rule of schemata.py makes."""

from tests.mutants.sources import NOTHING, added_in

# fmt: off
# ruff: noqa: E501 (a mutant is read best on one line)
ADDED = [
    *added_in("cpu/decode.cpp",
              ("maximum of the first range only", "i < count", "i < 1", "i < count; ++i) highest = larger_of"),
              ("ranges combined without rescaling", "shrinking(maximum_of(part, row), reference)", "C(1)", "const C factor = shrinking(maximum_of(part, row), reference);"),
              ("sums of ranges not rescaled", "factor * sum_of(part, row)", "sum_of(part, row)"),
              ("gate forgotten", "gate / sum_of(scratch.prefix, row)", "C(1) / sum_of(scratch.prefix, row)"),
              ("prefix not normalised", "gate / sum_of(scratch.prefix, row)", "gate"),
              ("causal limit off by one", "seq.diagonal + 1", "seq.diagonal + 2", "begin, end, seq.diagonal + 1, state);"),
              ("hidden keys keep their scores", "step.scores[t * kCount + r] = kMinusInfinity", "step.scores[t * kCount + r]"),
              ("softmax's tail is not hidden", "scores[i] = kMinusInfinity", "scores[i] = 0", "i < end; ++i) scores[i] = kMinusInfinity;"),
              ("sum not rescaled between tiles", "load(sum_so_far) * shrinking_by + sum[0]", "load(sum_so_far) + sum[0]"),
              ("accumulator not rescaled", "load(to) * broadcast(rescale[i / kVecs]) + sum[i]", "load(to) + sum[i]"),
              ("the last range is lost", "(seen + keys - 1) / keys", "seen / keys"),
              ("window's start ignored", "seq.key_begin", "0", "Ranges(const Sequence& seq, int64_t rows) : begin(seq.key_begin)")),
    *added_in("cpu/forward.cpp",
              ("window's start ignored", "seq.key_begin", "0", "int64_t k0 = seq.key_begin"),
              ("old sum not rescaled", "load(scratch.sum + m + v * kLane) * rescale", "load(scratch.sum + m + v * kLane)"),
              ("gate's sign", "broadcast(gate) * load(sum + m) / load(scratch.sum + m)", "-broadcast(gate) * load(sum + m) / load(scratch.sum + m)"),
              ("prefix not normalised", "broadcast(gate) * load(sum + m) / load(scratch.sum + m)", "broadcast(gate) * load(sum + m)"),
              ("words' sum not in the prefix's weight", "broadcast(gate) * load(sum + m) / load(scratch.sum + m)", "broadcast(gate) / load(scratch.sum + m)"),
              ("log-sum-exp without its maximum", "scratch.maximum[m] + __builtin_log(static_cast<double>(scratch.sum[m]))", "__builtin_log(static_cast<double>(scratch.sum[m]))"),
              ("later prefix blocks lose their maximum", "load(at) - highest", "load(at)")),
    *added_in("cpu/backward.cpp",
              ("delta forgotten", "load(d_at) - delta", "load(d_at)"),
              ("only the first block's D_w is exact", "take_block &= apart * apart <= load(scratch.squared_noise + q0 + m)", "take_block = IntVec<C>{}"),
              ("every block's own D_w", "take_block &= apart * apart <= load(scratch.squared_noise + q0 + m)", "take_block |= sums.p > C(0)"),
              ("D_w of overflowed outputs is not mended", "mend_delta(head, i)", NOTHING, "i < blocks; ++i) mend_delta(head, i);"),
              ("gate's part stays in D_w", "load(scratch.delta + first + m) - in_output", "load(scratch.delta + first + m)"),
              ("the prefix's dS without D_p", "load(d_at) - d_prefix", "load(d_at)"),
              ("the prefix's probabilities without the gate", "broadcast(gate) * inverse", "inverse"),
              ("dQ without scale", "scale", "C(1)", "narrow_row(dquery + i * padded_depth, scale, depth,"),
              ("dK without scale", "scale", "C(1)", "narrow_row(scratch.dkeys + from, scale, depth,"),
              ("keys outside of the window are not written", "narrow(C(0), dkey[d]), narrow(C(0), dvalue[d])", NOTHING),
              ("rows that see nothing", "sees_keys ? saved[i] : C(__builtin_huge_val())", "i < seq.queries ? saved[i] : C(0)"),
              ("the first split's dQ alone", "split < part.key_splits", "split < 1", "int64_t split = 1; split < part.key_splits")),
    *added_in("cpu/simd.h",
              ("exp2 keeps bits of NaN", "(power * f) * p + power", "(V)((IntVec<float>)(p * f + 1.0f) + ((IntVec<float>)(shifted - 127.0f) << 23))", "return (power * f) * p + power;\n#endif\n}")),
]
# fmt: on
