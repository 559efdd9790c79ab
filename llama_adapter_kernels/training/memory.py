"""How much memory a training step takes, and how many tokens at a time therefore fit."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from llama_adapter_kernels.integrations.target import find_target, layers_of

# More tokens at a time keep a GPU busier up to about here; a CPU gains nothing beyond caches full of them.
MOST_TOKENS = {"cpu": 2048, "cuda": 8192}
_USED = 0.6  # of the free memory: what is computed meanwhile, and what allocators lose, is not counted below


def activation_bytes(config: Any, adapted_layers: int, itemsize: int, *, low: bool = False) -> int:
    """Bytes per token that the forward pass keeps for the backward pass, of a Llama-like model with frozen weights.

    A frozen linear layer needs nothing of its input. What stays of an adapted layer are, per token: the residual stream
    in float32 for each of two norms, query, key, value and output of the attention, and gate, its activation and up of
    the feed-forward layer. Layers below the lowest adapted one keep nothing.

    Args:
        itemsize: of the dtype that the model computes in, in bytes.
        low: activations are computed again: each layer keeps its input, and one layer at a time all of the above.
    """
    config = config.get_text_config()
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    attention = 2 * (heads + kv_heads) * head_dim
    layer = 2 * 4 * hidden + itemsize * (attention + 3 * config.intermediate_size)
    kept: int = layer + itemsize * hidden * adapted_layers if low else layer * adapted_layers
    return kept


def layers_with_gradients(network: Any) -> Sequence[nn.Module]:
    """The layers that keep activations: the lowest one with something to train, and those above it."""
    layers = layers_of(find_target(network))
    trained = (any(p.requires_grad for p in layer.parameters()) for layer in layers)
    lowest = next((number for number, found in enumerate(trained) if found), len(layers))
    return layers[lowest:]


def recompute(network: Any) -> None:
    """Activations are computed again in the backward pass: a layer that has gradients keeps its input alone.

    The layers below need no such thing: they keep nothing by themselves.
    """
    # transformers has renamed it.
    enable = getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    keep_words_frozen(network)
    kept = set(layers_with_gradients(network))
    for layer in layers_of(find_target(network)):
        if layer not in kept:
            layer.gradient_checkpointing = False


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that training takes on its device, by their purpose; `available` is what the device has for them."""

    weights: int
    activations: int
    logits: int
    trained: int
    available: int

    @property
    def total(self) -> int:
        return self.weights + self.activations + self.logits + self.trained


def estimate_memory(
    network: Any, adapted_layers: int, tokens: int, device: Any, *, low: bool = False
) -> MemoryEstimate:
    """What training takes with micro-batches of `tokens` tokens; the model may be on the device or still elsewhere."""
    from llama_adapter_kernels.training.loss import CHUNK_BYTES

    frozen = sum(p.nbytes for p in network.parameters() if not p.requires_grad)
    trained = sum(p.nbytes for p in network.parameters() if p.requires_grad)
    here = sum(p.nbytes for p in network.parameters() if p.device.type == device.type)
    chunk = CHUNK_BYTES["cpu" if device.type == "cpu" else "cuda"]
    per_token = activation_bytes(network.config, adapted_layers, _itemsize(network), low=low)
    return MemoryEstimate(
        weights=frozen,
        activations=per_token * tokens,
        logits=2 * chunk if _itemsize(network) < 4 else chunk,  # in float32 besides
        trained=4 * trained,  # with its gradient and AdamW's two moments
        available=_free(device) + here,
    )


def fitting_tokens(network: Any, adapted_layers: int, device: Any, *, low: bool = False) -> int:
    """Tokens of a micro-batch that the free memory of `device`, a torch.device, has room for; no more than are of use.

    On a GPU, room is left for the parameters that are still to be moved there.
    """
    coming = 0 if device.type == "cpu" else sum(p.nbytes for p in network.parameters() if p.device.type == "cpu")
    per_token = activation_bytes(network.config, adapted_layers, _itemsize(network), low=low)
    most = MOST_TOKENS["cpu" if device.type == "cpu" else "cuda"]
    return max(0, min(most, int(_USED * (_free(device) - coming)) // per_token))


def keep_words_frozen(network: Any) -> None:
    """Takes back that embedded words require gradients, which transformers sees to where activations are computed again.

    The checkpoints of old needed that. For an adapter it means that every layer below the lowest adapted one is computed
    three times instead of once.
    """
    if getattr(network, "_require_grads_hooks", None) or hasattr(network, "_require_grads_hook"):
        network.disable_input_require_grads()


def _free(device: Any) -> int:
    """Bytes that are free on a torch.device; of one that does not say, what the machine has."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil  # comes with accelerate

    return int(psutil.virtual_memory().available)


def _itemsize(network: Any) -> int:
    return next(int(p.dtype.itemsize) for p in network.parameters() if p.is_floating_point())
