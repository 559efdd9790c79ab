"""Reads the listing of a disassembled GPU kernel: which instructions are executed again and again."""

import re
from itertools import pairwise

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?(\S.*?);", re.MULTILINE)


def addresses(code: str, pattern: str) -> list[int]:
    """Addresses of the instructions that match."""
    return [int(m[1], 16) for m in _INSTRUCTION.finditer(code) if re.search(pattern, m[3])]


def in_loops(code: str) -> set[int]:
    """Addresses of all instructions inside of loops.

    Not every branch back is a loop: the compiler moves the waiting part of a barrier behind the end of the kernel, and
    branches back from there. A branch back closes a loop when its target dominates it (lies on every path to it).
    """
    instructions = [(int(m[1], 16), m[2], m[3]) for m in _INSTRUCTION.finditer(code)]
    branches = {address: int(target, 16) for address, _, text in instructions
                if (target := _branch_target(text)) is not None}  # fmt: skip
    leaders = {instructions[0][0], *branches.values()}
    leaders |= {after for (at, _, text), (after, _, _) in pairwise(instructions) if at in branches or "EXIT" in text}
    blocks: dict[int, list[int]] = {}
    successors: dict[int, set[int]] = {}
    block = instructions[0][0]
    for (address, predicate, text), (after, _, _) in pairwise([*instructions, (-1, None, "")]):
        if address in leaders:
            block = address
        blocks.setdefault(block, []).append(address)
        if address in branches:
            successors.setdefault(block, set()).add(branches[address])
        falls_through = predicate is not None or (address not in branches and "EXIT" not in text)
        if falls_through and after in leaders:
            successors.setdefault(block, set()).add(after)
    dominators = _dominators(blocks, successors)
    inside: set[int] = set()
    for source, targets in successors.items():
        for target in targets:
            if target in dominators[source]:
                inside |= {address for b in _loop_body(target, source, successors) for address in blocks[b]}
    return inside


def _branch_target(text: str) -> str | None:
    match = re.match(r"(?:BRA|CALL\.REL\.NOINC)\S*\s.*?(0x[0-9a-f]+)", text)  # the latter: out of a loop, for good
    return match[1] if match else None


def _predecessors(successors: dict[int, set[int]]) -> dict[int, set[int]]:
    found: dict[int, set[int]] = {}
    for source, targets in successors.items():
        for target in targets:
            found.setdefault(target, set()).add(source)
    return found


def _dominators(blocks: dict[int, list[int]], successors: dict[int, set[int]]) -> dict[int, set[int]]:
    """For each block those that lie on every path to it, itself included."""
    predecessors, entry = _predecessors(successors), min(blocks)
    dominators = {block: set(blocks) for block in blocks}
    dominators[entry] = {entry}
    changed = True
    while changed:
        changed = False
        for block in sorted(blocks):
            if block == entry or block not in predecessors:
                continue
            new = {block} | set.intersection(*(dominators[p] for p in predecessors[block]))
            if new != dominators[block]:
                dominators[block], changed = new, True
    return dominators


def _loop_body(head: int, tail: int, successors: dict[int, set[int]]) -> set[int]:
    """The blocks from which `tail` is reached without passing `head`, and both."""
    predecessors = _predecessors(successors)
    body, pending = {head, tail}, [tail]
    while pending:
        block = pending.pop()
        if block != head:
            new = predecessors.get(block, set()) - body
            body |= new
            pending.extend(new)
    return body
