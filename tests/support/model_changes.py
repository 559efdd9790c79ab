"""Changes to a model and to its adapter after which no prefix computed before may be used."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import llama_adapter_kernels as lak
from tests.support.small_models import TOKENS


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def exchange(module: nn.Module, name: str) -> None:
    old = getattr(module, name)
    new = Doubled(old.in_features, old.out_features, bias=old.bias is not None)
    new.load_state_dict(old.state_dict())
    setattr(module, name, new)


class Halved(nn.Module):
    """A parametrization with a state of its own that is no tensor."""

    factor = 1.0

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.factor


def parametrized(model: nn.Module) -> None:
    parametrize.register_parametrization(first(model).v_proj, "weight", Halved())
    first(model).v_proj.parametrizations.weight[0].factor = 0.5


def flattened(model: nn.Module) -> None:
    """As FSDP1 does: parameters become views of one tensor, which is then written to."""
    layer = adapter_layer(model)
    flat = torch.cat([layer.prompt.data.flatten(), layer.gate.data])
    layer.prompt.data, layer.gate.data = flat[:-4].view(4, 48), flat[-4:]
    flat.mul_(-2)


def first(model: nn.Module) -> nn.Module:
    return model.model.layers[0].self_attn


def adapter_layer(model: nn.Module) -> nn.Module:
    return first(model).zero_gate.layer("default")


def ema_swap(model: nn.Module) -> None:
    for layer in lak.attached_adapters(model)["default"].layers.values():
        for parameter in layer.parameters():
            parameter.data.copy_(parameter * 0)


def step(model: nn.Module) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 0.1)
    with torch.enable_grad():
        model(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()


CHANGES = {
    "prompt in place": lambda m: adapter_layer(m).prompt.add_(1),
    "EMA swap through .data": ema_swap,
    "gate through .data": lambda m: setattr(adapter_layer(m).gate, "data", torch.full((4,), -2.0)),
    "new prompt": lambda m: setattr(adapter_layer(m), "prompt", nn.Parameter(torch.ones(4, 48))),
    "flattened": flattened,
    "k_proj weight": lambda m: first(m).k_proj.weight.mul_(2),
    "k_proj weight through .data": lambda m: first(m).k_proj.weight.data.mul_(2),
    "v_proj bias": lambda m: first(m).v_proj.bias.add_(1),
    "v_proj exchanged": lambda m: exchange(first(m), "v_proj"),
    "v_proj parametrized": parametrized,
    "v_proj hooked": lambda m: first(m).v_proj.register_forward_hook(lambda mod, args, out: out + 1),
    "forward exchanged": lambda m: setattr(first(m).v_proj, "forward", lambda x: x[..., :48] * 0.5),
    "state dict": lambda m: m.load_state_dict({n: t * 1.5 for n, t in m.state_dict().items()}),
    "optimizer": step,
}
