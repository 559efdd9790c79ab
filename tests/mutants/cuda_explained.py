"""Mutants of the CUDA kernels that no test can notice, and why."""

EQUAL = "of two equal numbers it is the same which is taken"
UNREAD = "an address that is not valid is not read"
BALANCE = "it changes which split takes which keys, not which keys are taken"
BOTH = "where the device is unknown so is what it has"


FAILED = "cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess"
UNKNOWN = "cudaDeviceGetAttribute(&value, attribute, device) != cudaSuccess"

# fmt: off
# By Mutant.name: file, what stands there, what stands there instead.
EXPLAINED: dict[str, str] = {
    "cuda/problem.h: x < low -> x <= low": EQUAL,
    "cuda/problem.h: x > high -> x >= high": EQUAL,
    "cuda/problem.h: a < b -> a <= b": EQUAL,
    "cuda/problem.h: a > b -> a >= b": EQUAL,
    "cuda/problem.h: params.total_k <= kLongSequence * params.batch -> params.total_k < kLongSequence * params.batch":
        "for a batch of exactly that average length either way is right",
    "cuda/problem.h: params.batch == 0 -> false (2)":
        "without sequences there are token tiles only where there is no key, and then nobody asks who sees one",
    "cuda/sm80/forward.h: s.slots - slot -> s.slots + slot (2)": "the values of slots that are not there are 0",
    "cuda/launch_kernel.h: blocks > std::numeric_limits<int32_t>::max() -> blocks >= std::numeric_limits<int32_t>::max()":
        "a grid of exactly 2^31 - 1 blocks is as far out of reach of a test as of a problem",
    "cuda/sm80/launchers.h: bytes <= device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) -> "
    "bytes < device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)":
        "no kernel needs exactly what a device has",
    "cuda/sm80/launchers.h: 2 * (bytes + 1024) <= device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) -> "
    "2 * (bytes + 1024) < device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor)":
        "no kernel needs exactly what a device has",
    f"cuda/sm80/launchers.h: cudaGetDevice(&device) != cudaSuccess || {UNKNOWN} -> {UNKNOWN}": BOTH,
    "cuda/sm80/scores.h: rule.mask.type == MaskType::kNone -> false": "a mask of no type adds 0",
    "cuda/sm80/forward_choice.h: capability < kCapabilities ? "
    "forward_keys[capability].load(std::memory_order_relaxed) : 0 -> "
    "forward_keys[capability].load(std::memory_order_relaxed)":
        "no capability is so large; the test is for a driver that answers nonsense",
    "cuda/sm80/forward_choice.h: capability < kCapabilities -> capability <= kCapabilities":
        "no capability is so large; the test is for a driver that answers nonsense",
    "cuda/sm80/backward/launch.h: rows > keys -> rows >= keys": EQUAL,
    "cuda/sm80/backward/rows.h: tile - first_tile -> tile + first_tile": "modulo two it is the same",
    "cuda/sm80/backward/exact.h: few[half] && total <= kFewKeys -> total <= kFewKeys":
        "what is not a few any more is not counted, so that it stays more; rows that are not there are asked for nowhere",
    "cuda/sm80/backward/exact.h: higher(all.end, window[half].end) -> window[half].end":
        "no window of a later row ends before an earlier one's",
    "cuda/sm80/decode/decode.h: valid ? rows + (slot + r) * from.stride_row + c * Tile::kChunk : rows -> "
    "rows + (slot + r) * from.stride_row + c * Tile::kChunk": UNREAD,
    "cuda/sm80/decode/decode.h: valid ? row % group : 0 -> row % group": UNREAD,
    "cuda/sm80/decode/decode.h: valid ? row / group : 0 -> row / group": UNREAD,
    "cuda/sm80/decode/decode.h: valid ? source + c * Tile::kChunk : source -> source + c * Tile::kChunk": UNREAD,
    "cuda/sm80/decode/decode.h: valid ? c * Tile::kChunk : 0 -> c * Tile::kChunk": UNREAD,
    "cuda/sm80/decode/decode.h: valid ? at + r : 0 -> at + r": UNREAD,
    "cuda/sm80/decode/decode.h: higher(s.key_end - s.key_begin, 0) + kUnit - 1 -> "
    "higher(s.key_end - s.key_begin, 0) + kUnit + 1": BALANCE,
    "cuda/sm80/decode/decode.h: units + splits - 1 -> units + splits + 1": BALANCE,
    "cuda/sm80/decode/decode.h: s.key_end - s.key_begin -> s.key_end + s.key_begin": BALANCE,
    "cuda/sm80/decode/decode.h: higher(s.key_end - s.key_begin, 0) -> s.key_end - s.key_begin":
        "of a window that ends before it begins no split finds a key before the end",
    "cuda/sm80/decode/decode.h: lower(split * per_split, units) -> split * per_split":
        "a split that begins after the last key finds none",
    "cuda/sm80/decode/decode.h: lower((split + 1) * per_split, units) -> (split + 1) * per_split":
        "the last key is where it ends in any case",
    "cuda/sm80/decode/decode.h: row < rows -> row <= rows (2)": "a row that is not there is stored nowhere",
    "cuda/sm80/decode/decode.h: row < rows ? row / group + s.diagonal + 1 : 0 -> row / group + s.diagonal + 1":
        "a row that is not there is stored nowhere",
    "cuda/sm80/decode/decode.h: k >= s.key_begin && k < lower(end, end_key) -> k < lower(end, end_key)":
        "no split begins before the window does",
    "cuda/sm80/decode/decode.h: lower(end, end_key) -> end":
        "a split ends where a step of 16 keys does, or with the last key, which no row sees past",
    "cuda/sm80/decode/workspace.h: cudaGetDevice(&device) != cudaSuccess || "
    f"{FAILED} -> {FAILED}": BOTH,
    "cuda/sm80/decode/workspace.h: wanted > 1 && most > 1 -> most > 1": "one split is one split",
    "cuda/sm80/decode/workspace.h: wanted > 1 -> wanted >= 1": "one split is one split",
    "cuda/sm80/decode/workspace.h: most > 1 -> most >= 1": "one split is one split",
    "cuda/sm80/decode/workspace.h: wanted < most -> wanted <= most": EQUAL,
}
# fmt: on
