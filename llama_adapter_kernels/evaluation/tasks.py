"""The tasks by name."""

from llama_adapter_kernels.errors import UserError
from llama_adapter_kernels.evaluation.captions import Captions
from llama_adapter_kernels.evaluation.held_out import HeldOut
from llama_adapter_kernels.evaluation.music_qa import MusicQA
from llama_adapter_kernels.evaluation.scienceqa import ScienceQA
from llama_adapter_kernels.evaluation.task import Task
from llama_adapter_kernels.evaluation.vqa import VQA

TASKS: dict[str, Task] = {task.name: task for task in (ScienceQA(), Captions(), MusicQA(), VQA(), HeldOut())}


def task_named(name: str) -> Task:
    """The task called `name`.

    Raises:
        UserError: there is no such task.
    """
    if name not in TASKS:
        raise UserError(f"TASK: expected one of {', '.join(TASKS)}, got {name!r}")
    return TASKS[name]
