"""Copies of C++ sources with all their mutants in them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.mutants.schemata import Fault, Mutant, Site, schemata
from tests.support.emulator import ROOT, write_if_changed

NOTHING = "(void)0"
HEADER = """#pragma once
extern "C" {
extern __attribute__((visibility("default"))) int lak_active_mutant;
extern __attribute__((visibility("default"))) unsigned char lak_reached[];
}
inline bool lak_mutant(int number) {
  lak_reached[number] = 1;
  return lak_active_mutant == number;
}
"""
DEFINITIONS = """#include "lak_mutant.h"
extern "C" {{
int lak_active_mutant = -1;
unsigned char lak_reached[{count}] = {{}};
}}
"""


@dataclass(frozen=True)
class Added:
    """A fault that no rule of schemata.py makes: one expression, and what stands there instead."""

    file: str  # from csrc
    name: str
    old: str
    new: str
    where: str = ""  # a text with `old` in it that occurs once in the file, where `old` does not


def added_in(file: str, *faults: tuple[str, ...]) -> list[Added]:
    return [Added(file, *fault) for fault in faults]


def added_sites(file: str, text: str, added: Sequence[Added]) -> list[Site]:
    """Where they are to be found.

    Raises:
        ValueError: if the text of one does not occur in the file exactly once.
    """
    sites = []
    for fault in added:
        if fault.file != file:
            continue
        where = fault.where or fault.old
        if text.count(where) != 1 or where.count(fault.old) != 1:
            raise ValueError(f"{fault.name}: expected its text once in {file}, got {text.count(where)} times")
        begin = text.index(where) + where.index(fault.old)
        sites.append(Site(begin, begin + len(fault.old), (Fault("added", fault.new),)))
    return sites


def changed_sources(
    has_mutants: Callable[[Path], bool], added: Sequence[Added]
) -> tuple[dict[Path, str], list[Mutant]]:
    """The files of csrc, by their paths in it, and the mutants in them."""
    mutants: list[Mutant] = []
    texts: dict[Path, str] = {}
    for path in sorted((ROOT / "csrc").rglob("*")):
        if not path.is_file():
            continue
        relative = path.relative_to(ROOT / "csrc")
        text = path.read_text()
        if has_mutants(relative):
            text, found = schemata(text, str(relative), len(mutants), added_sites(str(relative), text, added))
            if found:
                text = with_header(text)
                mutants += found
        texts[relative] = text
    return texts, mutants


def with_header(text: str) -> str:
    """Includes it after `#pragma once`, or at the beginning; lines keep their numbers."""
    head, once, rest = text.partition("#pragma once\n")
    if not once:
        head, rest = "", text
    line = head.count("\n") + once.count("\n") + 1
    return f'{head}{once}#include "lak_mutant.h"\n#line {line}\n{rest}'


def write_sources(folder: Path, texts: dict[Path, str], mutants: Sequence[Mutant]) -> None:
    """And lak_mutant.cpp, which has to be compiled along. What did not change keeps its time, and is not compiled again."""
    added = {Path("lak_mutant.h"): HEADER, Path("lak_mutant.cpp"): DEFINITIONS.format(count=len(mutants))}
    for relative, text in (texts | added).items():
        write_if_changed(folder / relative, text)
    for path in folder.rglob("*"):
        if path.is_file() and path.relative_to(folder) not in texts | added:
            path.unlink()
