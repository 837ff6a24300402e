"""Gaussian blurs, with one standard deviation for all images or with one for each."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

BLUR_SIGMA = 3.0
"""Standard deviation of the blur in pixels. The paper gives none."""
BLUR_RADIUS = 30
"""Pixels on each side of the centre of the paper's 61x61 kernel."""
MILD_RADIUS = 12
"""The same for `blur_each`, which takes standard deviations up to a third of it. `photo`'s margin allows up to 16."""

# Columns per block of the banded matrix in `_blur_rows_by_blocks`. About the kernel's width, so that half of the
# multiplications are useful, and a good size for BLAS.
_BLOCK = 64


def gaussian_blur(x: Tensor) -> Tensor:
    """Blur (B, C, H, W), of any size from 1x1, with the normalised 61x61 Gaussian of standard deviation 3 px.

    The border is reflected about the centre of the edge pixel (numpy's "reflect"). Along a side under 31 px, where
    that is undefined, the edge pixel is repeated. Float32 and float64 are computed in their own precision, whether or
    not autocast is on.
    """
    with torch.autocast(x.device.type, enabled=False):
        blur_rows = _blur_rows_by_blocks if x.device.type == "cpu" else _blur_rows_by_convolution
        for _ in range(2):  # the kernel is separable: rows, then columns
            x = blur_rows(_pad_rows(x, BLUR_RADIUS)).transpose(-1, -2)
    return x.contiguous()


def blur_each(x: Tensor, sigma: Tensor, radius: int = MILD_RADIUS) -> Tensor:
    """Blur each image of (B, C, H, W) with its own Gaussian, sigma in pixels from 0 (unchanged) to a third of `radius`.

    sigma is (B,), or (B, C) for one per channel. The kernel is normalised and reaches `radius` pixels to each side.
    Borders are as in `gaussian_blur`.
    """
    batch, channels = x.shape[:2]
    if sigma.ndim == 1:
        sigma = sigma[:, None].expand(-1, channels)
    offsets = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    # A standard deviation of 0 would give 0 / 0 at the centre. From 1e-3 down every other tap is 0 anyway.
    kernel = torch.exp(-0.5 * (offsets / sigma.to(x.device, x.dtype).clamp(min=1e-3).reshape(-1, 1)) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True))[:, None, None]
    with torch.autocast(x.device.type, enabled=False):
        for _ in range(2):
            # Each channel of each image is a group: a depthwise convolution, which a GPU never computes in TF32.
            rows = _pad_rows(x, radius).flatten(0, 1)[None]
            x = F.conv2d(rows, kernel, groups=batch * channels)[0].unflatten(0, (batch, channels)).transpose(-1, -2)
    return x.contiguous()


def _pad_rows(x: Tensor, radius: int) -> Tensor:
    """Extend the rows of (B, C, H, W) by the blur's radius on both sides."""
    mode = "reflect" if x.shape[-1] > radius else "replicate"
    return F.pad(x, (radius, radius, 0, 0), mode=mode)


def _blur_rows_by_convolution(x: Tensor) -> Tensor:
    """(B, C, H, W + 60) -> (B, C, H, W) by a depthwise convolution. On a GPU that is torch's own kernel, never in TF32.

    With channels folded into the batch it would be an ordinary convolution, which cuDNN computes in TF32 by default.
    """
    channels = x.shape[1]
    kernel = _kernel(x.dtype, x.device).expand(channels, 1, 1, -1)
    return F.conv2d(x, kernel, groups=channels)


def _blur_rows_by_blocks(x: Tensor) -> Tensor:
    """(B, C, H, W + 60) -> (B, C, H, W) as products of blocks of each row with one banded matrix.

    On a CPU this is 3 to 15 times faster than a convolution of torch, most of all in float64.
    """
    width = x.shape[-1] - 2 * BLUR_RADIUS
    span = _BLOCK + 2 * BLUR_RADIUS
    blocks = F.pad(x, (0, -width % _BLOCK)).unfold(-1, span, _BLOCK)
    # One large product. In a batch of small ones threads wait at each, and rounding depends on where a row lies.
    product = blocks.reshape(-1, span) @ _band(x.dtype, x.device)
    return product.view(*blocks.shape[:-1], _BLOCK).flatten(-2)[..., :width]


@functools.cache
@torch.inference_mode(False)  # a cached inference tensor would break every later call that needs gradients
def _kernel(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The normalised 1-D Gaussian, (61,); computed in float64 on the CPU and rounded once."""
    offsets = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, dtype=torch.float64)
    weights = torch.exp(-0.5 * (offsets / BLUR_SIGMA) ** 2)
    return (weights / weights.sum()).to(device, dtype)


@functools.cache
@torch.inference_mode(False)
def _band(dtype: torch.dtype, device: torch.device) -> Tensor:
    """(block + 60, block): column j holds the kernel in rows j to j + 60."""
    band = torch.zeros(_BLOCK + 2 * BLUR_RADIUS, _BLOCK, dtype=dtype, device=device)
    for column in range(_BLOCK):
        band[column : column + 2 * BLUR_RADIUS + 1, column] = _kernel(dtype, device)
    return band
