"""Layers that several networks share."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def channels_last(x: Tensor) -> Tensor:
    """A map (B, c, H, W) that lies in memory as (B, H, W, c), where convolutions are fastest."""
    # torch.func.vmap knows no such format.
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return x
    return x.contiguous(memory_format=torch.channels_last)


class LayerNorm(nn.LayerNorm):
    """LayerNorm that keeps the dtype of its input, with statistics in float32.

    Under autocast PyTorch's would make a float32 copy of the map and return a float32 map.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype == self.weight.dtype:
            return super().forward(input)
        with torch.autocast(input.device.type, enabled=False):
            weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
            return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)
