"""What does a model's attention module cost, projections included?"""

import pytest
from conftest import parameters


@pytest.mark.parametrize(("case", "dtype", "peer"), parameters("module", "forward"))
def bench_module(case: str, dtype: str, peer: str, time_it) -> None:
    time_it(case, "forward", dtype, peer)


@pytest.mark.parametrize(("case", "dtype", "peer"), parameters("module", "forward+backward"))
def bench_module_training(case: str, dtype: str, peer: str, time_it) -> None:
    time_it(case, "forward+backward", dtype, peer)
