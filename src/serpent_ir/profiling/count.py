"""Multiply-accumulates and parameters of a network."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from serpent_ir.models.acceleration import off
from serpent_ir.models.wrappers import network_of, unwrapped

# Multiply-accumulates per element of a normalised map: the figures of fvcore, with which the paper's tables were made.
# Without a learned scale and shift it is one less.
LAYER_NORM_MACS = 5
INSTANCE_NORM_MACS = 4


@dataclass(frozen=True)
class Counts:
    """Raw counts of one forward pass. `macs` is the sum in the paper's tables; `flops` is twice that."""

    params: int
    macs: int
    flops: int


def count(model: nn.Module, height: int, width: int, *, batch: int = 1, channels: int = 3) -> Counts:
    """Parameters, multiply-accumulates and floating-point operations of one forward pass.

    PyTorch's flop counter counts linear layers, convolutions, matrix products (attention's two included) and the scan.
    LayerNorm adds 5 per element, or what the network says in `layer_norm_macs`; instance norm (without parameters) adds
    4. The definition (`serpent_ir.acceleration.off`) is run on the device of the model's parameters. On the meta device
    that costs neither memory nor time.
    """

    model = unwrapped(model, compiled=True)
    norm_each = getattr(network_of(model), "layer_norm_macs", LAYER_NORM_MACS)

    def layer_norm_flops(x_shape, *args, out_shape=None, **kwargs) -> int:
        return 2 * norm_each * torch.Size(x_shape).numel()

    def attention_flops(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
        return sdpa_flop_count(q_shape, k_shape, v_shape)

    norm_macs = 0

    def add_instance_norm(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal norm_macs
        norm_macs += INSTANCE_NORM_MACS * output.numel()

    device = next(model.parameters()).device
    image = torch.empty(batch, channels, height, width, device=device)
    mapping: dict[Any, Any] = {torch.ops.aten.native_layer_norm: layer_norm_flops}
    mapping[torch.ops.aten._scaled_dot_product_flash_attention_for_cpu] = attention_flops  # missing in PyTorch
    # A hook, because instance norm has no operator of its own: it runs as one of several kinds of batch norm.
    norms = [module for module in model.modules() if isinstance(module, nn.InstanceNorm2d)]
    hooks = [module.register_forward_hook(add_instance_norm) for module in norms]
    try:
        with torch.no_grad(), off(), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
    flops = counter.get_total_flops() + 2 * norm_macs
    return Counts(sum(p.numel() for p in model.parameters()), flops // 2, flops)
