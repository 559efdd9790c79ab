"""What the processes of test_distributed.py do; see support/processes.py."""

import json
import os
import shutil
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llama_adapter_kernels.integrations.gathering import gathered
from llama_adapter_kernels.models import load_model
from llama_adapter_kernels.training import loop
from llama_adapter_kernels.training.checkpoints import checkpoints, remove, step_of
from llama_adapter_kernels.training.settings import Execution, Settings
from tests.support.processes import Scenario
from tests.support.runs import QUIET, SHORT, run

EXECUTION = replace(QUIET, micro_batch_size=2, save_steps=2, keep_checkpoints=9)
HELD_OUT = replace(SHORT, eval_fraction=0.2)


def train(folder: Path, name: str, settings: Settings = SHORT, execution: Execution = EXECUTION, **more: Any) -> None:
    """A run of all processes into folder/name; what it gave goes to folder/name.json."""
    outcome = run(folder / "model", folder / "rows.json", folder / name, settings, execution=execution, **more)
    note(folder / f"{name}.json", asdict(outcome))


def note(path: Path, found: Any) -> None:
    if os.environ["RANK"] == "0":
        path.write_text(json.dumps(found))


def go_on(folder: Path, name: str, source: str, execution: Execution = EXECUTION) -> None:
    """As if the run `source` had been killed after its first checkpoint, and goes on with the processes there are now."""
    if os.environ["RANK"] == "0":
        copy_until(folder / source, folder / name, 2)
        (folder / f"{name}.ready").touch()
    while not (folder / f"{name}.ready").exists():  # there is no process group yet
        time.sleep(0.02)
    train(folder, name, execution=execution, resume=True)


def copy_until(source: Path, target: Path, step: int) -> None:
    """The folder of a finished run becomes that of one killed after `step`."""
    shutil.copytree(source, target)
    for checkpoint in checkpoints(target):
        if step_of(checkpoint) > step:
            remove(checkpoint)


def launched(folder: Path) -> None:
    """With the variables that `accelerate launch --use_fsdp` sets."""
    asked = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
             "FSDP_ACTIVATION_CHECKPOINTING": "true"}  # fmt: skip
    os.environ.update(asked)
    train(folder, "launched", HELD_OUT)
    for name in asked:
        os.environ.pop(name, None)


def pieces(folder: Path) -> None:
    """How much of the model each process has while it is sharded, and that the whole can be had again."""
    sizes: dict[str, int] = {}
    shard = loop.shard_frozen

    def shard_and_count(network: torch.nn.Module, device: torch.device) -> None:
        shard(network, device)
        frozen = [p for p in network.parameters() if not p.requires_grad]
        sizes["whole"] = sum(p.numel() for p in frozen)
        sizes["here"] = sum(p.to_local().numel() for p in frozen)
        weight = gathered(network.get_submodule("model.layers.1.mlp.up_proj"), "weight")
        expected = load_model(str(folder / "model"), torch.float32).get_parameter("model.layers.1.mlp.up_proj.weight")
        assert torch.equal(weight, expected)

    loop.shard_frozen = shard_and_count
    train(folder, "pieces", replace(SHORT, max_steps=1), replace(EXECUTION, shard=True))
    loop.shard_frozen = shard
    note(folder / "sizes.json", sizes)


def scenarios(folder: Path) -> list[Scenario]:
    sharded = replace(EXECUTION, shard=True)
    return [
        (4, partial(train, folder, "ddp-4")),
        (4, partial(train, folder, "fsdp-4", execution=sharded)),
        (4, partial(pieces, folder)),
        (2, partial(train, folder, "fsdp-2", execution=sharded)),
        (2, partial(go_on, folder, "fsdp-4-to-2", "fsdp-4", sharded)),
        (2, partial(go_on, folder, "fsdp-4-to-ddp-2", "fsdp-4")),
        (2, partial(launched, folder)),
    ]
