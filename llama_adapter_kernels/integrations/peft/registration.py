"""Makes this package's adapter one of PEFT's methods: ZERO_GATE."""

from typing import Any

METHOD = "zero_gate"


def register() -> None:
    """Registers the method with PEFT, once. Releases of PEFT that ask a method nothing about its files are left alone."""
    from peft import PeftType
    from peft.tuners.tuners_utils import BaseTuner
    from peft.utils import register_peft_method

    if METHOD.upper() in PeftType.__members__ or not hasattr(BaseTuner, "_remap_adapter_state_dict_for_load"):
        return
    _add_member(PeftType, METHOD.upper())

    from llama_adapter_kernels.integrations.peft.config import ZeroGateConfig
    from llama_adapter_kernels.integrations.peft.model import ZeroGateModel

    register_peft_method(name=METHOD, config_cls=ZeroGateConfig, model_cls=ZeroGateModel, prefix=ZeroGateModel.prefix)


def _add_member(kind: Any, name: str) -> None:
    """Adds a member to an enumeration of strings: PEFT takes methods of others, but its PeftType is closed."""
    member = str.__new__(kind, name)
    member._name_ = member._value_ = name
    member._sort_order_ = len(kind)
    member.__objclass__ = kind
    kind._member_map_[name] = member
    kind._member_names_.append(name)
    kind._value2member_map_[name] = member
    type.__setattr__(kind, name, member)
