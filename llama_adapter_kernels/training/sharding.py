"""A frozen base model in pieces, one for each process; the adapter stays whole in every one of them.

FSDP2 gathers a layer's weights when the layer runs and drops them afterwards. Frozen weights have no gradients and no
optimizer state, so that is all there is to it: the adapter's gradients are averaged by DDP as without sharding, checkpoints
are those of one process, and a run goes on with any number of them.
"""

import logging
import os
from collections.abc import Mapping, MutableMapping
from dataclasses import replace
from typing import Any

from torch import device as Device
from torch import nn

from llama_adapter_kernels.errors import UserError
from llama_adapter_kernels.integrations.target import find_target, layers_of
from llama_adapter_kernels.training.settings import Execution

log = logging.getLogger(__name__)

_SHARDED = "_zero_gate_sharded"  # on a model


def heed_launcher(execution: Execution, environment: MutableMapping[str, str] = os.environ) -> Execution:
    """What `accelerate launch` asks for by environment variables, as options of a run.

    Sharding is done here, so that transformers must not do it once more: the variables that ask for it are removed.

    Raises:
        UserError: it asks for an engine that is not supported.
    """
    for name, engine in (("DEEPSPEED", "DeepSpeed"), ("MEGATRON_LM", "Megatron-LM")):
        if _is_set(environment, f"ACCELERATE_USE_{name}"):
            raise UserError(
                f"accelerate launch: {engine} is not supported, since a frozen model has no gradients and no optimizer "
                "state to shard; expected DDP or, which shards its weights as ZeRO-3 does, FSDP (or torchrun and --shard)"
            )
    for kind in ("TP", "CP", "SP"):
        if int(environment.get(f"PARALLELISM_CONFIG_{kind}_SIZE", "1")) > 1:
            raise UserError(
                f"accelerate launch: expected no {kind} (tensor, context or sequence) parallelism, got some"
            )
    if not _is_set(environment, "ACCELERATE_USE_FSDP"):
        return execution
    if _is_set(environment, "FSDP_OFFLOAD_PARAMS"):
        raise UserError("accelerate launch: expected FSDP without offloading of parameters; more processes hold more")
    if environment.get("FSDP_VERSION", "1") != "2":
        log.info("accelerate launch asks for FSDP1: FSDP2 is used")
    for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        environment.pop(name, None)
    low = execution.gradient_checkpointing or _is_set(environment, "FSDP_ACTIVATION_CHECKPOINTING")
    return replace(execution, shard=True, gradient_checkpointing=low)


def shard_frozen(network: nn.Module, device: Device) -> None:
    """Splits every frozen parameter over the processes of the default group. All of them must call this.

    Args:
        device: where this process computes; its pieces go there, layer by layer.

    Raises:
        UserError: there are frozen parameters that cannot be split: quantised ones.
    """
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    trained = {parameter for parameter in network.parameters() if parameter.requires_grad}
    for name, parameter in network.named_parameters():
        if parameter not in trained and (type(parameter) is not nn.Parameter or not parameter.is_floating_point()):
            kind = type(parameter).__name__ if type(parameter) is not nn.Parameter else str(parameter.dtype)
            raise UserError(
                f"--shard: expected weights in floating point, {name} is quantised ({kind}): without --shard every "
                "process has a copy"
            )
    whole = [name for name, parameter in network.named_parameters() if parameter not in trained]
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for layer in layers_of(find_target(network)):
        fully_shard(layer, mesh=mesh, ignored_params=trained)
    fully_shard(network, mesh=mesh, ignored_params=trained)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(network, whole)
    setattr(network, _SHARDED, True)
    log.info("the frozen model is split over %d processes", distributed.get_world_size())


def is_sharded(network: nn.Module) -> bool:
    """Whether `shard_frozen` has split the model."""
    return getattr(network, _SHARDED, False)


def _is_set(environment: Mapping[str, Any], name: str) -> bool:
    return str(environment.get(name, "")).lower() in ("1", "true", "yes")
