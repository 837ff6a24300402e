"""EAMamba (Lin et al., arXiv 2506.22246): channels shared out among eight scans, four of them along diagonals.

Parameter names and shapes are those of the public releases, so their state dicts load strictly: the U-Net, and the
network for super-resolution. Maps are (B, c, H, W).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from serpent_ir.errors import UsageError
from serpent_ir.models.four_levels import FourLevelNetwork, check_levels
from serpent_ir.models.frame import pixel_shuffles, steps_of
from serpent_ir.models.layers import LayerNorm, channels_last
from serpent_ir.models.restormer import ChannelNorm
from serpent_ir.models.ss2d import along, draw_scan, draw_uniform, kept, scan

SCANS = 8
"""Scans of a map, each of an eighth of its channels."""


@dataclass(frozen=True)
class EAMambaConfig:
    dim: int = 64  # channels of the first level; each of the other three has twice as many as the one before
    blocks: tuple[int, ...] = (4, 6, 6, 7)  # blocks of each level; the decoder mirrors the encoder
    refinement: int = 2  # blocks at the end, at full size
    d_state: int = 16
    expand: float = 1.0  # channels inside a block, as a multiple of a level's
    ffn_expand: float = 2.0  # channels of the feed-forward before its gate, likewise
    dual_pixel: bool = False  # the input is two views of one photo (6 channels), and nothing is added to the output
    in_channels: int = 3
    out_channels: int = 3
    task: str = ""  # the degradation that the weights undo; "" for none

    def __post_init__(self):
        object.__setattr__(self, "blocks", tuple(self.blocks))  # a configuration read from JSON has a list
        check_levels("eamamba", self.blocks, self.dim)
        check_scans(self.dim, self.expand)


@dataclass(frozen=True)
class EAMambaSRConfig:
    dim: int = 64
    blocks: tuple[int, ...] = (4, 4, 4, 4)  # of each residual group
    d_state: int = 10
    expand: float = 1.0
    ffn_expand: float = 1.0
    scale: int = 1
    in_channels: int = 3
    out_channels: int = 3
    task: str = ""  # the degradation that the weights undo; "" for none

    def __post_init__(self):
        object.__setattr__(self, "blocks", tuple(self.blocks))  # a configuration read from JSON has a list
        check_scans(self.dim, self.expand)
        if self.scale not in (1, 2, 3, 4, 8):
            raise UsageError(f"eamamba_sr: scale is {self.scale}; valid: 1, 2, 3, 4, 8")


def check_scans(dim: int, expand: float) -> None:
    if int(expand * dim) % SCANS:
        raise UsageError(f"{int(expand * dim)} channels cannot be shared out among {SCANS} scans")


@kept
def eight_orders(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The pixel (flat index) that each scan visits at each step, and the step of each pixel: (8, H W) each.

    Scans 0 to 3 go along diagonals, from the right upper end of each to the left lower one: of the map, of the map
    turned by 180 degrees, mirrored left to right, and mirrored top to bottom. 4 goes row by row, 5 so backwards, 6
    column by column, 7 so backwards.
    """
    row = torch.arange(height, device=device)[:, None].expand(-1, width)
    column = torch.arange(width, device=device)[None].expand(height, -1)
    pixel = row * width + column
    diagonal = ((row + column) * height + row).flatten().argsort()
    views = pixel, pixel.flip(0, 1), pixel.flip(1), pixel.flip(0)
    straight = pixel.flatten(), pixel.T.flatten()
    walks = [view.flatten()[diagonal] for view in views]
    walks += [walk for path in straight for walk in (path, path.flip(0))]
    order = torch.stack(walks)
    return order, order.argsort(1)


class AllAroundScan(nn.Module):
    """Projection, convolution, eight scans of an eighth of the channels each, gate (paper, section 3.2, "MHSSM").

    Args:
        c: channels of the map.
        d_state: N, states of each channel.
        expand: channels inside, as a multiple of c.
    """

    def __init__(self, c: int, d_state: int, expand: float):
        super().__init__()
        d, self.rank, self.d_state = int(expand * c), math.ceil(c / 16), d_state
        each = d // SCANS
        self.in_proj = nn.Linear(c, 2 * d, bias=False)
        self.conv = nn.Conv2d(d, d, 3, padding=1, groups=d)
        self.x_proj_weight = nn.Parameter(torch.empty(SCANS, self.rank + 2 * d_state, each))
        self.dt_projs_weight = nn.Parameter(torch.empty(SCANS, each, self.rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(SCANS, each))
        self.A_logs = nn.Parameter(torch.empty(d, d_state))
        self.Ds = nn.Parameter(torch.empty(d))
        self.out_norm = LayerNorm(d)
        self.out_proj = nn.Linear(d, c, bias=False)
        draw_uniform(self.x_proj_weight)
        draw_scan(self.dt_projs_weight, self.dt_projs_bias, self.A_logs, self.Ds)

    def forward(self, x: Tensor) -> Tensor:
        height = x.shape[2]
        u, z = self.in_proj(rearrange(x, "b c h w -> b h w c")).chunk(2, -1)
        u = F.silu(self.conv(rearrange(u, "b h w d -> b d h w")))
        y = rearrange(self._scanned(u), "b k d (h w) -> b h w (k d)", h=height)
        return rearrange(self.out_proj(self.out_norm(y) * F.silu(z)), "b h w c -> b c h w")

    def _scanned(self, u: Tensor) -> Tensor:
        """The scans of u (B, d, H, W), put back to the pixels: (B, 8, d / 8, H W)."""
        pixel, step = eight_orders(*u.shape[2:], u.device)
        walks = along(rearrange(u, "b (k d) h w -> b k d (h w)", k=SCANS), pixel)
        proj = torch.einsum("bkdl,kpd->bkpl", walks, self.x_proj_weight.to(u.dtype))
        low, B, C = proj.split([self.rank, self.d_state, self.d_state], 2)
        dt = torch.einsum("bkrl,kdr->bkdl", low, self.dt_projs_weight.to(low.dtype)).flatten(1, 2)
        y = scan(walks.flatten(1, 2), dt, self.A_logs, B, C, self.Ds, self.dt_projs_bias.flatten())
        return along(y.unflatten(1, (SCANS, -1)), step)


class SimpleFeedForward(nn.Module):
    """A projection, one half times the other, a projection: (B, c, H, W) -> the same."""

    def __init__(self, c: int, expand: float):
        super().__init__()
        hidden = int(c * expand)
        self.project_in = nn.Conv2d(c, hidden, 1, bias=False)
        self.project_out = nn.Conv2d(hidden // 2, c, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.project_in(x).chunk(2, 1)
        return self.project_out(x * gate)


class Block(nn.Module):
    """x + scans(LayerNorm(x)), then x + feed-forward(LayerNorm(x)) (paper, section 3.1)."""

    def __init__(self, c: int, config: EAMambaConfig | EAMambaSRConfig):
        super().__init__()
        self.norm1 = ChannelNorm(c, bias=True)
        self.mamba = AllAroundScan(c, config.d_state, config.expand)
        self.norm2 = ChannelNorm(c, bias=True)
        self.ffn = SimpleFeedForward(c, config.ffn_expand)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mamba(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class EAMamba(FourLevelNetwork, PyTorchModelHubMixin):
    """Takes images (B, in_channels, H, W) in [0, 1], of any size from 1x1 up. Returns (B, out_channels, H, W).

    The release takes multiples of 8 only. Others are reflect-padded on the right and bottom, and cropped afterwards.
    """

    def __init__(self, config: EAMambaConfig):
        def block(c: int, level: int) -> Block:
            return Block(c, config)

        super().__init__(config, block)


class Group(nn.Module):
    """Blocks, a convolution and a skip."""

    def __init__(self, config: EAMambaSRConfig, count: int):
        super().__init__()
        self.blocks = nn.Sequential(*(Block(config.dim, config) for _ in range(count)))
        self.conv = nn.Conv2d(config.dim, config.dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(self.blocks(x))


class EAMambaSR(nn.Module, PyTorchModelHubMixin):
    """Takes images (B, in_channels, H, W) in [0, 1], of any size from 1x1 up, and makes them `scale` times larger.

    Unlike the networks of SwinIR's frame it subtracts no mean and normalises no features at the start.
    """

    size_multiple = 1

    def __init__(self, config: EAMambaSRConfig):
        super().__init__()
        self.config, self.scale, dim = config, config.scale, config.dim
        self.conv_first = nn.Conv2d(config.in_channels, dim, 3, padding=1, bias=False)
        self.layers = nn.Sequential(*(Group(config, count) for count in config.blocks))
        self.norm = ChannelNorm(dim, bias=True)
        self.conv_after_body = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.conv_before_upsample = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1), nn.LeakyReLU())
        self.upsample = pixel_shuffles(dim, steps_of(config.scale), dim)
        self.conv_last = nn.Conv2d(dim, config.out_channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        first = self.conv_first(channels_last(x))
        features = self.conv_after_body(self.norm(self.layers(first))) + first
        return self.conv_last(self.upsample(self.conv_before_upsample(features)))
