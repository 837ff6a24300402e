"""Serpent: a U-Net of visual state space blocks (Sepehri, Fabian, Soltanolkotabi, "Serpent", 2024).

Symbols, the paper's and Mamba's:
    B, H, W     batch, height and width of the map at hand; every map is channels-last, (B, H, W, channels)
    P           patch size, 4, 2, 1 for Serpent-B, -L, -H: the first map is (H/P, W/P)
    D = 32      embedding dimension (`dim`); also, per direction, the skip weight of the scan (as in Mamba)
    c           channels of a level: D, 2D, 4D, 8D
    d_inner     2c, channels inside a block
    N           ceil(c / 6), states of each channel (`d_state`)
    R           ceil(c / 16), rank of the projection that makes the step size (`dt_rank`)
    K = 4       directions of the scan
    dt, A, B, C step size, decay and the two input-dependent maps of the state space model (paper, Eq. 1)
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from einops.layers.torch import Rearrange
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from serpent_ir.models.layers import LayerNorm
from serpent_ir.models.padding import pad_to_multiple
from serpent_ir.ops import ss2d

K = 4


@dataclass(frozen=True)
class SerpentConfig:
    patch_size: int = 4
    dim: int = 32
    blocks: tuple[int, ...] = (2, 2, 3, 3)  # VSS blocks of each level; the last level is the bottleneck
    in_channels: int = 3  # the first three are the image; a task may add more (a mask)
    scale: int = 1  # how many times larger than the input the output is; the paper has 1 alone
    task: str = ""  # the degradation that the weights undo; "" for none

    def __post_init__(self):
        object.__setattr__(self, "blocks", tuple(self.blocks))  # a configuration read from JSON has a list


class SS2D(nn.Module):
    """The two-dimensional selective scan with its projections and gate (paper, section 2.3 and Figure 2)."""

    def __init__(self, c: int):
        super().__init__()
        d_inner, self.d_state, self.dt_rank = 2 * c, math.ceil(c / 6), math.ceil(c / 16)
        self.in_proj = nn.Linear(c, 2 * d_inner, bias=False)
        self.conv = nn.Conv2d(d_inner, d_inner, 3, padding=1, groups=d_inner)
        self.x_proj = nn.Linear(d_inner, K * (self.dt_rank + 2 * self.d_state), bias=False)
        self.dt_weight = nn.Parameter(torch.empty(K, d_inner, self.dt_rank))
        self.dt_bias = nn.Parameter(torch.empty(K, d_inner))
        self.A_log = nn.Parameter(torch.empty(K, d_inner, self.d_state))
        self.D = nn.Parameter(torch.empty(K, d_inner))
        self.reset_parameters()
        self.norm = LayerNorm(d_inner)
        self.out_proj = nn.Linear(d_inner, c, bias=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the scan's parameters as Mamba does: softplus(dt_bias) log-uniform in [1e-3, 1e-1], and A = -1..-N."""
        if self.D.is_meta:  # there is nothing to fill, and PyTorch would import its compiler for it
            return
        self.dt_weight.uniform_(-1, 1).mul_(self.dt_rank**-0.5)
        dt = torch.empty_like(self.dt_bias).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        self.A_log.copy_(torch.arange(1.0, self.d_state + 1).log())
        self.D.fill_(1)

    def forward(self, x: Tensor) -> Tensor:
        u, z = self.in_proj(x).chunk(2, dim=-1)  # (B, H, W, d_inner) each
        u = rearrange(self.conv(rearrange(u, "b h w d -> b d h w")), "b d h w -> b h w d")
        u = F.silu(u)
        proj = rearrange(self.x_proj(u), "b h w (k p) -> b h w k p", k=K)  # p = R + 2N: dt, B, C
        y = ss2d(u, proj, self.dt_weight, self.dt_bias, self.A_log, self.D)
        return self.out_proj(self.norm(y) * F.silu(z))


class VSSBlock(nn.Module):
    """x + SS2D(LayerNorm(x)) (paper, section 3.2 and Figure 2). There is no MLP branch."""

    def __init__(self, c: int):
        super().__init__()
        self.norm = LayerNorm(c)
        self.ss2d = SS2D(c)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ss2d(self.norm(x))


def s_block(c: int, count: int) -> nn.Sequential:
    """S-block B: a stack of VSS blocks (paper, section 3.2)."""
    return nn.Sequential(*(VSSBlock(c) for _ in range(count)))


def patch_merging(c: int) -> nn.Sequential:
    """(B, H, W, c) -> (B, H/2, W/2, 2c) (paper, section 3.3)."""
    return nn.Sequential(Rearrange("b (h p) (w q) c -> b h w (p q c)", p=2, q=2), nn.Linear(4 * c, 2 * c, bias=False))


def patch_expanding(c: int) -> nn.Sequential:
    """(B, H, W, 2c) -> (B, 2H, 2W, c) (paper, section 3.3)."""
    return nn.Sequential(nn.Linear(2 * c, 4 * c, bias=False), Rearrange("b h w (p q c) -> b (h p) (w q) c", p=2, q=2))


class Serpent(nn.Module, PyTorchModelHubMixin):
    """The network of section 3.1: takes and returns images (B, 3, H, W) in [0, 1], of any size from 1x1 up.

    If patches are small enough (not in Serpent-B), the image is added to the output, which the paper does not mention.
    With a `scale` the head makes patches so many times larger, and the image is enlarged by bicubic before it is added.
    Other sizes than multiples of `size_multiple` are reflect-padded on the right and bottom, and cropped afterwards.
    """

    def __init__(self, config: SerpentConfig):
        super().__init__()
        self.config = config
        P, dim, widths = config.patch_size, config.dim, [config.dim << i for i in range(len(config.blocks))]
        *levels, bottleneck = zip(widths, config.blocks, strict=True)
        self.size_multiple = P << len(levels)
        self.patch_embed = nn.Conv2d(config.in_channels, dim, kernel_size=P, stride=P)
        self.encoder = nn.ModuleList(s_block(*level) for level in levels)
        self.down = nn.ModuleList(patch_merging(c) for c, _ in levels)
        self.bottleneck = s_block(*bottleneck)
        self.up = nn.ModuleList(patch_expanding(c) for c, _ in levels)
        self.decoder = nn.ModuleList(s_block(*level) for level in levels)
        self.scale = config.scale
        self.head = nn.Linear(dim, 3 * (P * self.scale) ** 2)
        # If a patch has more numbers than the head's rank, the head could never undo what the added image brings: a
        # third of its noise would remain in Serpent-B (48 numbers, D = 32).
        self.residual = dim >= 3 * P * P or self.scale > 1

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        image = pad_to_multiple(x, self.size_multiple)
        x = rearrange(self.patch_embed(image), "b c h w -> b h w c").contiguous()
        skips = []
        for block, down in zip(self.encoder, self.down, strict=True):
            x = block(x)
            skips.append(x)
            x = down(x)
        x = self.bottleneck(x)
        for up, block in zip(reversed(self.up), reversed(self.decoder), strict=True):
            x = block(up(x) + skips.pop())
        P = self.config.patch_size * self.scale
        out = rearrange(self.head(x), "b h w (c p q) -> b c (h p) (w q)", p=P, q=P)
        out = self.enlarged(image[:, :3]) + out if self.residual else out.to(image.dtype)
        return out[..., : height * self.scale, : width * self.scale]

    def enlarged(self, image: Tensor) -> Tensor:
        if self.scale == 1:
            return image
        return F.interpolate(image, scale_factor=self.scale, mode="bicubic", align_corners=False)
