"""VmambaIR (Shi et al., arXiv 2403.11423): scans over the map and over its channels, in Restormer's levels.

Parameter names and shapes are those of the public release for real super-resolution, so its state dicts load strictly.
Maps are (B, c, H, W).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from serpent_ir.errors import UsageError
from serpent_ir.models.four_levels import FourLevels, check_levels
from serpent_ir.models.frame import pixel_shuffles, steps_of
from serpent_ir.models.padding import pad_to_multiple
from serpent_ir.models.restormer import ChannelNorm, GatedFeedForward
from serpent_ir.models.ss2d import K, draw_scan, draw_uniform, four_directions, scan

WAYS = 2
"""Directions of the scan over channels: forward and backward."""
EPS = 1e-5
"""LayerNorm's."""


@dataclass(frozen=True)
class VmambaIRConfig:
    dim: int = 48  # channels of the first level; each of the other three has twice as many as the one before
    blocks: tuple[int, ...] = (6, 2, 2, 1)  # blocks of each level; the decoder mirrors the encoder
    refinement: int = 6  # blocks at the end, at full size
    d_state: int = 16
    scale: int = 1
    in_channels: int = 3
    task: str = ""  # the degradation that the weights undo; "" for none

    def __post_init__(self):
        object.__setattr__(self, "blocks", tuple(self.blocks))  # a configuration read from JSON has a list
        check_levels("vmambair", self.blocks, self.dim)
        if self.scale not in (1, 2, 4, 8):
            raise UsageError(f"vmambair: scale is {self.scale}; valid: 1, 2, 4, 8")

    @property
    def out_channels(self) -> int:
        return min(self.in_channels, 3)


class OmniScan(nn.Module):
    """SS2D with a gate, and a factor for each channel from a scan over the channels' means (paper, section 3.3, "OSS").

    The sequence of that scan is the c means of a map; it has one channel and goes forward and backward.
    """

    def __init__(self, c: int, d_state: int = 16):
        super().__init__()
        self.rank, self.d_state = math.ceil(c / 16), d_state
        self.in_conv = nn.Conv2d(c, 2 * c, 1)
        self.conv2d = nn.Conv2d(c, c, 3, padding=1, groups=c)
        self.x_proj_weight = nn.Parameter(torch.empty(K, self.rank + 2 * d_state, c))
        self.dt_projs_weight = nn.Parameter(torch.empty(K, c, self.rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(K, c))
        self.A_logs = nn.Parameter(torch.empty(K * c, d_state))
        self.Ds = nn.Parameter(torch.empty(K * c))
        self.xc_proj_weight = nn.Parameter(torch.empty(WAYS, self.rank + 2 * d_state, 1))
        self.dtc_projs_weight = nn.Parameter(torch.empty(WAYS, 1, self.rank))
        self.dtc_projs_bias = nn.Parameter(torch.empty(WAYS, 1))
        self.Ac_logs = nn.Parameter(torch.empty(WAYS, d_state))
        self.Dsc = nn.Parameter(torch.empty(WAYS))
        self.out_norm = ChannelNorm(c, bias=True)
        self.channel_norm = ChannelNorm(c, bias=True)
        self.out_conv = nn.Conv2d(c, c, 1)
        for weight in (self.x_proj_weight, self.xc_proj_weight):
            draw_uniform(weight)
        draw_scan(self.dt_projs_weight, self.dt_projs_bias, self.A_logs, self.Ds)
        draw_scan(self.dtc_projs_weight, self.dtc_projs_bias, self.Ac_logs, self.Dsc)

    def forward(self, x: Tensor) -> Tensor:
        u, z = self.in_conv(x).chunk(2, 1)
        u = rearrange(F.silu(self.conv2d(u)), "b c h w -> b h w c")
        y = self.out_norm(rearrange(four_directions(self, u), "b h w c -> b c h w")) * F.silu(z)
        return self.out_conv(y + y * self._channels(y))

    def _channels(self, y: Tensor) -> Tensor:
        """A factor for each channel of a map (B, c, H, W): (B, c, 1, 1)."""
        means = y.mean((2, 3))
        ways = torch.stack([means, means.flip(1)], 1)  # (B, 2, c)
        proj = ways[:, :, None] * self.xc_proj_weight.to(ways.dtype)  # (B, 2, R + 2 N, c)
        low, B, C = proj.split([self.rank, self.d_state, self.d_state], 2)
        dt = torch.einsum("bkrl,kr->bkl", low, self.dtc_projs_weight[:, 0].to(low.dtype))
        out = scan(ways, dt, self.Ac_logs, B, C, self.Dsc, self.dtc_projs_bias.flatten())
        # Centred first. The values are alike, and in the gradients of `Dsc` what they share cancels.
        out = (out[:, 0] + out[:, 1].flip(1)).to(torch.promote_types(out.dtype, torch.float32))
        centred = out - out.mean(1, keepdim=True)
        scaled = centred * torch.rsqrt(centred.square().mean(1, keepdim=True) + EPS)
        weight, bias = (getattr(self.channel_norm.get_submodule("body"), name) for name in ("weight", "bias"))
        factors = scaled * weight + bias
        return factors.to(y.dtype)[..., None, None]


class Block(nn.Module):
    """x + OmniScan(LayerNorm(x)), then x + feed-forward(LayerNorm(x)) (paper, section 3.2)."""

    def __init__(self, c: int, d_state: int):
        super().__init__()
        self.norm1 = ChannelNorm(c, bias=True)
        self.attn = OmniScan(c, d_state)
        self.norm2 = ChannelNorm(c, bias=True)
        self.ffn = GatedFeedForward(c)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class VmambaIR(FourLevels, PyTorchModelHubMixin):
    """Takes images (B, in_channels, H, W) in [0, 1], of any size from 1x1 up, and makes them `scale` times larger.

    The release takes multiples of 8 only. Others are reflect-padded on the right and bottom, and cropped afterwards.
    The image, enlarged to nearest neighbours, is added to the output.
    """

    layer_norm_macs = 0
    """The release writes LayerNorm out as single operations, as Restormer does."""

    def __init__(self, config: VmambaIRConfig):
        def block(c: int, level: int) -> Block:
            return Block(c, config.d_state)

        super().__init__(config.dim, config.blocks, config.refinement, block, config.in_channels)
        self.config, self.scale = config, config.scale
        c = 2 * config.dim
        self.tail = nn.Sequential(
            pixel_shuffles(c, steps_of(config.scale), c), nn.Conv2d(c, config.out_channels, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        height, width = (side * self.scale for side in x.shape[-2:])
        image = pad_to_multiple(x, self.size_multiple)
        restored = self.tail(self.features(image)[0])
        shown = image[:, : self.config.out_channels]
        if self.scale != 1:
            shown = F.interpolate(shown, scale_factor=self.scale, mode="nearest")
        return (restored + shown)[..., :height, :width]
