"""SwinIR's attention on CUDA: heads are padded with zeros to a number of channels that fused kernels with a bias take.

Otherwise PyTorch takes the plain way through attention, which writes out the logits of all windows.
"""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from serpent_ir.models.acceleration import as_built
from serpent_ir.models.acceleration.way import Way
from serpent_ir.models.swinir import WindowAttention

MULTIPLE = 8
"""The channels of a head become a multiple of this. The zeros change no result."""


def _missing(attention: WindowAttention, x: Tensor) -> int:
    return -(x.shape[-1] // attention.heads) % MULTIPLE


def _refuses(attention: WindowAttention, x: Tensor) -> str:
    return "" if _missing(attention, x) else f"its heads have a multiple of {MULTIPLE} channels"


def _run(attention: WindowAttention, x: Tensor) -> Tensor:
    heads_dim, more = x.shape[-1] // attention.heads, _missing(attention, x)
    layer = attention.qkv

    def qkv(x: Tensor) -> Tensor:
        if not as_built.is_plain_linear(layer):  # replaced, wrapped or hooked: call it, and pad its result
            return F.pad(layer(x).unflatten(-1, (-1, heads_dim)), (0, more)).flatten(-2)
        weight = F.pad(rearrange(layer.weight, "(heads d) c -> heads d c", d=heads_dim), (0, 0, 0, more))
        bias = F.pad(rearrange(layer.bias, "(heads d) -> heads d", d=heads_dim), (0, more))
        return F.linear(x, weight.flatten(0, 1), bias.flatten())

    return attention.attend(x, qkv)


padded = Way("heads.padded", "cuda", None, _refuses, _run, traced=True)
