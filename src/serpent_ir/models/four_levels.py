"""Restormer's U-Net of four levels, which MambaIR's, VmambaIR's and EAMamba's releases kept, names included.

Source: Zamir et al., arXiv 2111.09881, section 3. Maps are (B, c, H, W), channels-last in memory.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from einops.layers.torch import Rearrange
from torch import Tensor, nn

from serpent_ir.errors import UsageError
from serpent_ir.models.layers import channels_last
from serpent_ir.models.padding import pad_to_multiple


def check_levels(network: str, blocks: tuple[int, ...], dim: int) -> None:
    """Raise UsageError if a configuration is of no such U-Net."""
    if len(blocks) != 4:
        raise UsageError(f"{network}: blocks are of four levels")
    if dim % 2:
        raise UsageError(f"{network}: dim is {dim}; it must be even, for a half of it is unshuffled")


def resampled(c_in: int, c_out: int, shuffle: str) -> nn.Sequential:
    """A convolution, then the pixel (un)shuffle that `shuffle` describes. It leaves the map channels-last."""
    body = nn.Sequential(
        nn.Conv2d(c_in, c_out, 3, padding=1, bias=False),
        Rearrange(shuffle, p=2, q=2),
        Rearrange("b h w c -> b c h w"),
    )
    return nn.Sequential(OrderedDict(body=body))


def downsample(c: int) -> nn.Sequential:
    """(B, c, H, W) -> (B, 2c, H/2, W/2)."""
    return resampled(c, c // 2, "b c (h p) (w q) -> b h w (c p q)")


def upsample(c: int) -> nn.Sequential:
    """(B, c, H, W) -> (B, c/2, 2H, 2W)."""
    return resampled(c, 2 * c, "b (c p q) h w -> b (h p) (w q) c")


class FourLevels(nn.Module):
    """From an image (B, in_channels, H, W), sides multiples of 8, to features (B, 2 dim, H, W).

    Levels have dim, 2 dim, 4 dim and 8 dim channels; the decoder's last level and the refinement have 2 dim.

    Args:
        dim: channels of the first level.
        blocks: blocks of each level; the decoder mirrors the encoder.
        refinement: blocks at the end.
        block: a block from (B, c, H, W) to the same, by c and the number of the level, from 0 to 3.
        in_channels: channels of the image.
    """

    size_multiple = 8

    def __init__(
        self,
        dim: int,
        blocks: tuple[int, ...],
        refinement: int,
        block: Callable[[int, int], nn.Module],
        in_channels: int,
    ):
        super().__init__()

        def level(c: int, number: int, count: int | None = None) -> nn.Sequential:
            return nn.Sequential(*(block(c, number) for _ in range(blocks[number] if count is None else count)))

        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(in_channels, dim, 3, padding=1, bias=False)))
        self.encoder_level1 = level(dim, 0)
        self.down1_2 = downsample(dim)
        self.encoder_level2 = level(2 * dim, 1)
        self.down2_3 = downsample(2 * dim)
        self.encoder_level3 = level(4 * dim, 2)
        self.down3_4 = downsample(4 * dim)
        self.latent = level(8 * dim, 3)
        self.up4_3 = upsample(8 * dim)
        self.reduce_chan_level3 = nn.Conv2d(8 * dim, 4 * dim, 1, bias=False)
        self.decoder_level3 = level(4 * dim, 2)
        self.up3_2 = upsample(4 * dim)
        self.reduce_chan_level2 = nn.Conv2d(4 * dim, 2 * dim, 1, bias=False)
        self.decoder_level2 = level(2 * dim, 1)
        self.up2_1 = upsample(2 * dim)  # the last level keeps the channels of its skip
        self.decoder_level1 = level(2 * dim, 0)
        self.refinement = level(2 * dim, 0, refinement)

    def features(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The last features (B, 2 dim, H, W) of an image, and the first ones (B, dim, H, W)."""
        first = self.patch_embed(channels_last(image))
        one = self.encoder_level1(first)
        two = self.encoder_level2(self.down1_2(one))
        three = self.encoder_level3(self.down2_3(two))
        x = self.up4_3(self.latent(self.down3_4(three)))
        x = self.decoder_level3(self.reduce_chan_level3(torch.cat([x, three], 1)))
        x = self.decoder_level2(self.reduce_chan_level2(torch.cat([self.up3_2(x), two], 1)))
        return self.refinement(self.decoder_level1(torch.cat([self.up2_1(x), one], 1))), first


class FourLevelNetwork(FourLevels):
    """These levels between an image (B, in_channels, H, W) and the restored one (B, out_channels, H, W).

    Images of any size from 1x1 up are reflect-padded on the right and bottom, and cropped afterwards.

    Args:
        config: a configuration with `dim`, `blocks`, `refinement`, `dual_pixel`, `in_channels` and `out_channels`.
        block: as for `FourLevels`.
    """

    scale = 1

    def __init__(self, config: Any, block: Callable[[int, int], nn.Module]):
        super().__init__(config.dim, config.blocks, config.refinement, block, config.in_channels)
        self.config = config
        if config.dual_pixel:
            self.skip_conv = nn.Conv2d(config.dim, 2 * config.dim, 1, bias=False)
        self.output = nn.Conv2d(2 * config.dim, config.out_channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        image = pad_to_multiple(x, self.size_multiple)
        features, first = self.features(image)
        if self.config.dual_pixel:
            restored = self.output(features + self.skip_conv(first))
        else:
            restored = image[:, : self.config.out_channels] + self.output(features)
        return restored[..., :height, :width]
