"""Which parameters of a model require gradients: frozen when an adapter comes, given back when it goes."""

from torch import nn


def freeze(model: nn.Module) -> dict[str, bool]:
    """Freezes every parameter of `model`. Returns `requires_grad` by parameter name, for `restore`."""
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(False)
    return before


def restore(model: nn.Module, before: dict[str, bool]) -> None:
    """Gives every parameter the `requires_grad` it had at `freeze`; parameters that are new since then keep theirs."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(before.get(name, parameter.requires_grad))
