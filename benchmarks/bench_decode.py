"""What does one new token cost against a cache of keys and values?"""

import pytest
from conftest import parameters


@pytest.mark.parametrize(("case", "dtype", "peer"), parameters("decode", "forward"))
def bench_decode(case: str, dtype: str, peer: str, time_it) -> None:
    time_it(case, "forward", dtype, peer)
