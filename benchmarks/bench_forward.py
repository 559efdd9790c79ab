"""What does attention with an adapter cost in inference, over whole sequences?"""

import pytest
from conftest import parameters


@pytest.mark.parametrize(("case", "dtype", "peer"), parameters("attention", "forward"))
def bench_forward(case: str, dtype: str, peer: str, time_it) -> None:
    time_it(case, "forward", dtype, peer)
