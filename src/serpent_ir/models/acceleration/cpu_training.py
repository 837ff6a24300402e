"""Training a VSS block on the CPU: one autograd function around the C library's kernels.

The numbers are those of `VSSBlock.forward`, up to rounding. Besides what autograd would keep, the scan's states before
each chunk are kept, which saves the backward pass a walk. Convolution and gate are computed again together with their
gradients.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from serpent_ir.models.acceleration import as_built
from serpent_ir.models.acceleration.products import product, product_backward, product_onto
from serpent_ir.models.acceleration.way import Way
from serpent_ir.ops import cpu
from serpent_ir.ops.dense import on_one_device

if TYPE_CHECKING:
    from serpent_ir.models.serpent import VSSBlock


def _refuses(block: "VSSBlock", x: Tensor) -> str:
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if x.dtype != torch.float32:
        return f"its input is {as_built.name_of(x.dtype)}"
    if reason := as_built.looked_on(x) or cpu.unavailable():
        return reason
    if x.shape[-1] % 8:
        return f"{x.shape[-1]} channels are no multiple of 8"
    if reason := as_built.difference(block, x):
        return reason
    return "" if as_built.dtypes(block) == {torch.float32} else as_built.products_of(block, x)


def _run(block: "VSSBlock", x: Tensor) -> Tensor:
    """block(x) for x (B, H, W, c); differentiable once."""
    s = block.ss2d
    on_one_device(x, *block.parameters())  # PyTorch's products do not check this
    return _Block.apply(
        x.contiguous(), block.norm.eps, s.norm.eps,
        block.norm.weight, block.norm.bias, s.in_proj.weight, s.conv.weight, s.conv.bias, s.x_proj.weight,
        s.dt_weight, s.dt_bias, s.A_log, s.D, s.norm.weight, s.norm.bias, s.out_proj.weight,
    )  # fmt: skip


block = Way("cpu_training.block", "cpu", True, _refuses, _run)


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, y_eps: float, *parameters: Tensor) -> Tensor:
        weight, bias, in_proj, conv, conv_bias, x_proj, *scan, y_weight, y_bias, out_proj = parameters
        normed, mean, scale = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
        # u and z are separate, since halves of one map would be copied wherever a contiguous one is needed.
        before_conv, z = (product(normed, half) for half in in_proj.chunk(2))
        u = cpu.conv_silu(before_conv, conv, conv_bias, padding=1)
        proj = product(u, x_proj).unflatten(-1, (4, -1))
        y, states = cpu.forward_keeping(u, proj, *scan)
        gated = cpu.gate(y, y_weight, y_bias, y_eps, z)
        out = torch.empty_like(x)
        product_onto(x, gated, out_proj, out)
        ctx.y_eps = y_eps
        ctx.save_for_backward(x, mean, scale, normed, before_conv, z, u, proj, y, states, *parameters)
        return out

    @staticmethod
    @as_built.once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, mean, scale, normed, before_conv, z, u, proj, y, states, *parameters = ctx.saved_tensors
        weight, bias, in_proj, conv, conv_bias, x_proj, *scan, y_weight, y_bias, out_proj = parameters
        grad = grad.contiguous()
        d_gated = product_backward(grad, out_proj)
        dy, dz, d_y_weight, d_y_bias, gated = cpu.gate_backward(d_gated, y, y_weight, y_bias, ctx.y_eps, z)
        d_out_proj = torch.mm(_rows(grad).t(), _rows(gated))
        du, d_proj, *d_scan = cpu.backward(dy, u, proj, *scan, states=states)
        d_proj = d_proj.flatten(0, 2).flatten(1)
        d_x_proj = torch.mm(d_proj.t(), _rows(u))
        du = _rows(du).addmm_(d_proj, x_proj).view_as(u)
        d_before, d_conv, d_conv_bias = cpu.conv_silu_backward(du, before_conv, conv, conv_bias)
        weight_u, weight_z = in_proj.chunk(2)
        d_normed = torch.mm(_rows(d_before), weight_u).addmm_(_rows(dz), weight_z).view_as(x)
        d_in_proj = torch.empty_like(in_proj)
        for half, to in zip((d_before, dz), d_in_proj.chunk(2), strict=True):
            torch.mm(_rows(half).t(), _rows(normed), out=to)
        dx, d_weight, d_bias = torch.ops.aten.native_layer_norm_backward(
            d_normed, x, weight.shape, mean, scale, weight, bias, [True, True, True]
        )
        return (
            dx.add_(grad), None, None, d_weight, d_bias, d_in_proj, d_conv, d_conv_bias, d_x_proj, *d_scan,
            d_y_weight, d_y_bias, d_out_proj,
        )  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    return x.flatten(0, -2)
