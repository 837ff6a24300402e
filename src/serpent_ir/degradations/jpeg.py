"""What JPEG does to pixels, batched on any device: baseline, 4:2:0 or 4:4:4, with the tables of the standard's Annex K.

The steps are libjpeg's: colour conversion, halved chroma, 8x8 DCT, quantisation, and back with its smooth upsampling.
Entropy coding is left out, since it loses nothing.
"""

import functools
import math
from collections.abc import Sequence

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
# Halves are rounded up, and so is what differs from a half in its last bits only, since devices differ in those.
_HALF = {torch.float64: 0.5 + 2.0**-25, torch.float32: 0.5 + 2.0**-11}


def through_jpeg(x: Tensor, quality: Tensor, full_chroma: Tensor | None = None) -> Tensor:
    """Images as they are after being written to a JPEG file and read back.

    Args:
        x: (B, 3, H, W) RGB in [0, 1], of any size from 1x1; clamped and rounded to 8 bits first, as a file holds them.
        quality: (B,) integers from 1 to 100, on libjpeg's scale.
        full_chroma: (B,) booleans: which images keep their chroma at full size (4:4:4). With None no image does.

    Returns:
        The decoded images in x's dtype and on its device: multiples of 1/255 in [0, 1]. Not differentiable. Computed in
        float64 if the device has it, so that a level never depends on the order of a sum.
    """
    if not x.numel():
        return x.detach().clone()
    height, width = x.shape[-2:]
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    half = _HALF[wide]
    levels = x.detach().clamp(0, 1).to(wide).mul_(255).round_()
    luma, chroma = _steps(x.device, wide)[:, quality.to(x.device)]
    with torch.autocast(x.device.type, enabled=False):
        # 128 is subtracted from all planes here, chroma like luma, since the DCT is taken of that.
        planes = _mix(levels.unbind(1), _TO_YCBCR, (half - 128, half, half)).floor_()
        planes[:, 1:].clamp_(max=127)
        y = _through_blocks(_extended(planes[:, :1], 8), luma, half)[..., :height, :width]
        # On the right libjpeg repeats pixels and then halves, so for odd widths the last mean includes a repeated
        # pixel. At the bottom it halves and then repeats.
        even = F.pad(planes[:, 1:], (0, -width % 16, 0, height % 2), mode="replicate")
        halved = _through_blocks(_extended(_halved(even), 8), chroma, half)
        colours = _doubled(halved[..., : -(-height // 2), : -(-width // 2)])[..., :height, :width]
        if full_chroma is not None:
            whole = _through_blocks(_extended(planes[:, 1:], 8), chroma, half)[..., :height, :width]
            colours = torch.where(full_chroma.to(x.device)[:, None, None, None], whole, colours)
        decoded = _mix((*y.unbind(1), *colours.unbind(1)), _TO_RGB, (half + 128,) * 3)
        return decoded.floor_().clamp_(0, 255).div_(255).to(x.dtype)


def _through_blocks(planes: Tensor, steps: Tensor, half: float) -> Tensor:
    """Quantise the DCT of each 8x8 block of (B, C, H, W), sides multiples of 8, by steps (B, 64). Levels in and out."""
    dct = _dct(planes.dtype, planes.device)
    blocks = planes.unflatten(-1, (-1, 8)).unflatten(-3, (-1, 8)).transpose(-2, -3)  # (B, C, h, w, 8, 8)
    coefficients = blocks.reshape(len(planes), -1, 64) @ (dct / steps[:, None])
    coefficients = torch.add(coefficients, coefficients.sign(), alpha=half).trunc_()  # halves away from zero
    decoded = (coefficients @ (steps[:, :, None] * dct.T)).add_(half).floor_().clamp_(-128, 127)
    return decoded.view(blocks.shape).transpose(-2, -3).flatten(-2).flatten(-3, -2)


def _halved(planes: Tensor) -> Tensor:
    """Means of 2x2 pixels. Ties are rounded down and up alternately along a row, as in libjpeg."""
    return _add_by_turns(F.avg_pool2d(planes, 2), 0.25, 0.5).floor_()


def _doubled(planes: Tensor) -> Tensor:
    """Double the size with a triangle filter, libjpeg's default: 3/4 of the nearer pixel and 1/4 of the next."""
    if planes.shape[-1] <= 2:  # too narrow for libjpeg's filter, so libjpeg repeats
        return F.interpolate(planes, scale_factor=2, mode="nearest")
    # Values are sixteenths; they are rounded half up in even columns and half down in odd ones.
    doubled = F.interpolate(planes, scale_factor=2, mode="bilinear", align_corners=False)
    return _add_by_turns(doubled, 8 / 16, 7 / 16).floor_()


def _add_by_turns(planes: Tensor, even: float, odd: float) -> Tensor:
    """Add `even` to the even and `odd` to the odd columns of (..., W), W even, in place."""
    planes[..., ::2].add_(even)
    planes[..., 1::2].add_(odd)
    return planes


def _extended(planes: Tensor, multiple: int) -> Tensor:
    """Repeat the edge on the right and at the bottom up to multiples of `multiple`."""
    height, width = planes.shape[-2:]
    if height % multiple == width % multiple == 0:
        return planes
    return F.pad(planes, (0, -width % multiple, 0, -height % multiple), mode="replicate")


def _mix(planes: Sequence[Tensor], matrix: list[list[float]], constants: Sequence[float]) -> Tensor:
    """Three planes (B, H, W) times a 3x3 matrix, plus a constant for each result: (B, 3, H, W)."""
    mixed = planes[0].new_empty(len(planes[0]), 3, *planes[0].shape[1:])
    for plane, row, constant in zip(mixed.unbind(1), matrix, constants, strict=True):
        torch.add(torch.tensor(constant, dtype=plane.dtype), planes[0], alpha=row[0], out=plane)
        for other, weight in zip(planes[1:], row[1:], strict=True):
            if weight:
                plane.add_(other, alpha=weight)
    return mixed


# Cached on the device, since a copy to a GPU would wait for the work that it has queued.
@functools.cache
@torch.inference_mode(False)
def _steps(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Quantisation steps (2, 101, 64) of luma and chroma by quality, in libjpeg's integer arithmetic."""
    quality = torch.arange(101).clamp(min=1)[:, None]
    percent = torch.where(quality < 50, 5000 // quality, 200 - 2 * quality)
    steps = (torch.tensor([_LUMA, _CHROMA])[:, None] * percent + 50) // 100
    return steps.clamp(1, 255).to(device, dtype)


@functools.cache
@torch.inference_mode(False)
def _dct(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The orthonormal DCT-II of 8x8 pixels as a matrix, (64 pixels, 64 coefficients)."""
    rows = [[math.cos((2 * n + 1) * k * math.pi / 16) / 2 for n in range(8)] for k in range(8)]
    matrix = torch.tensor(rows, dtype=torch.float64)
    matrix[0] *= math.sqrt(0.5)
    return torch.kron(matrix, matrix).T.to(device, dtype)
