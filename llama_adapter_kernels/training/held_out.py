"""The loss on examples that are not trained on: measured now and then, the best checkpoint kept, stopped in time."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from llama_adapter_kernels.training.loss import response_loss
from llama_adapter_kernels.training.packing import pack
from llama_adapter_kernels.training.tokens import Example


def split_off(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(what is trained on, what is held out), the latter a random `fraction`, at least one and never all."""
    count = min(len(examples) - 1, max(1, round(fraction * len(examples))))
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = set(order[:count])
    return [e for i, e in enumerate(examples) if i not in chosen], [examples[i] for i in sorted(chosen)]


def batches_of(examples: Sequence[Example], capacity: int, processes: int) -> list[list[Example]]:
    """The examples in batches of at most `capacity` tokens, or of one; as many for every process, some without labels."""
    batches: list[list[Example]] = [[]]
    for example in sorted(examples, key=len, reverse=True):
        if batches[-1] and sum(map(len, batches[-1])) + len(example) > capacity:
            batches.append([])
        batches[-1].append(example)
    idle = min(examples, key=len).without_labels()
    return batches + [[idle]] * (-len(batches) % processes)


class HeldOut:
    """Examples to measure the loss on, dealt out to the processes."""

    def __init__(
        self, examples: Sequence[Example], capacity: int, process: int, processes: int, longest: int | None = None
    ) -> None:
        self._batches, self._longest = batches_of(examples, capacity, processes)[process::processes], longest

    @torch.no_grad()
    def sums(self, model: Any, device: torch.device) -> torch.Tensor:
        """[sum of the losses in nats, response tokens] of this process, float64."""
        training = model.training
        model.eval()
        found = torch.zeros(2, dtype=torch.float64)
        for batch in self._batches:
            packed = pack(batch, self._longest)
            tensors = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in packed.items()}
            loss, tokens = response_loss(model, tensors)
            found += torch.tensor([loss.item(), tokens], dtype=torch.float64)
        model.train(training)
        return found


class Best(TrainerCallback, ExportableState):
    """Asks for the held-out loss every so many steps and at the end, and for a checkpoint whenever it is the best so far.

    Its state goes into every checkpoint: a resumed run remembers which one is the best.

    Args:
        patience: stop after so many measurements in a row without a new best; None: never.
    """

    def __init__(self, every: int, patience: int | None) -> None:
        self.every, self.patience = every, patience
        self.loss, self.step, self.worse = math.inf, 0, 0

    @property
    def out_of_patience(self) -> bool:
        return self.patience is not None and self.worse >= self.patience

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"loss": self.loss, "step": self.step, "worse": self.worse}}

    def restore(self, state: TrainerState) -> None:
        """Takes over what a checkpoint's state says."""
        saved = state.stateful_callbacks.get(type(self).__name__)
        if saved:
            self.loss, self.step, self.worse = (saved["attributes"][name] for name in ("loss", "step", "worse"))

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step > 0:
            self.restore(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step >= state.max_steps:
            control.should_evaluate = True

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **_: Any
    ) -> None:
        if metrics["eval_loss"] < self.loss:  # NaN never is
            self.loss, self.step, self.worse = metrics["eval_loss"], state.global_step, 0
            control.should_save = True
        else:
            self.worse += 1
            if self.out_of_patience:
                control.should_save = control.should_training_stop = True
