"""All architectures that take adapters: this package's and those that users register."""

from llama_adapter_kernels.integrations import timm
from llama_adapter_kernels.integrations.architectures import Architecture
from llama_adapter_kernels.integrations.transformers import architectures

_known: dict[str, Architecture] = {row.model_type: row for row in (*architectures.ROWS, *timm.ROWS)}


def register_architecture(architecture: Architecture, replace: bool = False) -> None:
    """Makes models of a new architecture take adapters.

        lak.register_architecture(lak.Architecture(
            model_type="my_decoder", attention="blocks.*.attn", project=lak.Fused("qkv"), causal=True))

    The attention modules must compute attention through transformers' attention interface (`ALL_ATTENTION_FUNCTIONS`),
    or `compute` gives a subclass that does.

    Args:
        replace: an architecture of that model_type may exist already.

    Raises:
        ValueError: it exists.
    """
    if architecture.model_type in _known and not replace:
        raise ValueError(f"model_type {architecture.model_type!r}: known already; replace=True replaces it")
    _known[architecture.model_type] = architecture


def known_architectures() -> tuple[Architecture, ...]:
    """All architectures that take adapters, this package's first."""
    return tuple(_known.values())


def find_architecture(model_type: str) -> Architecture | None:
    """The architecture of that model type, or None."""
    return _known.get(model_type)
