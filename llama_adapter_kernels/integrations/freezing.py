"""Which parameters of a model require gradients: frozen when an adapter comes, given back when it goes."""

import warnings
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn


def freeze(model: nn.Module, keep: Sequence[str] | None, chosen: set[int]) -> dict[str, bool]:
    """Freezes the parameters of `model`.

    Args:
        keep: names of parameters or modules that stay as they are; `*` stands for anything. None: no one, with a warning
            where that undoes a choice.
        chosen: parameters (by id) that somebody seems to mean to train, such as those of a fresh head.

    Returns:
        `requires_grad` by parameter name as it was, for `restore`.

    Raises:
        ValueError: a name in `keep` is that of no parameter.
    """
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    if keep is not None and (
        isinstance(keep, str) or not isinstance(keep, Collection) or not all(isinstance(name, str) for name in keep)
    ):
        raise ValueError(f"trainable: expected a list of names, got {keep!r:.120}")
    for pattern in keep or ():
        if not any(_matches(name, pattern) for name in before):
            raise ValueError(f"trainable: expected names of the model's parameters or modules, got {pattern!r:.120}")
    # Where a part of the model is frozen already, what is not has been chosen to train (LoRA, bias tuning, ...). Quantised
    # weights, integers or tensors of their own kind, could not train.
    all_train = all(
        before[name]
        for name, parameter in model.named_parameters()
        if type(parameter) is nn.Parameter and parameter.is_floating_point()
    )
    lost = []
    for name, parameter in model.named_parameters():
        if any(_matches(name, pattern) for pattern in keep or ()):
            continue
        if before[name] and (not all_train or id(parameter) in chosen):
            lost.append(name)
        parameter.requires_grad_(False)
    if lost and keep is None:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        warnings.warn(
            f"attaching an adapter froze {', '.join(lost[:3])}{more}, which looked chosen for training; trainable=[...] "
            "with names (or parts of names and *) keeps them trainable, trainable=[] freezes them without this warning",
            stacklevel=5,
        )
    return before


def restore(model: nn.Module, before: dict[str, bool]) -> None:
    """Gives every parameter the `requires_grad` it had at `freeze`; parameters that are new since then keep theirs."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(before.get(name, parameter.requires_grad))


def heads(model: Any) -> set[int]:
    """The parameters (by id) on top of the base model, without those that predict tokens: usually fresh ones."""
    base = getattr(model, "base_model", model)
    if base is model:
        found = model.get_classifier() if hasattr(model, "get_classifier") else ()  # timm: one or, distilled, two
        classifiers = found if isinstance(found, tuple) else (found,)
        return {id(parameter) for classifier in classifiers for parameter in classifier.parameters()}
    inside = {id(parameter) for parameter in base.parameters()}
    words = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for child in model.children():
        if words is not None and any(module is words for module in child.modules()):
            inside |= {id(parameter) for parameter in child.parameters()}
    return {id(parameter) for parameter in model.parameters()} - inside


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or name.startswith(f"{pattern}.") or fnmatchcase(name, pattern)
