"""What the processes of test_zero3.py do, and what one process without DeepSpeed does; see support/processes.py."""

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

import llama_adapter_kernels as lak
from tests.support.processes import Scenario
from tests.support.small_models import build

STEPS = 4


def batches() -> Tensor:
    """int64 [steps, 2, tokens]: a sequence for each of two processes."""
    return torch.randint(3, 96, (STEPS, 2, 17), generator=torch.Generator().manual_seed(2))


def adapted() -> tuple[nn.Module, lak.ZeroGateAdapter, torch.optim.Optimizer]:
    model = build().train()
    torch.manual_seed(1)
    adapter = lak.attach_adapter(model, lak.AdapterConfig(prefix_length=4, num_layers=2))
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.gate.fill_(0.7)
    return model, adapter, torch.optim.AdamW(adapter.parameters(), lr=1e-2, weight_decay=0.0)


def alone() -> tuple[list[float], dict[str, Tensor]]:
    """Losses of all steps, and the adapter after them."""
    model, adapter, optimizer = adapted()
    losses = []
    for tokens in batches():
        loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: parameter.detach() for name, parameter in adapter.named_parameters()}


def sharded(folder: Path) -> None:
    """The same with every parameter in pieces; notes losses and how much of the frozen model is here, saves the adapter."""
    import deepspeed

    # Messages in shared memory: DeepSpeed would compile that for a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    model, adapter, optimizer = adapted()
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    frozen: list[Any] = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    rank, losses = distributed.get_rank(), []
    for tokens in batches():
        loss = engine(tokens[rank, None], labels=tokens[rank, None], use_cache=False).loss
        engine.backward(loss)
        engine.step()
        mean = loss.detach() / distributed.get_world_size()
        distributed.all_reduce(mean)
        losses.append(mean.item())
    adapter.save_pretrained(folder / "adapter")
    if os.environ["RANK"] == "0":
        sizes = {"here": sum(one.ds_tensor.numel() for one in frozen), "whole": sum(one.ds_numel for one in frozen)}
        (folder / "found.json").write_text(json.dumps({"losses": losses, **sizes}))


def scenarios(folder: Path) -> list[Scenario]:
    return [(2, partial(sharded, folder))]
