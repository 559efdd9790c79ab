"""The faults that `make mutants-cpu` and `make mutants-cuda` put into the kernels still find their place in the sources."""

from pathlib import Path

import pytest

from tests.mutants import cpu, cuda
from tests.mutants.driver import Mutant

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mutants", [cpu.MUTANTS, cuda.MUTANTS], ids=["cpu", "cuda"])
def test_each_text_occurs_once(mutants: list[Mutant]) -> None:
    assert [m.name for m in mutants if (ROOT / m.file).read_text().count(m.old) != 1] == []
    assert all(m.old != m.new for m in mutants)
    names = [m.name for m in mutants]
    assert len(names) == len(set(names))
