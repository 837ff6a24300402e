"""SS2D (Liu et al., "VMamba", arXiv 2401.10166, section 4.2): scans row by row, column by column, and backwards.

Parameter names are VMamba's, which MambaIR, PFVM and VM-UNet kept. The scan is `serpent_ir.ops.ss2d`, exactly: rows
k d to (k + 1) d of `A_logs` and `Ds` belong to direction k.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from serpent_ir.models.layers import LayerNorm
from serpent_ir.ops import selective_scan_fn, ss2d

K = 4


@torch.no_grad()
def draw_scan(dt_weight: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor) -> None:
    """Draw the parameters of scans as Mamba does: softplus(dt_bias) log-uniform in [1e-3, 1e-1], and A = -1..-N.

    The last axis of `dt_weight` is R, that of `A_log` is N.
    """
    if D.is_meta:  # there is nothing to fill, and PyTorch would import its compiler for it
        return
    dt_weight.uniform_(-1, 1).mul_(dt_weight.shape[-1] ** -0.5)
    dt = torch.empty_like(dt_bias).uniform_(math.log(1e-3), math.log(1e-1)).exp()
    dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
    A_log.copy_(torch.arange(1.0, A_log.shape[-1] + 1).log())
    D.fill_(1)


class SS2D(nn.Module):
    """The two-dimensional selective scan with its projections: (B, H, W, c) -> the same.

    Args:
        c: channels of the map, at least 1.
        d_state: N, states of each channel.
        expand: channels inside, as a multiple of c; VMamba's `ssm_ratio`.
        gate: whether a half of `in_proj`, after SiLU, multiplies the normed scans (`forward_type` "v0"; MambaIR);
            False is VMamba's "v05_noz".
        conv_bias: whether the depthwise convolution has a bias.
        channels_first: whether maps are (B, c, H, W), as in VMamba's released weights.
    """

    def __init__(
        self,
        c: int,
        d_state: int = 16,
        expand: float = 2.0,
        *,
        gate: bool = True,
        conv_bias: bool = True,
        channels_first: bool = False,
    ):
        super().__init__()
        d, rank = int(expand * c), math.ceil(c / 16)
        self.gate, self.channels_first = gate, channels_first
        self.in_proj = nn.Linear(c, 2 * d if gate else d, bias=False)
        self.conv2d = nn.Conv2d(d, d, 3, padding=1, groups=d, bias=conv_bias)
        self.x_proj_weight = nn.Parameter(torch.empty(K, rank + 2 * d_state, d))
        self.dt_projs_weight = nn.Parameter(torch.empty(K, d, rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(K, d))
        self.A_logs = nn.Parameter(torch.empty(K * d, d_state))
        self.Ds = nn.Parameter(torch.empty(K * d))
        self.out_norm = LayerNorm(d)
        self.out_proj = nn.Linear(d, c, bias=False)
        draw_uniform(self.x_proj_weight)
        draw_scan(self.dt_projs_weight, self.dt_projs_bias, self.A_logs, self.Ds)

    def forward(self, x: Tensor) -> Tensor:
        if self.channels_first:
            x = rearrange(x, "b c h w -> b h w c")
        u, *z = self.in_proj(x).chunk(2 if self.gate else 1, -1)
        u = F.silu(rearrange(self.conv2d(rearrange(u, "b h w d -> b d h w")), "b d h w -> b h w d"))
        y = self.out_norm(four_directions(self, u))
        y = self.out_proj(y * F.silu(z[0]) if z else y)
        return rearrange(y, "b h w c -> b c h w") if self.channels_first else y


def four_directions(module: nn.Module, u: Tensor) -> Tensor:
    """The scans of u (B, H, W, d) in four directions by a module's parameters (see `SS2D`), summed: (B, H, W, d)."""
    x_proj, dt_weight, dt_bias, A_logs, Ds = (  # `get_parameter` refuses those of torch.func.functional_call
        getattr(module, name) for name in ("x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds")
    )
    proj = rearrange(F.linear(u, x_proj.flatten(0, 1)), "b h w (k p) -> b h w k p", k=K)
    A_log = rearrange(A_logs, "(k d) n -> k d n", k=K)
    return ss2d(u, proj, dt_weight, dt_bias, A_log, rearrange(Ds, "(k d) -> k d", k=K))


def scan(
    u: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, z: Tensor | None = None
) -> Tensor:
    """`selective_scan_fn` as networks call it: A is -exp(A_log), and the step size is softplus(dt + dt_bias)."""
    out = selective_scan_fn(u, dt, -A_log.exp(), B, C, D, z, dt_bias, delta_softplus=True)
    assert isinstance(out, Tensor)
    return out


def draw_uniform(weight: Tensor, bound: float = 0) -> None:
    """Draw weights between -bound and bound, by default 1 / sqrt(n) for n inputs, the last axis."""
    if not weight.is_meta:  # see `draw_scan`
        bound = bound or weight.shape[-1] ** -0.5
        nn.init.uniform_(weight, -bound, bound)


def kept(orders: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """A function of sides and options, with the device last, that keeps its last results, since they are the same."""

    @functools.lru_cache(maxsize=16)
    def again(*key: Any) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(False):  # the next pass may be one of training
            return orders(*key)

    def of(*key: Any) -> tuple[Tensor, Tensor]:
        # What tracers, counters and CUDA graphs make is theirs.
        traced = torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None
        if traced or (key[-1].type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return orders(*key)
        return again(*key)

    return of


def along(x: Tensor, order: Tensor) -> Tensor:
    """Positions of x (B, K, c, L) in the order (K, L) of each direction."""
    return x.gather(-1, order[None, :, None].expand_as(x))
