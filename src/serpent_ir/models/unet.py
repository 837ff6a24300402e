"""U-Net of the fastMRI benchmark, the paper's convolutional baseline (section 4; Zbontar et al., arXiv 1811.08839).

Parameter names and shapes are those of the public release, so its state dicts load strictly. The function is the
release's too, together with its data transform: the network sees images of mean 0 and deviation 1, and mean and
deviation are put back in the output. Without that, a network that normalises every map has to guess how bright an image
is, and gives worse images than its input if they are larger than the crops that it was trained on. The input is not
added to the output.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from serpent_ir.models.padding import pad_to_multiple


@dataclass(frozen=True)
class UNetConfig:
    channels: int = 32  # channels of the first level; each pooling doubles them
    in_channels: int = 3
    out_channels: int = 3
    pools: int = 4
    task: str = ""  # the degradation that the weights undo; "" for none


def normalised(convolution: nn.Conv2d | nn.ConvTranspose2d) -> list[nn.Module]:
    """The convolution, instance norm without parameters, and leaky ReLU."""
    return [convolution, nn.InstanceNorm2d(convolution.out_channels), nn.LeakyReLU(0.2, inplace=True)]


class ConvBlock(nn.Module):
    """Two 3x3 convolutions: (B, c_in, H, W) -> (B, c_out, H, W)."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.layers = nn.Sequential(
            *normalised(nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)),
            nn.Identity(),  # the release has a dropout here, which is off; so the next convolution is `layers.4`
            *normalised(nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class UpBlock(nn.Module):
    """Transposed convolution: (B, c_in, H, W) -> (B, c_out, 2H, 2W)."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.layers = nn.Sequential(*normalised(nn.ConvTranspose2d(c_in, c_out, 2, stride=2, bias=False)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class UNet(nn.Module, PyTorchModelHubMixin):
    """Takes images (B, in_channels, H, W) in [0, 1], of any size from 1x1 up. Returns (B, out_channels, H, W).

    Other sizes than multiples of `size_multiple` are reflect-padded on the right and bottom, and cropped afterwards.
    """

    scale = 1

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.size_multiple = 1 << config.pools
        *levels, bottleneck = [config.channels << i for i in range(config.pools + 1)]
        self.down_sample_layers = nn.ModuleList(map(ConvBlock, [config.in_channels, *levels], levels))
        self.conv = ConvBlock(levels[-1], bottleneck)
        self.up_transpose_conv = nn.ModuleList(UpBlock(2 * c, c) for c in reversed(levels))
        self.up_conv = nn.ModuleList(ConvBlock(2 * c, c) for c in reversed(levels))
        # The release keeps the last convolution, 1x1, in a sequence with the last block.
        self.up_conv[-1] = nn.Sequential(self.up_conv[-1], nn.Conv2d(levels[0], config.out_channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        image, more = x.split([images := min(self.config.out_channels, x.shape[1]), x.shape[1] - images], dim=1)
        mean = image.mean((1, 2, 3), keepdim=True)
        deviation = image.std((1, 2, 3), correction=0, keepdim=True) + 1e-6  # it is 0 for a uniform image
        x = torch.cat([(image - mean) / deviation, more], dim=1)
        # Twice the multiple, because instance norm cannot work on a bottleneck of one pixel.
        x = pad_to_multiple(x, self.size_multiple, least=2 * self.size_multiple)
        skips = []
        for block in self.down_sample_layers:
            skips.append(block(x))
            x = F.avg_pool2d(skips[-1], 2)
        x = self.conv(x)
        for up, block in zip(self.up_transpose_conv, self.up_conv, strict=True):
            x = block(torch.cat([up(x), skips.pop()], dim=1))
        return x[..., :height, :width] * deviation + mean
