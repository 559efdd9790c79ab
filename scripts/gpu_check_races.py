"""The races of a GPU check, for its record and its summary."""

import json
from pathlib import Path
from typing import Any

PEERS = ("ours-cuda", "ours-triton", "two-sdpa", "sdpa")


def races(folder: Path) -> list[dict[str, Any]]:
    """By race: milliseconds of the contestants that matter here, from bench.json; none where it is not there."""
    path = folder / "bench.json"
    if not path.exists():
        return []
    found: dict[str, dict[str, Any]] = {}
    for entry in json.loads(path.read_text())["measurements"]:
        if entry["peer"] in PEERS and entry["median"]:
            race = found.setdefault(f"{entry['case']} {entry['mode']} {entry['dtype']}", {})
            race[entry["peer"]] = round(entry["median"] * 1e3, 4)
    return [{"race": name, **times} for name, times in found.items()]


def table(found: list[dict[str, Any]]) -> list[str]:
    """The races as lines of Markdown; none without races."""
    if not found:
        return []
    lines = ["", "Milliseconds:", "", f"| race | {' | '.join(PEERS)} |", "|---|" + "---|" * len(PEERS)]
    return lines + [f"| {r['race']} | {' | '.join(str(r.get(peer, '-')) for peer in PEERS)} |" for r in found]
