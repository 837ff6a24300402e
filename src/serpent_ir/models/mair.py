"""MaIR (Li et al., arXiv 2412.20066): scans in an S through stripes of the map, weighed by attention over directions.

Parameter names and shapes are those of the public release, so its state dicts load strictly. The orders are computed
here. Maps are channels-last, (B, H, W, c).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from serpent_ir.models.frame import Frame, FrameConfig, ResidualGroup, named
from serpent_ir.models.layers import LayerNorm
from serpent_ir.models.ss2d import K, along, draw_scan, draw_uniform, kept, scan


@dataclass(frozen=True)
class MaIRConfig(FrameConfig):
    mlp_ratio: float = 1.6
    stripe: int = 8  # width of the stripes in pixels, which no file of weights tells; the releases have 8 or 4


def s_order(height: int, width: int, stripe: int, shift: int, device: torch.device) -> Tensor:
    """When each pixel of a map (H, W) is visited, by its flat index, in one S after the other (paper, section 3.2).

    Stripes are `stripe` columns wide; the first is `shift` wide if that is not 0. The first goes down, the second up,
    and so on. In each, rows go right and left in turn.
    """
    row = torch.arange(height, device=device)[:, None]
    column = torch.arange(width, device=device)[None]
    lead = (stripe - shift) % stripe  # columns that the first stripe lacks
    number = (column + lead) // stripe
    first = (number * stripe - lead).clamp(min=0)
    wide = ((number + 1) * stripe - lead).clamp(max=width) - first
    row = torch.where(number % 2 == 0, row, height - 1 - row)
    column = torch.where(row % 2 == 0, column - first, wide - 1 - (column - first))
    return first * height + row * wide + column


@kept
def four_orders(height: int, width: int, stripe: int, shift: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The pixel (flat index) that each direction visits at each step, and the step of each pixel: (4, H W) each.

    Direction 0 goes through stripes of columns, 2 through stripes of rows. 1 and 3 are those of the map turned by 180
    degrees.
    """
    columns = s_order(height, width, stripe, shift, device)
    rows = s_order(width, height, stripe, shift, device).T
    steps = torch.stack([x.flatten() for x in (columns, columns.flip(0, 1), rows, rows.flip(0, 1))])
    return steps.argsort(1), steps


class LosslessScan(nn.Module):
    """SS2D in these orders. Each direction counts as much as `gating` says for a channel (paper, section 3.3, "SSA").

    Args:
        c: channels of the map.
        d_state: N, states of each channel.
        expand: channels inside, as a multiple of c.
        stripe: width of the stripes.
        shift: width of the first stripe if it differs, else 0.
    """

    def __init__(self, c: int, d_state: int, expand: float, stripe: int, shift: int):
        super().__init__()
        d, self.rank, self.d_state = int(expand * c), math.ceil(c / 16), d_state
        self.stripe, self.shift = stripe, shift
        self.in_proj = nn.Linear(c, 2 * d, bias=False)
        self.conv2d = nn.Conv2d(d, d, 3, padding=1, groups=d)
        self.x_proj_weight = nn.Parameter(torch.empty(K, self.rank + 2 * d_state, d))
        self.dt_projs_weight = nn.Parameter(torch.empty(K, d, self.rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(K, d))
        self.A_logs = nn.Parameter(torch.empty(K * d, d_state))
        self.Ds = nn.Parameter(torch.empty(K * d))
        self.gating = named(
            gating=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(K * d, K * d, 1, groups=d), nn.Sigmoid())
        )
        self.out_norm = LayerNorm(d)
        self.out_proj = nn.Linear(d, c, bias=False)
        draw_uniform(self.x_proj_weight)
        draw_scan(self.dt_projs_weight, self.dt_projs_bias, self.A_logs, self.Ds)

    def forward(self, x: Tensor) -> Tensor:
        height = x.shape[1]
        u, z = self.in_proj(x).chunk(2, -1)
        u = F.silu(self.conv2d(rearrange(u, "b h w d -> b d h w")))
        y = rearrange(self._scanned(u), "b k d (h w) -> b (d k) h w", h=height)
        y = rearrange(y * self.gating(y), "b (d k) h w -> b h w d k", k=K).sum(-1)
        return self.out_proj(self.out_norm(y) * F.silu(z))

    def _scanned(self, u: Tensor) -> Tensor:
        """The scans of u (B, d, H, W) in each direction, put back to the pixels: (B, 4, d, H W)."""
        pixel, step = four_orders(*u.shape[2:], self.stripe, self.shift, u.device)
        u = u.flatten(2)
        proj = torch.einsum("bdl,kpd->bkpl", u, self.x_proj_weight.to(u.dtype))
        low, B, C = (along(x, pixel) for x in proj.split([self.rank, self.d_state, self.d_state], 2))
        dt = torch.einsum("bkrl,kdr->bkdl", low, self.dt_projs_weight.to(low.dtype)).flatten(1, 2)
        walks = along(u[:, None].expand(-1, K, -1, -1), pixel).flatten(1, 2)
        y = scan(walks, dt, self.A_logs, B, C, self.Ds, self.dt_projs_bias.flatten())
        return along(y.unflatten(1, (K, -1)), step)


class Block(nn.Module):
    """skip_scale x + scan(LayerNorm(x)), then skip_scale2 x + MLP(LayerNorm(x))."""

    def __init__(self, config: MaIRConfig, shift: int):
        super().__init__()
        c, hidden = config.dim, int(config.dim * config.mlp_ratio)
        self.ln_1 = LayerNorm(c)
        self.self_attention = LosslessScan(c, config.d_state, config.expand, config.stripe, shift)
        self.skip_scale = nn.Parameter(torch.ones(c))
        self.conv_blk = named(fc1=nn.Linear(c, hidden), act=nn.GELU(), fc2=nn.Linear(hidden, c))
        self.ln_2 = LayerNorm(c)
        self.skip_scale2 = nn.Parameter(torch.ones(c))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.skip_scale + self.self_attention(self.ln_1(x))
        return x * self.skip_scale2 + self.conv_blk(self.ln_2(x))


def group(config: MaIRConfig, number: int) -> ResidualGroup:
    """Blocks, every second one with its stripes shifted by a half; a convolution; and a skip."""
    blocks = (Block(config, config.stripe // 2 if i % 2 else 0) for i in range(config.blocks[number]))
    return ResidualGroup(config, nn.Sequential(*blocks))


class MaIR(Frame, PyTorchModelHubMixin):
    """Takes images (B, in_channels, H, W) in [0, 1], of any size from 1x1 up, and makes them `scale` times larger."""

    def __init__(self, config: MaIRConfig):
        super().__init__(config, group)
