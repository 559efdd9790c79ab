"""Results of `llama-adapter bench` that nobody measured."""

from llama_adapter_kernels.bench import results


def measurement(peer: str, milliseconds: float | None, case: str = "llama-7b", **more: object) -> results.Measurement:
    seconds = None if milliseconds is None else milliseconds / 1e3
    return results.Measurement(**({
        "case": case, "title": "LLaMA-7B, 512 tokens", "question": "attention", "mode": "forward", "dtype": "float32",
        "shape": {"batch": 1, "sequence": 512}, "sweep": "LLaMA-7B", "peer": peer, "label": peer,
        "ours": peer.startswith("ours"), "prefix_length": 0 if peer == "sdpa" else 10,
        "status": "unavailable" if seconds is None else "timed", "reason": "no" if seconds is None else None,
        "median": seconds, "quartiles": None if seconds is None else (seconds * 0.9, seconds * 1.1), "rounds": 9,
        "repeats": 1, "flop": 2e9, "bytes": 3e7, "peak_memory": 4 << 20, "worst_error": 0.5,
    } | more))  # fmt: skip


def example() -> results.Results:
    machine = {"device": "cpu", "cpu": "Some CPU", "threads": 2, "our_instruction_set": "avx512", "torch": "2.13.0",
               "commit": "abc", "gpu_clocks_mhz": None}  # fmt: skip
    rows = [measurement("sdpa", 8.0), measurement("two-sdpa", 10.0), measurement("eager", 40.0),
            measurement("ours-cpu", 4.0), measurement("ours-cuda", None)]  # fmt: skip
    sweep = [measurement(peer, time * length / 512, f"llama-7b-{length}", shape={"batch": 1, "sequence": length})
             for length in (128, 256, 1024) for peer, time in (("two-sdpa", 10.0), ("ours-cpu", 4.0))]  # fmt: skip
    ceilings = {"gemm_float32": 1e13, "copy": 1e10, "read": 2e10}
    return results.Results(machine, {"clock": "wall"}, ceilings, "2000-01-01 00:00 UTC", rows + sweep)
