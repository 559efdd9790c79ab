"""Fine-tuning runs that end as if they had been killed."""

from typing import Any

from transformers import TrainerCallback


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


class KillAfter(TrainerCallback):
    """Ends the run where `step` steps are done."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise Killed
