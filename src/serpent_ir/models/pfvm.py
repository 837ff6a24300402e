"""PFVM, the parameter-free vision Mamba of team 34 in NTIRE 2025's challenge on efficient super-resolution.

MambaIR's frame and scan, with an attention that has no parameters but those of one convolution. Parameter names and
shapes are those of the challenge's release (MIT), so its weights load strictly. Maps are channels-last, (B, H, W, c).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from serpent_ir.models.frame import Frame, FrameConfig, ResidualGroup, on_channels_last
from serpent_ir.models.layers import LayerNorm
from serpent_ir.models.ss2d import SS2D


@dataclass(frozen=True)
class PFVMConfig(FrameConfig):
    blocks: tuple[int, ...] = (4,)


class ParameterFreeAttention(nn.Module):
    """(o + x) (sigmoid(o) - 1/2), where o = SiLU(convolution of x): (B, c, H, W) -> the same."""

    def __init__(self, c: int):
        super().__init__()
        self.conv3x3 = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out = F.silu(self.conv3x3(x))
        return (out + x) * (torch.sigmoid(out) - 0.5)


class Block(nn.Module):
    """MambaIR's block with the attention above, and its input, scaled, at the end again."""

    def __init__(self, c: int, d_state: int, expand: float):
        super().__init__()
        self.skip_scale = nn.Parameter(torch.ones(c))
        self.skip_scale2 = nn.Parameter(torch.ones(c))
        self.skip_scale3 = nn.Parameter(torch.ones(c))
        self.ln_1 = LayerNorm(c)
        self.self_attention = SS2D(c, d_state, expand)
        self.conv_blk = ParameterFreeAttention(c)
        self.ln_2 = LayerNorm(c)

    def forward(self, x: Tensor) -> Tensor:
        out = x * self.skip_scale + self.self_attention(self.ln_1(x))
        out = out * self.skip_scale2 + on_channels_last(self.conv_blk, self.ln_2(out))
        return out + x * self.skip_scale3


def group(config: PFVMConfig, number: int) -> ResidualGroup:
    size = config.dim, config.d_state, config.expand
    return ResidualGroup(config, nn.Sequential(*(Block(*size) for _ in range(config.blocks[number]))))


class PFVM(Frame, PyTorchModelHubMixin):
    """Takes images (B, in_channels, H, W) in [0, 1], of any size from 1x1 up, and makes them `scale` times larger."""

    def __init__(self, config: PFVMConfig):
        super().__init__(config, group)
