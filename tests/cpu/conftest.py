"""Each test that asks for `isa` runs once with every instruction set of this CPU."""

from collections.abc import Iterator

import pytest

from tests.support.instruction_sets import USABLE, forced


@pytest.fixture(params=USABLE)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with forced(request.param):
        yield request.param
