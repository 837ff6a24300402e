"""Restormer's U-Net of four levels, which MambaIR's, VmambaIR's and EAMamba's releases kept, names included."""

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from serpent_ir.errors import UsageError
from serpent_ir.models.restormer import downsample, upsample


def check_levels(network: str, blocks: tuple[int, ...], dim: int) -> None:
    """Raise UsageError if a configuration is of no such U-Net."""
    if len(blocks) != 4:
        raise UsageError(f"{network}: blocks are of four levels")
    if dim % 2:
        raise UsageError(f"{network}: dim is {dim}; it must be even, for a half of it is unshuffled")


class FourLevels(nn.Module):
    """From an image (B, in_channels, H, W), sides multiples of 8, to features (B, 2 dim, H, W).

    Levels have dim, 2 dim, 4 dim and 8 dim channels; the decoder's last level and the refinement have 2 dim.

    Args:
        dim: channels of the first level.
        blocks: blocks of each level; the decoder mirrors the encoder.
        refinement: blocks at the end.
        block: a block of a width, from (B, c, H, W) to the same.
        in_channels: channels of the image.
    """

    size_multiple = 8

    def __init__(
        self,
        dim: int,
        blocks: tuple[int, ...],
        refinement: int,
        block: Callable[[int], nn.Module],
        in_channels: int,
    ):
        super().__init__()

        def level(c: int, count: int) -> nn.Sequential:
            return nn.Sequential(*(block(c) for _ in range(count)))

        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(in_channels, dim, 3, padding=1, bias=False)))
        self.encoder_level1 = level(dim, blocks[0])
        self.down1_2 = downsample(dim)
        self.encoder_level2 = level(2 * dim, blocks[1])
        self.down2_3 = downsample(2 * dim)
        self.encoder_level3 = level(4 * dim, blocks[2])
        self.down3_4 = downsample(4 * dim)
        self.latent = level(8 * dim, blocks[3])
        self.up4_3 = upsample(8 * dim)
        self.reduce_chan_level3 = nn.Conv2d(8 * dim, 4 * dim, 1, bias=False)
        self.decoder_level3 = level(4 * dim, blocks[2])
        self.up3_2 = upsample(4 * dim)
        self.reduce_chan_level2 = nn.Conv2d(4 * dim, 2 * dim, 1, bias=False)
        self.decoder_level2 = level(2 * dim, blocks[1])
        self.up2_1 = upsample(2 * dim)  # the last level keeps the channels of its skip
        self.decoder_level1 = level(2 * dim, blocks[0])
        self.refinement = level(2 * dim, refinement)

    def features(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The last features (B, 2 dim, H, W) of an image, and the first ones (B, dim, H, W)."""
        first = self.patch_embed(image.contiguous(memory_format=torch.channels_last))
        one = self.encoder_level1(first)
        two = self.encoder_level2(self.down1_2(one))
        three = self.encoder_level3(self.down2_3(two))
        x = self.up4_3(self.latent(self.down3_4(three)))
        x = self.decoder_level3(self.reduce_chan_level3(torch.cat([x, three], 1)))
        x = self.decoder_level2(self.reduce_chan_level2(torch.cat([self.up3_2(x), two], 1)))
        return self.refinement(self.decoder_level1(torch.cat([self.up2_1(x), one], 1))), first
