"""Restormer (Zamir et al., arXiv 2111.09881), one of the paper's rivals: a U-Net with attention between channels.

Parameter names and shapes are those of the public release, so its state dicts load strictly. The function is the
release's too. Maps are (B, c, H, W), channels-last in memory.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from serpent_ir.errors import UsageError
from serpent_ir.models.four_levels import FourLevelNetwork, check_levels
from serpent_ir.models.layers import LayerNorm

FFN_EXPANSION = 2.66


@dataclass(frozen=True)
class RestormerConfig:
    dim: int = 48  # channels of the first level; each of the other three has twice as many as the one before
    blocks: tuple[int, ...] = (4, 6, 6, 8)  # blocks of each level; the decoder mirrors the encoder
    refinement: int = 4  # blocks at the end, at full size
    heads: tuple[int, ...] = (1, 2, 4, 8)
    norm_bias: bool = True  # False is the release's "BiasFree", which its denoisers have
    dual_pixel: bool = False  # the input is two views of one photo (6 channels), and nothing is added to the output
    in_channels: int = 3
    out_channels: int = 3
    task: str = ""  # the degradation that the weights undo; "" for none

    def __post_init__(self):
        object.__setattr__(self, "blocks", tuple(self.blocks))  # a configuration read from JSON has a list
        object.__setattr__(self, "heads", tuple(self.heads))
        if len(self.blocks) != 4 or len(self.heads) != 4:
            raise UsageError("restormer: blocks and heads are of four levels")
        check_levels("restormer", self.blocks, self.dim)
        for c, heads in zip((self.dim << i for i in range(4)), self.heads, strict=True):
            if heads < 1 or c % heads:
                raise UsageError(f"{c} channels cannot be shared out among {heads} heads")


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of (B, c, H, W)."""

    def __init__(self, c: int, *, bias: bool):
        super().__init__()
        self.body = LayerNorm(c) if bias else BiasFreeNorm(c)

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(self.body(rearrange(x, "b c h w -> b h w c")), "b h w c -> b c h w")


class BiasFreeNorm(nn.Module):
    """x / standard deviation over the last axis, times a weight. Unlike LayerNorm it does not subtract the mean."""

    def __init__(self, c: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(c))

    def forward(self, x: Tensor) -> Tensor:
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(exact.var(-1, correction=0, keepdim=True) + 1e-5)
        return (exact * scale * self.weight).to(x.dtype)


class TransposedAttention(nn.Module):
    """Attention between the channels of each head, over all positions (paper, section 3.1, "MDTA").

    It does not use scaled_dot_product_attention. Here channels are the sequence and the H W positions are the head's
    width, and no fused kernel takes a width of more than a few hundred. Without a fused kernel that function does less
    than this code: the logits are a small matrix, so the norms of q and k are divided out there, not in the maps.
    """

    def __init__(self, c: int, heads: int):
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = nn.Conv2d(c, 3 * c, 1, bias=False)
        self.qkv_dwconv = nn.Conv2d(3 * c, 3 * c, 3, padding=1, groups=3 * c, bias=False)
        self.project_out = nn.Conv2d(c, c, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        heads, height = len(self.temperature), x.shape[2]
        qkv = self.qkv_dwconv(self.qkv(x))
        q, k, v = rearrange(qkv, "b (t heads c) h w -> t b heads (h w) c", t=3, heads=heads)
        exact = torch.promote_types(x.dtype, torch.float32)
        lengths = [torch.linalg.vector_norm(t, dim=-2, dtype=exact).clamp_min(1e-12) for t in (q, k)]
        logits = q.transpose(-1, -2) @ k / (lengths[0][..., :, None] * lengths[1][..., None, :]) * self.temperature
        out = v @ logits.softmax(-1).to(v.dtype).transpose(-1, -2)
        return self.project_out(rearrange(out, "b heads (h w) c -> b h w (heads c)", h=height).permute(0, 3, 1, 2))


class GatedFeedForward(nn.Module):
    """Two halves of a widened, locally mixed map; the GELU of one gates the other (paper, section 3.2, "GDFN")."""

    def __init__(self, c: int):
        super().__init__()
        hidden = int(c * FFN_EXPANSION)
        self.project_in = nn.Conv2d(c, 2 * hidden, 1, bias=False)
        self.dwconv = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden, bias=False)
        self.project_out = nn.Conv2d(hidden, c, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, x = self.dwconv(self.project_in(x)).chunk(2, 1)
        return self.project_out(F.gelu(gate) * x)


class TransformerBlock(nn.Module):
    def __init__(self, c: int, heads: int, *, bias: bool):
        super().__init__()
        self.norm1 = ChannelNorm(c, bias=bias)
        self.attn = TransposedAttention(c, heads)
        self.norm2 = ChannelNorm(c, bias=bias)
        self.ffn = GatedFeedForward(c)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class Restormer(FourLevelNetwork, PyTorchModelHubMixin):
    """Takes images (B, in_channels, H, W) in [0, 1], of any size from 1x1 up. Returns (B, out_channels, H, W).

    Other sizes than multiples of `size_multiple` are reflect-padded on the right and bottom, and cropped afterwards.
    """

    layer_norm_macs = 0
    """The release writes LayerNorm out as single operations, so the counter of the paper's tables does not see it."""

    def __init__(self, config: RestormerConfig):
        def block(c: int, level: int) -> TransformerBlock:
            return TransformerBlock(c, config.heads[level], bias=config.norm_bias)

        super().__init__(config, block)
