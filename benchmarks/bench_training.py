"""What does a training step of a small model cost?"""

import pytest
from conftest import parameters


@pytest.mark.parametrize(("case", "dtype", "peer"), parameters("training", "step"))
def bench_training(case: str, dtype: str, peer: str, time_it) -> None:
    time_it(case, "step", dtype, peer)
