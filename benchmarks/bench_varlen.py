"""What does it cost over sequences of different lengths, packed or padded?"""

import pytest
from conftest import parameters


@pytest.mark.parametrize(("case", "dtype", "peer"), parameters("varlen", "forward+backward"))
def bench_varlen(case: str, dtype: str, peer: str, time_it) -> None:
    time_it(case, "forward+backward", dtype, peer)


@pytest.mark.parametrize(("case", "dtype", "peer"), parameters("varlen", "forward"))
def bench_varlen_forward(case: str, dtype: str, peer: str, time_it) -> None:
    time_it(case, "forward", dtype, peer)
