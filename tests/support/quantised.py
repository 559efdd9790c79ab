"""Linear layers with quantised weights, in the way of each library; for where bitsandbytes, torchao and hqq are."""

import copy
from collections.abc import Callable
from typing import Any

import bitsandbytes
import torch
import torchao.quantization as torchao
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from torch import Tensor, nn
from torchao.quantization.granularity import PerGroup

INT8 = torchao.Int8WeightOnlyConfig()
INT4 = torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))


def eight_bits(linear: nn.Linear) -> nn.Module:
    made = bitsandbytes.nn.Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False)
    made.weight = bitsandbytes.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    return made.to("cpu")


def four_bits(linear: nn.Linear) -> nn.Module:
    made = bitsandbytes.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32)
    made.weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
    return made.to("cpu")


def half_quadratic(linear: nn.Linear) -> nn.Module:
    config = BaseQuantizeConfig(nbits=4, group_size=32)
    return HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")


class Buffers(nn.Module):
    """Groups of a row as 4-bit numbers, a scale and a zero each, no parameter: what GPTQ and AWQ have, in plain PyTorch.

    In place of their libraries, which need a GPU or compile for minutes.
    """

    def __init__(self, linear: nn.Linear, group: int = 32) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        groups = linear.weight.detach().unflatten(1, (-1, group))
        low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
        scales = (high - low) / 15
        numbers = ((groups - low) / scales).round().to(torch.uint8)
        self.register_buffer("qweight", numbers[..., ::2] | numbers[..., 1::2] << 4)
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", low)

    def forward(self, hidden: Tensor) -> Tensor:
        numbers = torch.stack([self.qweight & 15, self.qweight >> 4], dim=-1).flatten(2)
        return nn.functional.linear(hidden, (numbers * self.scales + self.zeros).flatten(1))


def by_torchao(config: Any) -> Callable[[nn.Linear], nn.Module]:
    def quantised(linear: nn.Linear) -> nn.Module:
        holder = nn.Sequential(copy.deepcopy(linear))
        torchao.quantize_(holder, config)
        return holder[0]

    return quantised


# Weights alone are quantised: layers are linear maps, whose matrices tell what has to come out.
WEIGHTS_ONLY = {
    "bitsandbytes 4 bits": four_bits,
    "torchao int8": by_torchao(INT8),
    "torchao int4": by_torchao(INT4),
    "hqq 4 bits": half_quadratic,
    "buffers": Buffers,
}
# bitsandbytes' eight bits round activations as well.
KINDS = WEIGHTS_ONLY | {"bitsandbytes 8 bits": eight_bits}
