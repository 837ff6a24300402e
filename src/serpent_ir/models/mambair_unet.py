"""MambaIR's U-Net for real denoising (Guo et al., arXiv 2402.15648, section 4.1): its blocks in Restormer's levels.

Parameter names and shapes are those of the public release, so its state dicts load strictly.
"""

from dataclasses import dataclass

from einops import rearrange
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor

from serpent_ir.models.four_levels import FourLevelNetwork, check_levels
from serpent_ir.models.mambair import ResidualStateSpaceBlock


@dataclass(frozen=True)
class MambaIRUNetConfig:
    dim: int = 48  # channels of the first level; each of the other three has twice as many as the one before
    blocks: tuple[int, ...] = (4, 6, 6, 8)  # blocks of each level; the decoder mirrors the encoder
    refinement: int = 4  # blocks at the end, at full size
    d_state: int = 16
    expand: float = 1.5
    dual_pixel: bool = False  # the input is two views of one photo (6 channels), and nothing is added to the output
    in_channels: int = 3
    out_channels: int = 3
    task: str = ""  # the degradation that the weights undo; "" for none

    def __post_init__(self):
        object.__setattr__(self, "blocks", tuple(self.blocks))  # a configuration read from JSON has a list
        check_levels("mambair_unet", self.blocks, self.dim)


class Block(ResidualStateSpaceBlock):
    """MambaIR's block for maps (B, c, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(super().forward(rearrange(x, "b c h w -> b h w c")), "b h w c -> b c h w")


class MambaIRUNet(FourLevelNetwork, PyTorchModelHubMixin):
    """Takes images (B, in_channels, H, W) in [0, 1], of any size from 1x1 up. Returns (B, out_channels, H, W).

    The release takes multiples of 8 only. Others are reflect-padded on the right and bottom, and cropped afterwards.
    """

    def __init__(self, config: MambaIRUNetConfig):
        def block(c: int, level: int) -> Block:
            return Block(c, config.d_state, config.expand)

        super().__init__(config, block)
