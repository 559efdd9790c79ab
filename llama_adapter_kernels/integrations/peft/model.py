"""This package's adapter as a method of PEFT: what `peft.get_peft_model` puts around a model."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, ClassVar

from accelerate import init_empty_weights
from peft.tuners.tuners_utils import BaseTuner, delete_adapter
from peft.utils.other import AuxiliaryTrainingWrapper, set_additional_trainable_modules
from torch import Tensor, nn

from llama_adapter_kernels.integrations import attach
from llama_adapter_kernels.integrations.choosing import adapters_per_sequence, attachment_of
from llama_adapter_kernels.integrations.peft.layers import NO_MERGING, PeftLayer, PeftSlot, peft_layers
from llama_adapter_kernels.integrations.slot import SLOT
from llama_adapter_kernels.integrations.tuning import TUNING

MANAGER = "PEFT"
BASE = "__base__"  # PEFT's name for no adapter


class ZeroGateModel(BaseTuner):
    """Adapters of `attach_adapter` in a model whose books PEFT keeps."""

    prefix = SLOT  # transformers puts the adapter's name behind the part of a key that begins like this
    tuner_layer_cls = PeftLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Attaches the adapter that `self.peft_config[adapter_name]` describes. Its parameters are float32.

        Raises:
            ValueError: the model takes no adapter, the configuration does not fit it, or the name is taken or reserved. The
                model is as before.
        """
        config = self.peft_config[adapter_name]
        if hasattr(PeftSlot, adapter_name):
            raise ValueError(
                f"adapter_name: expected one that PEFT's layers do not use themselves, got {adapter_name!r}"
            )
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            attach.attach(model, config.adapter_config(), adapter_name, trainable=(), manager=MANAGER)
        attachment, stem = attachment_of(model)
        try:
            layers = list(peft_layers(model))
            if adapter_name in self.active_adapters:
                self.set_adapter(adapter_name, inference_mode=config.inference_mode)
            else:
                enabled = not any(layer.disable_adapters for layer in layers)
                for layer in layers:
                    layer.join(self.active_adapters, enabled)
            set_additional_trainable_modules(
                model=model, peft_config=config, model_config=self.get_model_config(self), adapter_name=adapter_name,
                activate_adapter=adapter_name in self.active_adapters,
            )  # fmt: skip
        except BaseException:
            attachment.remove(adapter_name)
            if not attachment.adapters:
                attach.remove(attachment, stem)
            raise
        slots = {name.rpartition(".")[0]: slot for name, slot in model.named_modules() if isinstance(slot, PeftSlot)}
        adapted = [name for name, slot in slots.items() if adapter_name in slot.adapters]
        self.targeted_module_names += [name for name in adapted if name not in self.targeted_module_names]

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("adapters are attached to a whole model by inject_adapter, not to its modules")

    def _check_merge_allowed(self) -> None:
        raise ValueError(NO_MERGING)

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter; where it was the active one, the first of the others becomes active.

        Raises:
            ValueError: there is no such adapter, or a forward pass with `adapter_names` uses it.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist")
        attachment_of(self.model)[0].remove(adapter_name)
        del self.peft_config[adapter_name]
        # What lies within our layers is skipped by its name.
        left = delete_adapter(self.model, adapter_name, prefix=f"{SLOT}.", layer_cls=PeftLayer)
        self.active_adapter = left or []

    def unload(self) -> nn.Module:
        """The base model without adapters. Where the active one has `modules_to_save` those stay, as with PEFT's methods."""
        attachment, stem = attachment_of(self.model)
        model: nn.Module = super().unload()
        attachment.active = None
        for name in attachment.adapters:
            attachment.remove(name)
        attach.remove(attachment, stem)
        return model

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Around every call of PEFT's model: `adapter_names` gives every sequence of the batch its adapter."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        if isinstance(names, str) or not isinstance(names, Sequence):
            raise ValueError(f"adapter_names: expected a list with one name per sequence, got {type(names).__name__}")
        attachment, _ = attachment_of(self.model)
        with (
            adapters_per_sequence(self.model, [None if name == BASE else name for name in names]),
            ExitStack() as hooks,
        ):
            override = attachment.current_override()
            assert override is not None

            def choose(module: Any, inputs: Any, more: dict[str, Any]) -> tuple[Any, Any]:
                own = [name if name in module._adapters else BASE for name in names]
                return inputs, more | {"adapter_names": [name for name in own for _ in range(override.repeats)]}

            for module in self.model.modules():
                if isinstance(module, AuxiliaryTrainingWrapper):
                    hooks.enter_context(_removing(module.register_forward_pre_hook(choose, with_kwargs=True)))
            yield

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Where PEFT loads an adapter.

        Raises:
            ValueError: tensors of the adapter are missing, or there are some that it has no place for.
        """
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        ours = (f".{SLOT}.", f".{TUNING}.")
        expected = {
            name for name, _ in model.named_parameters() if any(f"{part}{adapter_name}." in name for part in ours)
        }
        found = {name for name in remapped if any(part in name for part in ours)}
        for what, names in (("misses", expected - found), ("has no place for", found - expected)):
            if names:
                shown = ", ".join(sorted(names)[:3])
                raise ValueError(
                    f"adapter {adapter_name!r}: expected the tensors of its configuration, it {what} {shown}"
                )
        attachment_of(model)[0].frozen.forget(adapter_name)
        return remapped


@contextmanager
def _removing(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
