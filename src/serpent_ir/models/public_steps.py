"""What mamba-ssm and causal-conv1d have beside the scan: norms, and steps of one position for decoding.

`models/public_names.py` gives these their public names. All is plain PyTorch.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *_: Any,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Any:
    """The norm of x + `residual` over the last axis, by `weight` and `bias`; with `prenorm` that sum, too.

    Norms are float32 inside. The sum is float32 with `residual_in_fp32`, else it has the dtype of `residual`, or of x.
    """
    total = x.float() if residual is None else x.float() + residual.float()
    if is_rms_norm:
        normed = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps) * weight.float()
        normed = normed if bias is None else normed + bias.float()
    else:
        normed = F.layer_norm(total, x.shape[-1:], weight.float(), None if bias is None else bias.float(), eps)
    kept = torch.float32 if residual_in_fp32 else (x if residual is None else residual).dtype
    return (normed.to(x.dtype), total.to(kept)) if prenorm else normed.to(x.dtype)


def rms_norm_fn(x: Tensor, weight: Tensor, bias: Tensor | None = None, *more: Any, **named: Any) -> Any:
    """`layer_norm_fn` by the root of the mean square, without subtracting the mean."""
    return layer_norm_fn(x, weight, bias, *more, **named, is_rms_norm=True)


class RMSNorm(nn.Module):
    """`rms_norm_fn` with a weight."""

    def __init__(
        self, hidden_size: int, eps: float = 1e-5, device: Any = None, dtype: torch.dtype | None = None, **_: Any
    ):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> Any:
        named = {"prenorm": prenorm, "residual_in_fp32": residual_in_fp32}
        return rms_norm_fn(x, self.weight, None, residual, eps=self.eps, **named)


def causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """One position of `causal_conv1d_fn`: x (batch, d). `conv_state` (batch, d, width), the last inputs, moves on."""
    conv_state.copy_(torch.cat([conv_state[..., 1:], x[..., None].to(conv_state.dtype)], -1))
    out = (conv_state * weight).sum(-1).to(x.dtype)
    out = out if bias is None else out + bias.to(x.dtype)
    return out if activation is None else F.silu(out)


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """One position of `selective_scan_fn`: x, dt, z (batch, D); B, C (batch, N); `state` (batch, D, N) is moved on."""
    step = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    step = F.softplus(step) if dt_softplus else step
    h = torch.exp(step[..., None] * A.float()) * state.float() + (step * x.float())[..., None] * B.float()[:, None]
    state.copy_(h)
    out = (h * C.float()[:, None]).sum(-1)
    out = out if D is None else out + D.float() * x.float()
    return (out if z is None else out * F.silu(z.float())).to(x.dtype)
