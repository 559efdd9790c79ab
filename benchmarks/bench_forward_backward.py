"""What does it cost in training, output and all gradients?"""

import pytest
from conftest import parameters


@pytest.mark.parametrize(("case", "dtype", "peer"), parameters("attention", "forward+backward"))
def bench_forward_backward(case: str, dtype: str, peer: str, time_it) -> None:
    time_it(case, "forward+backward", dtype, peer)
