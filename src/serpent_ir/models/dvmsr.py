"""DVMSR (Lei et al., arXiv 2405.03008): Mamba along the rows of an image, for efficient super-resolution.

Parameter names and shapes are those of the public release (MIT), so its weights load strictly. Maps are channels-last,
(B, H, W, c). A block has no skip of its own. One is around each group.
"""

from dataclasses import dataclass

from einops import rearrange
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from serpent_ir.models.frame import Frame, FrameConfig, ResidualGroup
from serpent_ir.models.layers import LayerNorm
from serpent_ir.models.mamba import Mamba


@dataclass(frozen=True)
class DVMSRConfig(FrameConfig):
    blocks: tuple[int, ...] = (2, 2, 2, 2)


class Block(nn.Module):
    """Mamba(LayerNorm(x)) along the rows of (B, H, W, c), one after the other."""

    def __init__(self, c: int, d_state: int, expand: float):
        super().__init__()
        self.mixer = Mamba(c, d_state, expand=expand)
        self.norm = LayerNorm(c)

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.mixer(rearrange(self.norm(x), "b h w c -> b (h w) c"))
        return rearrange(pixels, "b (h w) c -> b h w c", h=x.shape[1])


def group(config: DVMSRConfig, number: int) -> ResidualGroup:
    """Blocks, a convolution and a skip (paper, section 3.2, "RSSB")."""
    size = config.dim, config.d_state, config.expand
    return ResidualGroup(config, nn.Sequential(*(Block(*size) for _ in range(config.blocks[number]))))


class DVMSR(Frame, PyTorchModelHubMixin):
    """Takes images (B, in_channels, H, W) in [0, 1], of any size from 1x1 up, and makes them `scale` times larger."""

    def __init__(self, config: DVMSRConfig):
        super().__init__(config, group, norm="norm_f")
