"""What JPEG does to pixels, batched on any device: baseline, 4:2:0, the tables of the standard's Annex K.

The steps are libjpeg's (colour conversion, halved chroma, 8x8 DCT, quantisation, and back with its smooth upsampling),
without its entropy coding, which loses nothing.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

# fmt: off
_LUMA = [
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51,
    87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92, 49, 64, 78, 87, 103, 121, 120, 101,
    72, 92, 95, 98, 112, 100, 103, 99,
]
_CHROMA = [
    17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99, 24, 26, 56, 99, 99, 99, 99, 99, 47, 66, 99, 99, 99,
    99, 99, 99, *[99] * 32,
]
# fmt: on
# ITU-R BT.601, full range: rows Y, Cb, Cr.
_TO_YCBCR = [[0.299, 0.587, 0.114], [-0.168735892, -0.331264108, 0.5], [0.5, -0.418687589, -0.081312411]]
_TO_RGB = [[1.0, 0.0, 1.402], [1.0, -0.344136286, -0.714136286], [1.0, 1.772, 0.0]]


def through_jpeg(x: Tensor, quality: Tensor) -> Tensor:
    """Images as they come back from a JPEG file.

    Args:
        x: (B, 3, H, W) RGB in [0, 1], of any size from 1x1; clamped and rounded to 8 bits first, as a file holds them.
        quality: (B,) integers from 1 to 100, on libjpeg's scale.

    Returns:
        The decoded images in x's dtype and on its device: multiples of 1/255 in [0, 1]. Not differentiable. Computed in
        float64 where the device has it, so that a level never depends on the order of a sum.
    """
    height, width = x.shape[-2:]
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    levels = x.detach().to(wide).clamp(0, 1).mul(255).round()
    luma, chroma = _tables(quality.to(x.device), wide)
    with torch.autocast(x.device.type, enabled=False):
        planes = _mix(levels, _TO_YCBCR)
        planes[:, 1:] += 128
        planes = _round(planes).clamp(0, 255)
        planes = _extended(planes, 16)  # whole blocks of halved chroma
        y = _through_blocks(planes[:, :1], luma)[..., :height, :width]
        halved = _through_blocks(_halved(planes[:, 1:]), chroma)
        halved = halved[..., : -(-height // 2), : -(-width // 2)]
        planes = torch.cat([y, _doubled(halved)[..., :height, :width] - 128], 1)
        return _round(_mix(planes, _TO_RGB)).clamp(0, 255).div(255).to(x.dtype)


def _tables(quality: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Quantisation steps (B, 1, 1, 1, 8, 8) of luma and chroma at each quality, in libjpeg's integer arithmetic."""
    quality = quality.long()
    percent = torch.where(quality < 50, 5000 // quality, 200 - 2 * quality)[:, None]
    steps = [((base * percent + 50) // 100).clamp(1, 255) for base in _annex_k(quality.device)]
    return steps[0].to(dtype).view(-1, 1, 1, 1, 8, 8), steps[1].to(dtype).view(-1, 1, 1, 1, 8, 8)


def _through_blocks(planes: Tensor, steps: Tensor) -> Tensor:
    """Quantise the DCT of each 8x8 block of (B, C, H, W), sides multiples of 8; levels in, rounded levels out."""
    dct = _dct(planes.dtype, planes.device)
    blocks = (planes - 128).unflatten(-1, (-1, 8)).unflatten(-3, (-1, 8)).transpose(-2, -3)  # (B, C, h, w, 8, 8)
    coefficients = _round(dct @ blocks @ dct.T / steps) * steps
    decoded = _round(dct.T @ coefficients @ dct + 128).clamp(0, 255)
    return decoded.transpose(-2, -3).flatten(-2).flatten(-3, -2)


def _halved(planes: Tensor) -> Tensor:
    """Means of 2x2 pixels; ties go down and up by turns along a row, as in libjpeg."""
    bias = 0.25 + 0.25 * (torch.arange(planes.shape[-1] // 2, device=planes.device) % 2)
    return (F.avg_pool2d(planes, 2) + bias).floor()


def _doubled(planes: Tensor) -> Tensor:
    """Twice the size by a triangle filter, as libjpeg's default: 3/4 of the nearer pixel and 1/4 of the next."""
    for dim in (-2, -1):
        side = planes.shape[dim]
        here = torch.arange(2 * side, device=planes.device)
        near = planes.index_select(dim, here // 2)
        beside = planes.index_select(dim, ((here // 2) + (here % 2) * 2 - 1).clamp(0, side - 1))
        planes = 0.75 * near + 0.25 * beside
    # Sixteenths, rounded half up in even columns and half down in odd ones.
    bias = 8 / 16 - 1 / 16 * (torch.arange(planes.shape[-1], device=planes.device) % 2)
    return (planes + bias).floor()


def _extended(planes: Tensor, multiple: int) -> Tensor:
    """Repeat the edge on the right and bottom up to multiples."""
    height, width = planes.shape[-2:]
    return F.pad(planes, (0, -width % multiple, 0, -height % multiple), mode="replicate")


def _mix(planes: Tensor, matrix: list[list[float]]) -> Tensor:
    """(B, 3, H, W) times a 3x3 matrix, in one order of sums on every device."""
    red, green, blue = planes.unbind(1)
    return torch.stack([a * red + b * green + c * blue for a, b, c in matrix], 1)


def _round(x: Tensor) -> Tensor:
    """To the nearest integer, halves away from zero, blind to the last bits that devices differ in."""
    grid = 2.0**24 if x.dtype == torch.float64 else 2.0**10
    x = (x * grid).round() / grid
    return torch.where(x < 0, (x - 0.5).ceil(), (x + 0.5).floor())


# Cached on the device: a copy to a GPU would wait for what it has queued.
@functools.cache
@torch.inference_mode(False)
def _annex_k(device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.tensor(_LUMA, device=device), torch.tensor(_CHROMA, device=device)


@functools.cache
@torch.inference_mode(False)
def _dct(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The orthonormal DCT-II of 8 points as a matrix, (8, 8)."""
    rows = [[math.cos((2 * n + 1) * k * math.pi / 16) / 2 for n in range(8)] for k in range(8)]
    matrix = torch.tensor(rows, dtype=torch.float64)
    matrix[0] *= math.sqrt(0.5)
    return matrix.to(device, dtype)
