"""How much memory a training step takes, and how many tokens at a time therefore fit."""

from typing import Any

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


def fitting_tokens(network: Any, adapted_layers: int, device: Any, *, low: bool = False) -> int:
    """Tokens of a micro-batch that the free memory of `device`, a torch.device, has room for; no more than are of use.

    On a GPU, room is left for the parameters that are still to be moved there.
    """
    import torch

    parameters = list(network.parameters())
    if device.type == "cuda":
        coming = sum(parameter.nbytes for parameter in parameters if parameter.device.type != "cuda")
        free = torch.cuda.mem_get_info(device)[0] - coming
    else:
        import psutil  # comes with accelerate

        free = psutil.virtual_memory().available
    itemsize = next(parameter.dtype.itemsize for parameter in parameters if parameter.is_floating_point())
    per_token = activation_bytes(network.config, adapted_layers, itemsize, low=low)
    return max(0, min(MOST_TOKENS["cuda" if device.type == "cuda" else "cpu"], int(_USED * free) // per_token))
