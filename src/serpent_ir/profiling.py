"""Counting a network by the paper's convention: 1 MAC = 2 FLOPs, and the norms count too."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

# Multiply-accumulates per element of a normalised map (fvcore's figure, with which the paper's tables were made).
LAYER_NORM_MACS = 5


@dataclass(frozen=True)
class Counts:
    """Raw counts of one forward pass. `macs` is the sum of the paper's tables; `flops` is twice that."""

    params: int
    macs: int
    flops: int


def count(model: nn.Module, height: int, width: int, *, batch: int = 1, channels: int = 3) -> Counts:
    """Parameters, multiply-accumulates and floating-point operations of one forward pass.

    Linear, convolution, matmul and the scan are counted by PyTorch's flop counter; LayerNorm adds 5 per element.
    Runs where the model's parameters are: on the meta device it costs no memory and no time.
    """

    def layer_norm_flops(x_shape, *args, out_shape=None, **kwargs) -> int:
        return 2 * LAYER_NORM_MACS * torch.Size(x_shape).numel()

    device = next(model.parameters()).device
    image = torch.empty(batch, channels, height, width, device=device)
    mapping = {torch.ops.aten.native_layer_norm: layer_norm_flops}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        model(image)
    flops = counter.get_total_flops()
    return Counts(sum(p.numel() for p in model.parameters()), flops // 2, flops)
