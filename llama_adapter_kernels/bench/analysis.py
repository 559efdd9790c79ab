"""Figures that are made of measurements: baselines, ratios, rates and shares of the ceilings."""

from dataclasses import dataclass

from llama_adapter_kernels.bench.results import Measurement, Results

Race = dict[str, Measurement]
BEYOND = 1.1  # times a ceiling; where a contestant exceeds it by more, the ceiling was measured on a busy machine
PADDED_TO_512 = "two-sdpa-512"  # what the released training script does; never the best composition


def timed(race: Race) -> Race:
    return {name: entry for name, entry in race.items() if entry.median is not None}


def _fastest(entries: list[Measurement]) -> Measurement | None:
    return min(entries, key=lambda entry: entry.median or float("inf"), default=None)


def two_sdpa(race: Race) -> Measurement | None:
    """The fastest composition of two attention calls: the best that there is without this package."""
    return _fastest([e for n, e in timed(race).items() if n.startswith("two-") and n != PADDED_TO_512])


def plain_sdpa(race: Race) -> Measurement | None:
    """The fastest plain attention without a prefix: the lower bound."""
    return _fastest([e for n, e in timed(race).items() if n in ("sdpa", "sdpa-loop", "sdpa-rows")])


def fused(race: Race, packed: bool = False) -> Measurement | None:
    """The fastest of this package's backends. In model cases it is the attached adapter with the backend that it chooses."""
    attached = timed(race).get("ours-adapter-packed" if packed else "ours-adapter")
    if attached is not None:
        return attached
    return _fastest([e for n, e in timed(race).items() if is_fused(e) and n.endswith("-packed") == packed])


def is_fused(entry: Measurement) -> bool:
    """Whether a user gets this contestant: with the prefix, not the slow definition, not a tile that only races choose."""
    return entry.ours and bool(entry.prefix_length) and not ("reference" in entry.peer or entry.peer.endswith("-keys"))


def eager(race: Race) -> Measurement | None:
    """What the field ships: eager concatenated attention, PEFT's module in the model cases."""
    return _fastest([e for n, e in timed(race).items() if n in ("eager", "eager-512", "peft")])


def speedup(baseline: Measurement | None, entry: Measurement | None) -> float | None:
    """How many times faster `entry` is."""
    if baseline is None or entry is None or baseline.median is None or entry.median is None:
        return None
    return baseline.median / entry.median


@dataclass(frozen=True)
class Rates:
    """flops: FLOP/s of the work that the problem asks for; share_* of the ceilings measured in the same run."""

    flops: float
    bandwidth: float
    share_of_gemm: float | None
    share_of_memory: float | None


def rates(entry: Measurement, ceilings: dict[str, float]) -> Rates:
    assert entry.median is not None
    flops, bandwidth = entry.flop / entry.median, entry.bytes / entry.median
    gemm, memory = compute_ceiling(ceilings, entry.dtype), memory_ceiling(ceilings)
    return Rates(flops, bandwidth, flops / gemm if gemm else None, bandwidth / memory if memory else None)


def compute_ceiling(ceilings: dict[str, float], dtype: str) -> float | None:
    """The rate of a large matrix product, in float32 where a processor without bfloat16 units is faster in that."""
    return max((ceilings[name] for name in (f"gemm_{dtype}", "gemm_float32") if name in ceilings), default=None)


def trusted_ceilings(results: Results) -> dict[str, float]:
    """The ceilings, without those of matrix products where a contestant went far beyond: they say nothing then."""
    for entry in results.measurements:
        ceiling = compute_ceiling(results.ceilings, entry.dtype)
        if entry.median is not None and ceiling is not None and entry.flop / entry.median > BEYOND * ceiling:
            return {name: rate for name, rate in results.ceilings.items() if not name.startswith("gemm_")}
    return dict(results.ceilings)


def memory_ceiling(ceilings: dict[str, float]) -> float | None:
    return max((ceilings[name] for name in ("copy", "read") if name in ceilings), default=None)


def speedups(results: Results) -> dict[str, float]:
    """{"case mode dtype": fused over two SDPA calls} of every race that has both."""
    found = {}
    for race, entries in results.races().items():
        ratio = speedup(two_sdpa(entries), fused(entries))
        if ratio is not None:
            found[" ".join(race)] = ratio
    return found
